// The softmax of prefill, on the sums of a warpgroup's product: SLOTS scores of two tokens to a thread. WINDOW as for prefill.
#pragma once

#include "warp.cuh"

struct Rows {  // the two rows of a thread, 8 apart
  int position[2];
  float highest[2], total[2];
};

// Scores become shares of the sum so far; `fading` is what earlier shares are to be multiplied by.
__forceinline__ void soften(float (&scores)[SLOTS / 2], Rows& rows, float (&fading)[2], bool partial, int first_slot, float scale,
                   int lane) {
  if (partial) {
#pragma unroll
    for (int i = 0; i < SLOTS / 2; i++) {
      int slot = first_slot + i / 4 * 8 + lane % 4 * 2 + i % 2, position = rows.position[i / 2 % 2];
      if (slot > position || (WINDOW > 0 && slot <= position - WINDOW)) scores[i] = nothing();
    }
  }
#pragma unroll
  for (int r = 0; r < 2; r++) {
    float highest = rows.highest[r];
#pragma unroll
    for (int i = 0; i < SLOTS / 2; i += 4) highest = fmaxf(highest, fmaxf(scores[i + 2 * r], scores[i + 2 * r + 1]));
    highest = quad_max(highest);
    float base = highest == nothing() ? 0.0f : highest * scale, sum = 0;
    fading[r] = power_of_2(rows.highest[r] * scale - base);
    rows.highest[r] = highest;
#pragma unroll
    for (int i = 0; i < SLOTS / 2; i += 4) {
#pragma unroll
      for (int e = 2 * r; e < 2 * r + 2; e++) {
        scores[i + e] = power_of_2(scores[i + e] * scale - base);
        sum += scores[i + e];
      }
    }
    rows.total[r] = rows.total[r] * fading[r] + sum;
  }
}

__forceinline__ void pack(uint32_t (&shares)[SLOTS / 16][4], const float (&scores)[SLOTS / 2]) {
#pragma unroll
  for (int i = 0; i < SLOTS / 4; i++) shares[i / 4][i % 4] = to_pair(scores[2 * i], scores[2 * i + 1]);
}
