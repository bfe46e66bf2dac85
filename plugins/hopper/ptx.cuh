// SM 9.0's instructions that CUDA C++ has no words for (PTX ISA). Shared memory is addressed by 32-bit addresses.
#pragma once

typedef signed int int32_t;
typedef unsigned int uint32_t;
typedef unsigned short uint16_t;
typedef unsigned char uint8_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;

struct alignas(64) TensorMap {
  uint64_t opaque[16];
};

__forceinline__ uint32_t shared_address(const void* pointer) { return static_cast<uint32_t>(__cvta_generic_to_shared(pointer)); }

// The launch before this one has ended and its writes are seen; the next one may start.
__forceinline__ void wait_for_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__forceinline__ void let_next_start() { asm volatile("griddepcontrol.launch_dependents;"); }

// Barriers in shared memory

__forceinline__ void barrier_init(uint32_t barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count));
}
__forceinline__ void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__forceinline__ void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__forceinline__ void arrive_expecting(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__forceinline__ void wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{ .reg .pred done;\n"
      "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra end;\n"
      "bra again;\n"
      "end: }" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// Named barriers of `threads` threads
__forceinline__ void named_sync(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
__forceinline__ void named_arrive(int id, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

template <int N>
__forceinline__ void fewer_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)); }
template <int N>
__forceinline__ void more_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)); }

// The copy engine: boxes of a tensor map to shared memory; `barrier` counts the bytes. Coordinates: adjacent elements' axis first.

__forceinline__ void prefetch(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(reinterpret_cast<uint64_t>(map)) : "memory");
}

// To the L2 cache, where a thread will soon read.
__forceinline__ void prefetch_line(const void* address) { asm volatile("prefetch.global.L2 [%0];" ::"l"(address)); }

constexpr uint64_t EVICT_FIRST = 0x12F0000000000000ull;  // of weights that are read once
constexpr uint64_t EVICT_LAST = 0x14F0000000000000ull;
constexpr uint64_t EVICT_NORMAL = 0x1000000000000000ull;

__forceinline__ void load_box(uint32_t to, const TensorMap* map, uint32_t barrier, uint64_t policy, int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%4, %5}], "
      "[%2], %3;" ::"r"(to),
      "l"(map), "r"(barrier), "l"(policy), "r"(x), "r"(y)
      : "memory");
}
__forceinline__ void load_box(uint32_t to, const TensorMap* map, uint32_t barrier, uint64_t policy, int x, int y, int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%4, %5, "
      "%6}], [%2], %3;" ::"r"(to),
      "l"(map), "r"(barrier), "l"(policy), "r"(x), "r"(y), "r"(z)
      : "memory");
}
__forceinline__ void load_box(uint32_t to, const TensorMap* map, uint32_t barrier, uint64_t policy, int x, int y, int z, int u,
                     int v) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%4, %5, "
      "%6, %7, %8}], [%2], %3;" ::"r"(to),
      "l"(map), "r"(barrier), "l"(policy), "r"(x), "r"(y), "r"(z), "r"(u), "r"(v)
      : "memory");
}

// What threads wrote to shared memory, the matrix units and the copy engine may read.
__forceinline__ void publish_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Warpgroup matrix products (wgmma.cuh has the products themselves)

__forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
__forceinline__ void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory"); }

// Keeps the compiler from moving what it does with registers across this point.
template <int N>
__forceinline__ void hold(float (&values)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+f"(values[i])::"memory");
}

template <int N>
__forceinline__ void hold(uint32_t (&values)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+r"(values[i])::"memory");
}
template <int M, int N>
__forceinline__ void hold(uint32_t (&values)[M][N]) {
#pragma unroll
  for (int i = 0; i < M; i++) hold(values[i]);
}

// Matrix descriptors of rows of 128 swizzled bytes in groups of 8. Rows of K adjacent: 1024 bytes from group to group.
__forceinline__ uint64_t rows_of_k(uint32_t address) {
  return uint64_t((address & 0x3FFFF) >> 4) | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}
// Columns adjacent, 64 of them in a row: `next` bytes from 64 columns to the next 64.
__forceinline__ uint64_t columns_adjacent(uint32_t address, uint32_t next) {
  return uint64_t((address & 0x3FFFF) >> 4) | uint64_t(next >> 4) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}

// Elements are 16-bit numbers, in pairs of which the first is in the low half.
#if ELEMENT_IS_BFLOAT16
#define ELEMENT "bf16"
__forceinline__ float low_float(uint32_t pair) { return __uint_as_float(pair << 16); }
__forceinline__ float high_float(uint32_t pair) { return __uint_as_float(pair & 0xFFFF0000u); }
#else
#define ELEMENT "f16"
__forceinline__ float low_float(uint32_t pair) {
  float value;
  asm("{ .reg .b16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, low; }" : "=f"(value) : "r"(pair));
  return value;
}
__forceinline__ float high_float(uint32_t pair) {
  float value;
  asm("{ .reg .b16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, high; }" : "=f"(value) : "r"(pair));
  return value;
}
#endif

__forceinline__ uint32_t to_pair(float low, float high) {
  uint32_t pair;
  asm("cvt.rn." ELEMENT "x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// Stores 8x8 matrices of 16-bit numbers, held as products' sums are, transposed: lanes 8 * i to 8 * i + 7 give the
// addresses of matrix i's columns.
__forceinline__ void store_transposed(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b),
               "r"(c), "r"(d)
               : "memory");
}
__forceinline__ void store_transposed(uint32_t address, uint32_t a, uint32_t b) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(address), "r"(a), "r"(b) : "memory");
}
__forceinline__ void store_matrices(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b),
               "r"(c), "r"(d)
               : "memory");
}

struct alignas(16) Chunk {
  uint32_t words[4];
};
__forceinline__ Chunk load_shared(uint32_t address) {
  Chunk chunk;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(chunk.words[0]), "=r"(chunk.words[1]), "=r"(chunk.words[2]), "=r"(chunk.words[3])
               : "r"(address)
               : "memory");
  return chunk;
}
__forceinline__ void store_shared(uint32_t address, Chunk chunk) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(chunk.words[0]), "r"(chunk.words[1]),
               "r"(chunk.words[2]), "r"(chunk.words[3])
               : "memory");
}
__forceinline__ void store_word(uint32_t address, uint32_t word) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(word) : "memory");
}
__forceinline__ void store_element(uint32_t address, float value) {
  asm volatile("{ .reg .b16 element; cvt.rn." ELEMENT ".f32 element, %1; st.shared.b16 [%0], element; }" ::"r"(address),
               "f"(value)
               : "memory");
}
__forceinline__ void store_pair(uint32_t address, float first, float second) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(first), "f"(second) : "memory");
}
// Of 8 elements of a row that lies in swizzled rows of 128 bytes, `half_bytes` from 64 columns to the next 64.
__forceinline__ uint32_t chunk_address(uint32_t tile, int row, int chunk, int half_bytes) {
  return tile + chunk / 8 * half_bytes + row * 128 + ((chunk ^ row) & 7) * 16;
}
