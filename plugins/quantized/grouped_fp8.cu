// FP8 experts on many tokens, for SM 9.0: products of E4M3 weights and E4M3 activations, summed in float32.
//
// Scales of weights are a row's, those of activations an expert's, so both are a thread's own and are multiplied to the sums.
// What the up product makes is rounded to E4M3 for the down product.
//
// The matrix units keep fewer bits than float32 has from one product to the next. With PROMOTED = n > 0 they add up n steps only,
// and those sums are added in float32, for which tiles have to be narrower.
//
// Macros: HIDDEN, INTERMEDIATE, LOCAL experts, PROMOTED, ELEMENT_IS_BFLOAT16. Shapes: R rows, H hidden, F intermediate, L local
// experts.

constexpr int COLUMNS = 128;                      // of a step
constexpr int WIDEST = PROMOTED > 0 ? 192 : 288;  // tokens in a tile

#include "grouped.cuh"

// Of a thread's row, and of the one 8 rows below: what sums are multiplied by; and of the up product, what results are.
struct Scales {
  float row, below, out;
};

struct ScalePointers {
  const uint16_t *weights, *inputs, *outputs;  // outputs: of the up product
};

__forceinline__ float number(const uint16_t* numbers, int index) { return low_float(numbers[index]); }

template <bool UP>
__forceinline__ Scales scales_of(const ScalePointers& scales, const Tile& tile, int group, int thread) {
  int warp = thread / 32, row = thread % 32 / 4;
  float input = number(scales.inputs, tile.expert);
  if constexpr (UP) {  // of gate and of up
    row += tile.column * (ROWS / 2) + group * 32 + warp * 8;
    int at = tile.expert * 2 * INTERMEDIATE + min(row, INTERMEDIATE - 1);
    return {number(scales.weights, at) * input, number(scales.weights, at + INTERMEDIATE) * input,
            1 / number(scales.outputs, tile.expert)};
  } else {
    row += tile.column * ROWS + group * 64 + warp * 16;
    int first = tile.expert * HIDDEN;
    return {number(scales.weights, first + min(row, HIDDEN - 1)) * input,
            number(scales.weights, first + min(row + 8, HIDDEN - 1)) * input, 1};
  }
}

// Four E4M3 codes, ties to even, saturated; the first in the lowest byte.
__forceinline__ uint32_t to_codes(float a, float b, float c, float d) {
  uint32_t codes;
  asm("{ .reg .b16 low, high; cvt.rn.satfinite.e4m3x2.f32 low, %2, %1; cvt.rn.satfinite.e4m3x2.f32 high, %4, %3; "
      "mov.b32 %0, {low, high}; }"
      : "=r"(codes)
      : "f"(a), "f"(b), "f"(c), "f"(d));
  return codes;
}

// The up product's results as codes: of each warp, sums of 8 rows of gate and, 8 below, of up. `first`: the tile's token of `d`.
//
// Of 16 tokens, a thread has one row of tokens 2q, 2q + 1, 2q + 8 and 2q + 9 (q: its place in the quad). Four threads whose rows
// adjoin exchange bytes until each has four rows of one of these tokens: a word of the token's 32 bytes. The 8 bytes of a warp
// stand at another place in every fourth token, so that a warp's words are in different banks.
template <int N>
__forceinline__ void write_up(float (&d)[N / 2], int first, uint32_t out, uint8_t* inner, const Tile& tile, const Scales& scales,
                              int group, int thread) {
  int warp = thread / 32, row = thread % 32 / 4, place = thread % 4 * 2;
  bool odd = row & 1, second = row & 2;
  int own = place + (second ? 8 : 0) + (odd ? 1 : 0);
  uint32_t to = out + own * 32 + (warp ^ (own >> 2 & 3)) * 8 + (row & 4);
  named_sync(1 + group, 128);
#pragma unroll
  for (int j = 0; j < N; j += 16) {
    float h[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      int s = j / 2 + i / 2 * 4 + i % 2;
      h[i] = silu(scales.row * d[s]) * (scales.below * d[s + 2]);
    }
    uint32_t low = to_pair(h[0], h[1]), high = to_pair(h[2], h[3]);  // elements, as they are before they are quantized
    uint32_t codes = to_codes(low_float(low) * scales.out, high_float(low) * scales.out, low_float(high) * scales.out,
                              high_float(high) * scales.out);
    uint32_t other = __shfl_xor_sync(~0u, codes, 4);
    codes = __byte_perm(codes, other, odd ? 0x3715 : 0x6240);
    other = __shfl_xor_sync(~0u, codes, 8);
    store_word(to + j * 32, __byte_perm(codes, other, second ? 0x3276 : 0x5410));
  }
  named_sync(1 + group, 128);
  int chunk = thread % 2, column = tile.column * (ROWS / 2) + group * 32 + chunk * 16;
  if (column < INTERMEDIATE)
    for (int token = thread / 2; token < min(N, tile.count - first); token += 64) {
      int turn = token >> 2 & 3;
      Chunk codes = load_shared(out + token * 32 + (chunk ^ turn >> 1) * 16);
      if (turn & 1) codes = {codes.words[2], codes.words[3], codes.words[0], codes.words[1]};
      *reinterpret_cast<Chunk*>(inner + int64_t(tile.row + first + token) * INTERMEDIATE + column) = codes;
    }
}

template <bool UP, int N>
__forceinline__ void write(float (&d)[N / 2], int first, uint32_t out, void* y, const Tile& tile, const Scales& scales, int group,
                           int thread) {
  if constexpr (UP)
    write_up<N>(d, first, out, static_cast<uint8_t*>(y), tile, scales, group, thread);
  else
    write_down<N>(d, first, out, static_cast<uint16_t*>(y), tile, scales.row, scales.below, group, thread);
}

// A warpgroup's 64 rows of weights by the tile's tokens: N of them, and if the tile is wider than one instruction, `MORE`.
template <bool UP, int STEPS, int N, int MORE>
__forceinline__ void multiply(Rings& rings, uint32_t out, void* y, const Tile& tile, const ScalePointers& pointers, int group,
                              int thread) {
  constexpr int CHAIN = PROMOTED > 0 ? PROMOTED : STEPS;  // steps that the matrix units add up
  Scales scales = scales_of<UP>(pointers, tile, group, thread);
  float d[N / 2], more[MORE ? MORE / 2 : 1], sums[PROMOTED > 0 ? N / 2 : 1];
#pragma unroll
  for (int i = 0; i < N / 2; i++) d[i] = 0;
#pragma unroll
  for (int i = 0; i < MORE / 2; i++) more[i] = 0;
  if constexpr (PROMOTED > 0) {
#pragma unroll
    for (int i = 0; i < N / 2; i++) sums[i] = 0;
  }
  uint32_t weights_before = 0, tokens_before = 0;
  for (int step = 0; step < STEPS; step++) {
    wait(rings.weights.full_barrier(), rings.weights.parity);
    wait(rings.tokens.full_barrier(), rings.tokens.parity);
    uint64_t a = rows_of_k(rings.weights.address() + group * (WEIGHT_BYTES / 2)), b = rows_of_k(rings.tokens.address());
    int keep = PROMOTED == 0 || step % CHAIN > 0;
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < COLUMNS / 32; k++) {
      wgmma_e4m3<N>(d, a + 2 * k, b + 2 * k, k > 0 || keep);
      if constexpr (MORE > 0) wgmma_e4m3<MORE>(more, a + 2 * k, b + 2 * k + N * STEP_BYTES / 16, 1);
    }
    wgmma_commit();
    wgmma_wait<1>();
    if (step && thread % 32 == 0) arrive(weights_before), arrive(tokens_before);
    weights_before = rings.weights.empty_barrier(), tokens_before = rings.tokens.empty_barrier();
    rings.weights.next();
    rings.tokens.next();
    if constexpr (PROMOTED > 0) {
      if (step % CHAIN == CHAIN - 1 || step == STEPS - 1) {
        wgmma_wait<0>();
        hold(d);
#pragma unroll
        for (int i = 0; i < N / 2; i++) sums[i] += d[i];
      }
    }
  }
  wgmma_wait<0>();
  hold(d);
  hold(more);
  if (thread % 32 == 0) arrive(weights_before), arrive(tokens_before);
  if constexpr (PROMOTED > 0)
    write<UP, N>(sums, 0, out, y, tile, scales, group, thread);
  else
    write<UP, N>(d, 0, out, y, tile, scales, group, thread);
  if constexpr (MORE > 0) write<UP, MORE>(more, N, out, y, tile, scales, group, thread);
}

template <bool UP, int STEPS, int COLUMN_TILES>
__forceinline__ void experts(const TensorMap* weights, const TensorMap* tokens, const int* totals, bool totals_are_late,
                             const ScalePointers& scales, void* y) {
  auto consume = [&](Shared& shared, Rings rings, uint32_t out, int group, int thread, int count) {
    for (int turn = 0, index; (index = tile_index(turn)) < count; turn++) {
      Tile tile = locate(shared.experts, index);
#define WIDTH(n, more) \
  case n + more: multiply<UP, STEPS, n, more>(rings, out, y, tile, scales, group, thread); break;
      switch (tile.width) {
        WIDTH(16, 0) WIDTH(32, 0) WIDTH(64, 0) WIDTH(96, 0) WIDTH(128, 0) WIDTH(144, 0) WIDTH(160, 0) WIDTH(176, 0) WIDTH(192, 0)
#if !PROMOTED
        WIDTH(208, 0) WIDTH(224, 0) WIDTH(240, 0) WIDTH(256, 0) WIDTH(144, 128) WIDTH(144, 144)
#endif
      }
#undef WIDTH
    }
  };
  run<UP, STEPS, COLUMN_TILES>(weights, tokens, totals, totals_are_late, consume);
}

constexpr int steps(int columns) { return (columns + COLUMNS - 1) / COLUMNS; }
constexpr int tiles(int rows, int of_one) { return (rows + of_one - 1) / of_one; }

#ifdef COMPILE_grouped_fp8_up
// `sorted_x [R, H]`, `gate_up [L, 2F, H]` → `inner [R, F]`: silu(gate) * up divided by `output_scales [L]`; all are codes.
// `scales [L * 2F]` of the weights, `input_scales [L]` of sorted_x. `totals [L]`: rows per expert, which lie one expert's behind
// the other's.
extern "C" __global__ void __launch_bounds__(384, 1)
    grouped_fp8_up(const __grid_constant__ TensorMap gate_up, const __grid_constant__ TensorMap sorted_x, const int* totals,
                   const uint16_t* scales, const uint16_t* input_scales, const uint16_t* output_scales, uint8_t* inner) {
  experts<true, steps(HIDDEN), tiles(INTERMEDIATE, ROWS / 2)>(&gate_up, &sorted_x, totals, true,
                                                              {scales, input_scales, output_scales}, inner);
}
#endif

#ifdef COMPILE_grouped_fp8_down
// `inner [R, F]`, `down [L, H, F]`, codes → `results [R, H]`. `scales [L * H]`, `input_scales [L]` of inner.
extern "C" __global__ void __launch_bounds__(384, 1)
    grouped_fp8_down(const __grid_constant__ TensorMap down, const __grid_constant__ TensorMap inner, const int* totals,
                     const uint16_t* scales, const uint16_t* input_scales, uint16_t* results) {
  experts<false, steps(INTERMEDIATE), tiles(HIDDEN, ROWS)>(&down, &inner, totals, false, {scales, input_scales, nullptr},
                                                           results);
}
#endif

#ifdef COMPILE_linear_fp8
// `x [R, F]`, `weights [1, H, F]`, codes → `y [R, H]`. `scales [H]`, `input_scales [1]`. `totals [1]`: R.
extern "C" __global__ void __launch_bounds__(384, 1)
    linear_fp8(const __grid_constant__ TensorMap weights, const __grid_constant__ TensorMap x, const int* totals,
               const uint16_t* scales, const uint16_t* input_scales, uint16_t* y) {
  experts<false, steps(INTERMEDIATE), tiles(HIDDEN, ROWS)>(&weights, &x, totals, true, {scales, input_scales, nullptr}, y);
}
#endif
