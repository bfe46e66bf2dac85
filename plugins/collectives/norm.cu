// All-reduce, residual addition and RMS norm in one launch: y = norm(x), x = residual + Σ branch, of whole rows.
//
// As the ops it stands for do it one after another: the sum is rounded, then x, then the norm's factor (plugins/rmsnorm).
#include "exchange.cuh"

constexpr int MOST_VECTORS = 4;  // of a row, a thread

__forceinline__ float add_up(float value) {
  SHARED_FLOATS(sums, THREADS);
  sums[thread()] = value;
  for (int half = THREADS / 2; half > 0; half /= 2) {
    meet();
    if (thread() < half) sums[thread()] += sums[thread() + half];
  }
  meet();
  float total = sums[0];
  meet();
  return total;
}

extern "C" __global__ void __launch_bounds__(THREADS) one_shot_norm(const void* residual, const void* branch, const void* weight,
                                                                    void* y, void* x, Region* own, int rows, int hidden,
                                                                    float epsilon) {
  Group group = begin(own);
  int vectors = hidden / PER_VECTOR;  // of a row
  auto of = [&](const void* tensor, int at) { return static_cast<const Vector*>(tensor)[at]; };
  for (int row = program(); row < rows; row += programs()) {
    for (int i = thread(); i < vectors; i += THREADS) send_lines(group, row * vectors + i, of(branch, row * vectors + i));
  }
  for (int row = program(); row < rows; row += programs()) {
    float kept[MOST_VECTORS][PER_VECTOR], squares = 0;
#pragma unroll
    for (int step = 0; step < MOST_VECTORS; step++) {
      int i = thread() + step * THREADS, at = row * vectors + i;
      if (i < vectors) {
        Vector parts[MOST_RANKS], mine = of(branch, at);
        receive_lines(group, at, parts);
#pragma unroll
        for (int k = 0; k < MOST_RANKS; k++) {
          if (k == group.rank) parts[k] = mine;
        }
        float before[PER_VECTOR], after[PER_VECTOR];
        widen(of(residual, at), before);
        widen(sum(group, parts), after);
#pragma unroll
        for (int j = 0; j < PER_VECTOR; j++) after[j] += before[j];
        Vector total = narrow(after);
        static_cast<Vector*>(x)[at] = total;
        widen(total, kept[step]);
#pragma unroll
        for (int j = 0; j < PER_VECTOR; j++) squares += kept[step][j] * kept[step][j];
      }
    }
    float factor = inverse_root(add_up(squares) / hidden + epsilon);
#pragma unroll
    for (int step = 0; step < MOST_VECTORS; step++) {
      int i = thread() + step * THREADS;
      if (i < vectors) {
        float scaled[PER_VECTOR], scale[PER_VECTOR];
#pragma unroll
        for (int j = 0; j < PER_VECTOR; j++) kept[step][j] *= factor;
        widen(narrow(kept[step]), scaled);
        widen(of(weight, i), scale);
#pragma unroll
        for (int j = 0; j < PER_VECTOR; j++) scaled[j] *= scale[j];
        static_cast<Vector*>(y)[row * vectors + i] = narrow(scaled);
      }
    }
  }
  end(group);
}
