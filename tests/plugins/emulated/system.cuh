// `plugins/collectives/system.cuh` for threads of a CPU: each of a kernel's threads is one of the host's.
#pragma once
#include <atomic>
#include <barrier>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>

#define __global__
#define __launch_bounds__(...)
#define __forceinline__ inline

struct Program {
  int number, of;
  std::barrier<>* barrier;
  float* shared;
};
inline thread_local Program current;
inline thread_local int current_thread;

inline int thread() { return current_thread; }
inline int program() { return current.number; }
inline int programs() { return current.of; }
inline void meet() { current.barrier->arrive_and_wait(); }
#define SHARED_FLOATS(name, count) float* name = current.shared

inline uint64_t nanoseconds() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
}
inline void rest() { std::this_thread::yield(); }

struct alignas(16) Line {
  uint64_t first, second;
};
inline void put_line(Line* to, Line line) {
  __atomic_store_n(&to->first, line.first, __ATOMIC_RELAXED);
  __atomic_store_n(&to->second, line.second, __ATOMIC_RELAXED);
}
inline Line get_line(const Line* from) {
  return {__atomic_load_n(&from->first, __ATOMIC_RELAXED), __atomic_load_n(&from->second, __ATOMIC_RELAXED)};
}
inline void raise_flag(uint32_t* flag, uint32_t value) { __atomic_store_n(flag, value, __ATOMIC_RELEASE); }
inline uint32_t see_flag(const uint32_t* flag) { return __atomic_load_n(flag, __ATOMIC_ACQUIRE); }
inline uint32_t look_at(const uint32_t* word) { return __atomic_load_n(word, __ATOMIC_RELAXED); }
inline void tell(uint32_t* word, uint32_t value) { __atomic_store_n(word, value, __ATOMIC_RELAXED); }
inline uint32_t count_up(uint32_t* word) { return __atomic_fetch_add(word, 1u, __ATOMIC_ACQ_REL); }

template <class To, class From>
inline To bits(From from) {
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

#if ELEMENT == 2
typedef uint32_t Element;
inline void widen_word(uint32_t word, float* values) { values[0] = bits<float>(word); }
inline uint32_t narrow_word(const float* values) { return bits<uint32_t>(values[0]); }
#else
typedef uint16_t Element;
#if ELEMENT == 1
inline float widened(uint16_t element) { return bits<float>(uint32_t(element) << 16); }
inline uint16_t narrowed(float value) {
  uint32_t word = bits<uint32_t>(value);
  return uint16_t((word + 0x7FFF + (word >> 16 & 1)) >> 16);
}
#else
inline float widened(uint16_t element) { return float(bits<_Float16>(element)); }
inline uint16_t narrowed(float value) { return bits<uint16_t>(_Float16(value)); }
#endif
inline void widen_word(uint32_t word, float* values) {
  values[0] = widened(uint16_t(word)), values[1] = widened(uint16_t(word >> 16));
}
inline uint32_t narrow_word(const float* values) { return narrowed(values[0]) | uint32_t(narrowed(values[1])) << 16; }
#endif

inline float inverse_root(float value) { return 1.0f / std::sqrt(value); }
