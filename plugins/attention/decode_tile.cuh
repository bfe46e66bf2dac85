// A warp's work on a tile of decode: scores, softmax, mixture. The tile's sizes are decode.cu's.
#pragma once

#include "warp.cuh"

// Queries as left operands. Rows past the group are whatever is there: they stay among themselves, and nobody looks at them.
__forceinline__ void load_query(uint32_t (&query)[STEPS][4], uint32_t from, int lane) {
  int row = ROWS == 1 ? lane % 8 : lane % 16, chunk = ROWS == 1 ? lane / 8 % 2 : lane / 16;
#pragma unroll
  for (int k = 0; k < STEPS; k++) {
    load_matrices(query[k], from + row * QUERY_PITCH + (2 * k + chunk) * 16);
    if (ROWS == 1) query[k][2] = query[k][1], query[k][1] = query[k][3] = 0;
  }
}

__forceinline__ void multiply_keys(float (&scores)[2][4], const uint32_t (&query)[STEPS][4], uint32_t keys, int half_bytes,
                                   int lane) {
  float odd[2][4] = {};
#pragma unroll
  for (int i = 0; i < 2; i++)
    for (int e = 0; e < 4; e++) scores[i][e] = 0;
#pragma unroll
  for (int k = 0; k < STEPS; k++) {
    uint32_t b[4];
    load_matrices(b, chunk_address(keys, lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2, half_bytes));
    multiply(k % 2 ? odd[0] : scores[0], query[k], b[0], b[1]);
    multiply(k % 2 ? odd[1] : scores[1], query[k], b[2], b[3]);
  }
#pragma unroll
  for (int i = 0; i < 2; i++)
    for (int e = 0; e < 4; e++) scores[i][e] += odd[i][e];
}

struct Softmax {
  float highest[ROWS], total[ROWS], mix[2 * STEPS][4];
};

// Which of a tile's slots are seen: one at least.
struct Seen {
  int from, to;
  __forceinline__ bool operator()(int slot) const { return slot >= from && slot < to; }
};

// Scores of so many times 16 slots become shares, left operands; what was mixed before fades.
template <int N>
__forceinline__ void soften(uint32_t (&shares)[N][4], float (&scores)[N][2][4], Softmax& softmax, Seen seen, float scale,
                            int lane) {
#pragma unroll
  for (int part = 0; part < N; part++) shares[part][1] = shares[part][3] = 0;
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    float highest = softmax.highest[r];
#pragma unroll
    for (int i = 0; i < 2 * N; i++) {
#pragma unroll
      for (int e = 0; e < 2; e++) {
        float& score = scores[i / 2][i % 2][2 * r + e];
        score = seen(8 * i + lane % 4 * 2 + e) ? score * scale : nothing();
        highest = fmaxf(highest, score);
      }
    }
    highest = quad_max(highest);
    float fading = power_of_2(softmax.highest[r] - highest);
    softmax.highest[r] = highest;
    softmax.total[r] *= fading;
#pragma unroll
    for (int i = 0; i < 2 * N; i++) {
      const float(&score)[4] = scores[i / 2][i % 2];
      float first = power_of_2(score[2 * r] - highest), second = power_of_2(score[2 * r + 1] - highest);
      softmax.total[r] += first + second;
      shares[i / 2][i % 2 * 2 + r] = to_pair(first, second);
    }
#pragma unroll
    for (int j = 0; j < 2 * STEPS; j++) softmax.mix[j][2 * r] *= fading, softmax.mix[j][2 * r + 1] *= fading;
  }
}

// What is not seen may be anything, NaN too: it is zero here.
__forceinline__ void multiply_values(Softmax& softmax, const uint32_t (&shares)[4], uint32_t values, int half_bytes, Seen seen,
                                     int lane) {
  uint32_t kept[2];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    int slot = 8 * i + lane % 4 * 2;
    kept[i] = (seen(slot) ? 0xFFFFu : 0) | (seen(slot + 1) ? 0xFFFF0000u : 0);
  }
#pragma unroll
  for (int j = 0; j < 2 * STEPS; j += 2) {
    uint32_t b[4];
    load_transposed(b, chunk_address(values, lane % 16, j + lane / 16, half_bytes));
    multiply(softmax.mix[j], shares, b[0] & kept[0], b[1] & kept[1]);
    multiply(softmax.mix[j + 1], shares, b[2] & kept[0], b[3] & kept[1]);
  }
}
