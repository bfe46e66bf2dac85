// Experts on many tokens, for SM 9.0: persistent grouped matrix products over rows sorted by expert.
//
// Macros: HIDDEN, INTERMEDIATE, LOCAL experts, ELEMENT_IS_BFLOAT16. Shapes: R rows, H hidden, F intermediate, L local experts.

constexpr int COLUMNS = 64;  // of a step
constexpr int WIDEST = 288;  // tokens in a tile

#include "grouped.cuh"

// The up product's results: of each warp, sums of 8 rows of gate and, 8 below, of up. `first`: the tile's token of `d`.
template <int N>
__forceinline__ void write_up(float (&d)[N / 2], int first, uint32_t out, uint16_t* inner, const Tile& tile, int group, int thread) {
  constexpr int TOKENS = 128;  // at a time
  int warp = thread / 32, lane = thread % 32;
  int chunk = thread % 4, column = tile.column * (ROWS / 2) + group * 32 + chunk * 8;
#pragma unroll
  for (int part = 0; part < N; part += TOKENS) {
    named_sync(1 + group, 128);
#pragma unroll
    for (int j = 0; j < TOKENS; j += 16) {
      if (part + j < N) {
        constexpr int LAST = N / 2 - 8;
        int s = part / 2 + j / 2 < LAST ? part / 2 + j / 2 : LAST, token = j + lane % 16;
        store_transposed(out + token * 64 + (warp ^ (token >> 1 & 3)) * 16,
                         to_pair(silu(d[s]) * d[s + 2], silu(d[s + 1]) * d[s + 3]),
                         to_pair(silu(d[s + 4]) * d[s + 6], silu(d[s + 5]) * d[s + 7]));
      }
    }
    named_sync(1 + group, 128);
    if (column < INTERMEDIATE)
      for (int token = thread / 4; token < min(min(TOKENS, N - part), tile.count - first - part); token += 32) {
        Chunk values = load_shared(out + token * 64 + (chunk ^ (token >> 1 & 3)) * 16);
        *reinterpret_cast<Chunk*>(inner + int64_t(tile.row + first + part + token) * INTERMEDIATE + column) = values;
      }
  }
}

template <bool UP, int N>
__forceinline__ void write(float (&d)[N / 2], int first, uint32_t out, uint16_t* y, const Tile& tile, int group, int thread) {
  if constexpr (UP)
    write_up<N>(d, first, out, y, tile, group, thread);
  else
    write_down<N>(d, first, out, y, tile, 1, 1, group, thread);
}

// A warpgroup's 64 rows of weights by the tile's tokens: N of them, and if the tile is wider than one instruction, `MORE`.
template <bool UP, int STEPS, int N, int MORE>
__forceinline__ void multiply(Rings& rings, uint32_t out, uint16_t* y, const Tile& tile, int group, int thread) {
  float d[N / 2], more[MORE ? MORE / 2 : 1];
#pragma unroll
  for (int i = 0; i < N / 2; i++) d[i] = 0;
#pragma unroll
  for (int i = 0; i < MORE / 2; i++) more[i] = 0;
  uint32_t weights_before = 0, tokens_before = 0;
  for (int step = 0; step < STEPS; step++) {
    wait(rings.weights.full_barrier(), rings.weights.parity);
    wait(rings.tokens.full_barrier(), rings.tokens.parity);
    uint64_t a = rows_of_k(rings.weights.address() + group * (WEIGHT_BYTES / 2)), b = rows_of_k(rings.tokens.address());
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < COLUMNS / 16; k++) {
      wgmma<N>(d, a + 2 * k, b + 2 * k, 1);
      if constexpr (MORE > 0) wgmma<MORE>(more, a + 2 * k, b + 2 * k + N * STEP_BYTES / 16, 1);
    }
    wgmma_commit();
    wgmma_wait<1>();
    if (step && thread % 32 == 0) arrive(weights_before), arrive(tokens_before);
    weights_before = rings.weights.empty_barrier(), tokens_before = rings.tokens.empty_barrier();
    rings.weights.next();
    rings.tokens.next();
  }
  wgmma_wait<0>();
  hold(d);
  hold(more);
  if (thread % 32 == 0) arrive(weights_before), arrive(tokens_before);
  write<UP, N>(d, 0, out, y, tile, group, thread);
  if constexpr (MORE > 0) write<UP, MORE>(more, N, out, y, tile, group, thread);
}

template <bool UP, int STEPS, int COLUMN_TILES>
__forceinline__ void experts(const TensorMap* weights, const TensorMap* tokens, const int* totals, uint16_t* y) {
  auto consume = [&](Shared& shared, Rings rings, uint32_t out, int group, int thread, int count) {
    for (int turn = 0, index; (index = tile_index(turn)) < count; turn++) {
      Tile tile = locate(shared.experts, index);
#define WIDTH(n, more) \
  case n + more: multiply<UP, STEPS, n, more>(rings, out, y, tile, group, thread); break;
      switch (tile.width) {
        WIDTH(16, 0) WIDTH(32, 0) WIDTH(64, 0) WIDTH(96, 0) WIDTH(128, 0)
        WIDTH(144, 0) WIDTH(160, 0) WIDTH(176, 0) WIDTH(192, 0) WIDTH(208, 0) WIDTH(224, 0) WIDTH(240, 0) WIDTH(256, 0)
        WIDTH(144, 128) WIDTH(144, 144)
      }
#undef WIDTH
    }
  };
  run<UP, STEPS, COLUMN_TILES>(weights, tokens, totals, UP, consume);
}

#ifdef COMPILE_grouped_up
// `sorted_x [R, H]`, `gate_up [L, 2F, H]` → `inner [R, F]`, silu(gate) * up. `totals [L]`: rows per expert, which lie one
// expert's behind the other's.
extern "C" __global__ void __launch_bounds__(384, 1)
    grouped_up(const __grid_constant__ TensorMap gate_up, const __grid_constant__ TensorMap sorted_x, const int* totals,
               uint16_t* inner) {
  experts<true, (HIDDEN + COLUMNS - 1) / COLUMNS, (INTERMEDIATE + ROWS / 2 - 1) / (ROWS / 2)>(&gate_up, &sorted_x, totals, inner);
}
#endif

#ifdef COMPILE_grouped_down
// `inner [R, F]`, `down [L, H, F]` → `results [R, H]`.
extern "C" __global__ void __launch_bounds__(384, 1)
    grouped_down(const __grid_constant__ TensorMap down, const __grid_constant__ TensorMap inner, const int* totals,
                 uint16_t* results) {
  experts<false, (INTERMEDIATE + COLUMNS - 1) / COLUMNS, (HIDDEN + ROWS - 1) / ROWS>(&down, &inner, totals, results);
}
#endif
