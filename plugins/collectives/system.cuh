// What exchanges use of a GPU: memory that other GPUs see (PTX ISA, "Memory Consistency Model", scope .sys), its clock, its
// threads, its number types. Tests put a file of this name before it that offers the same to threads of a CPU.
#pragma once

typedef signed int int32_t;
typedef unsigned int uint32_t;
typedef unsigned short uint16_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;

__forceinline__ int thread() { return threadIdx.x; }
__forceinline__ int program() { return blockIdx.x; }
__forceinline__ int programs() { return gridDim.x; }
__forceinline__ void meet() { __syncthreads(); }  // all threads of the program
#define SHARED_FLOATS(name, count) __shared__ float name[count]

__forceinline__ uint64_t nanoseconds() {
  uint64_t now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  return now;
}
__forceinline__ void rest() { __nanosleep(200); }

// Two words of a message, each with the turn it belongs to in the same 8 bytes, which are written and read as one: whoever finds
// the turn has the word too.
struct alignas(16) Line {
  uint64_t first, second;
};
__forceinline__ void put_line(Line* to, Line line) {
  asm volatile("st.relaxed.sys.global.v2.u64 [%0], {%1, %2};" ::"l"(to), "l"(line.first), "l"(line.second) : "memory");
}
__forceinline__ Line get_line(const Line* from) {
  Line line;
  asm volatile("ld.relaxed.sys.global.v2.u64 {%0, %1}, [%2];" : "=l"(line.first), "=l"(line.second) : "l"(from) : "memory");
  return line;
}

// What this thread has written, or has seen written before a `meet`, is there for whoever sees the flag.
__forceinline__ void raise_flag(uint32_t* flag, uint32_t value) {
  asm volatile("fence.acq_rel.sys;\nst.release.sys.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}
__forceinline__ uint32_t see_flag(const uint32_t* flag) {
  uint32_t value;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  return value;
}
__forceinline__ uint32_t look_at(const uint32_t* word) {
  uint32_t value;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
  return value;
}
__forceinline__ void tell(uint32_t* word, uint32_t value) {
  asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(word), "r"(value) : "memory");
}
__forceinline__ uint32_t count_up(uint32_t* word) { return atomicAdd(word, 1u); }

// ELEMENT: 0 float16, 1 bfloat16, 2 float32

#if ELEMENT == 2
typedef uint32_t Element;
__forceinline__ void widen_word(uint32_t word, float* values) { values[0] = __uint_as_float(word); }
__forceinline__ uint32_t narrow_word(const float* values) { return __float_as_uint(values[0]); }
#elif ELEMENT == 1
typedef uint16_t Element;
__forceinline__ void widen_word(uint32_t word, float* values) {
  values[0] = __uint_as_float(word << 16);
  values[1] = __uint_as_float(word & 0xFFFF0000u);
}
__forceinline__ uint32_t narrow_word(const float* values) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(values[1]), "f"(values[0]));
  return word;
}
#else
typedef uint16_t Element;
__forceinline__ void widen_word(uint32_t word, float* values) {
  asm("{ .reg .b16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high; }"
      : "=f"(values[0]), "=f"(values[1])
      : "r"(word));
}
__forceinline__ uint32_t narrow_word(const float* values) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(values[1]), "f"(values[0]));
  return word;
}
#endif

__forceinline__ float inverse_root(float value) { return 1.0f / sqrtf(value); }
