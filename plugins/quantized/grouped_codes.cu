// Experts of codes on many tokens, for SM 9.0: products of weights of 8 or 4 bits with tokens in float16 or bfloat16.
//
// As in moe/grouped.cu, but the left operand comes from registers: while the matrix units multiply a segment of 64 columns, their
// warps convert the next one's codes, which lie in memory and in shared memory as they are. What meets them, sorted tokens and what
// the up product makes, is in the order of columns that fragments.cuh says.
//
// Scales of blocks are read by the threads that need them, a step ahead; the warp that fetches codes calls for them long before.
// Scales of whole rows multiply the sums.
//
// Macros: HIDDEN, INTERMEDIATE, LOCAL experts, CODES, BLOCK, ELEMENT_IS_BFLOAT16. Shapes: R rows, H hidden, F intermediate, L local
// experts. H (Linear: the columns) and F are multiples of 64 and of BLOCK, which is a multiple of 64 or, for E2M1, 16.

#include "fragments.cuh"

constexpr int COLUMNS = SEGMENT;  // of a step of tokens
// tokens in a tile: where each segment has scales and zero points of its own, registers are fewer
constexpr int WIDEST = FORMAT == INT4_ASYMMETRIC && BLOCK % 128 > 0 ? 192 : 256;

#include "grouped.cuh"

struct Scales {
  const uint8_t* scales;  // of rows or blocks: elements, or E4M3
  const uint8_t* extra;   // zero points, or E2M1's scales of rows, float32
};

constexpr int SPAN = BLOCK == 128 ? 2 : BLOCK % 256 == 0 ? PARTS : 1;  // segments of a step that have scales in common
constexpr int SCALE_BYTES = FORMAT == E2M1 ? 1 : 2;
constexpr int row_scales(int columns) { return BLOCK > 0 ? columns / BLOCK : 1; }

// Where in the matrix of all experts' rows a tile's row is. Beyond the last there are none: the last.
template <bool UP>
__forceinline__ int matrix_row(const Tile& tile, int row) {
  if constexpr (UP)
    return tile.expert * 2 * INTERMEDIATE + row / 8 % 2 * INTERMEDIATE + tile.column * (ROWS / 2) + row / 16 * 8 + row % 8;
  else
    return tile.expert * HIDDEN + min(tile.column * ROWS + row, HIDDEN - 1);
}

// The scales of a thread's two rows of a tile.
template <int IN>
struct RowScales {
  const uint8_t *scales[2], *zeros[2];

  template <bool UP>
  static __forceinline__ RowScales of(const Scales& all, const Tile& tile, int first) {
    RowScales rows;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      int64_t at = int64_t(matrix_row<UP>(tile, first + 8 * i)) * row_scales(IN);
      rows.scales[i] = all.scales + at * SCALE_BYTES;
      rows.zeros[i] = all.extra + at;
    }
    return rows;
  }

  __forceinline__ RawScales load(int segment) const {
    RawScales raw;
    segment = min(segment, IN / SEGMENT - 1);
    int at = BLOCK > 0 ? segment * SEGMENT / (BLOCK + !BLOCK) : 0;
#pragma unroll
    for (int row = 0; row < 2; row++) {
      if constexpr (FORMAT == E2M1) {
        raw.words[row] = __ldg(reinterpret_cast<const uint32_t*>(scales[row] + at));
      } else {
        if (SCALED) raw.scales[row] = __ldg(reinterpret_cast<const uint16_t*>(scales[row]) + at);
        if (FORMAT == INT4_ASYMMETRIC) raw.zeros[row] = __ldg(reinterpret_cast<const signed char*>(zeros[row]) + at);
      }
    }
    return raw;
  }
};

// What a row's sums are multiplied by.
template <bool UP>
__forceinline__ float sum_scale(const Scales& all, const Tile& tile, int row) {
  if constexpr (FORMAT == E2M1)
    return LEFT_OVER * reinterpret_cast<const float*>(all.extra)[matrix_row<UP>(tile, row)];
  else if constexpr (SCALED)
    return 1;
  else
    return low_float(reinterpret_cast<const uint16_t*>(all.scales)[matrix_row<UP>(tile, row)]);
}

// Calls for a step's scales of a tile, 32 bytes at a time, lanes for the rows.
template <bool UP, int IN>
__forceinline__ void call_for_scales(const Scales& all, const Tile& tile, int step, int lane) {
  if constexpr (BLOCK > 0) {
    constexpr int SCALES_OF_STEP = SEGMENT * PARTS;  // times 1 / BLOCK
    constexpr int APART = 32 * BLOCK / (SCALES_OF_STEP * SCALE_BYTES), ZEROS_APART = 32 * BLOCK / SCALES_OF_STEP;
    if (step % (APART > 0 ? APART : 1) == 0)
#pragma unroll 1
      for (int row = lane; row < ROWS; row += 32) {
        int64_t at = int64_t(matrix_row<UP>(tile, row)) * row_scales(IN) + step * SCALES_OF_STEP / (BLOCK + !BLOCK);
        prefetch_line(all.scales + at * SCALE_BYTES);
        if (FORMAT == INT4_ASYMMETRIC && step % (ZEROS_APART > 0 ? ZEROS_APART : 1) == 0) prefetch_line(all.extra + at);
      }
  }
}

// The up product's results, silu(gate) * up, in the order in which the down product takes them. Of each warp, sums are of 8 rows of
// gate and, 8 below, of up: a thread's row is one of the warpgroup's 32 columns of results. Each goes to its place alone, to one of
// 4 chunks of 8 columns, which are 64 bytes of a token; those of two tokens are swapped for every other pair, so that a warp's
// elements are in different banks.
template <int N>
__forceinline__ void write_up(float (&d)[N / 2], uint32_t out, uint16_t* inner, const Tile& tile, float gate_scale, float up_scale,
                              int group, int thread) {
  constexpr int TOKENS = 128;  // at a time
  int warp = thread / 32, row = thread % 32 / 4, quad = thread % 4;
  int place = TWO_IN_A_BYTE ? row % 4 * 8 + warp * 2 + row / 4
                            : warp / 2 * 16 + row / 2 % 2 * 8 + warp % 2 * 4 + row / 4 * 2 + row % 2;
  uint32_t to = out + quad * 128 + place * 2, even = quad % 2 * 64, odd = 64 - even;
  int chunk = thread % 4, column = tile.column * (ROWS / 2) + group * 32 + chunk * 8;
#pragma unroll
  for (int part = 0; part < N; part += TOKENS) {
    named_sync(1 + group, 128);
#pragma unroll
    for (int j = 0; j < TOKENS; j += 8) {
      if (part + j < N) {
        constexpr int LAST = N / 2 - 4;
        int s = part / 2 + j / 2 < LAST ? part / 2 + j / 2 : LAST;
        store_element(to + j * 64 + even, silu(gate_scale * d[s]) * (up_scale * d[s + 2]));
        store_element(to + j * 64 + odd, silu(gate_scale * d[s + 1]) * (up_scale * d[s + 3]));
      }
    }
    named_sync(1 + group, 128);
    for (int token = thread / 4; token < min(min(TOKENS, N - part), tile.count - part); token += 32) {
      Chunk values = load_shared(out + token / 2 * 128 + ((token ^ token >> 1) & 1) * 64 + chunk * 16);
      *reinterpret_cast<Chunk*>(inner + int64_t(tile.row + part + token) * INTERMEDIATE + column) = values;
    }
  }
}

// A warpgroup's 64 rows of codes by the tile's N tokens.
template <bool UP, int IN, int N>
__forceinline__ void multiply(Rings& rings, uint32_t out, uint16_t* y, const Scales& scales, const Tile& tile, int group,
                              int thread) {
  constexpr int STEPS = (IN + SEGMENT * PARTS - 1) / (SEGMENT * PARTS);
  int warp = thread / 32, lane = thread % 32, first = group * (ROWS / 2) + warp * 16 + lane / 4;
  float d[N / 2];
#pragma unroll
  for (int i = 0; i < N / 2; i++) d[i] = 0;
  auto rows = RowScales<IN>::template of<UP>(scales, tile, first);
  RawScales raw[PARTS / SPAN];  // of a step's segments; each is read anew for the next step when it has been used
#pragma unroll
  for (int i = 0; i < PARTS / SPAN; i++) raw[i] = rows.load(i * SPAN);
  uint32_t fragments[2][2][4], words[4], tokens_before = 0;
  wait(rings.weights.full_barrier(), rings.weights.parity);
  load_codes(words, rings.weights.address() + group * (WEIGHT_BYTES / 2), 0, warp, lane);
  convert(fragments[0], words, 0, factors_of(raw[0], 0, lane % 4));
  for (int step = 0; step < STEPS; step++) {
#pragma unroll
    for (int piece = 0; piece < 2 * PARTS; piece++) {  // half a segment
      const int next = (piece + 1) % (2 * PARTS), half = next % 2, slot = next / 2 / SPAN;
      bool more = next > 0 || step + 1 < STEPS;
      if (more && (half == 0 || !TWO_IN_A_BYTE)) {
        if (next == 0) wait(rings.weights.full_barrier(), rings.weights.parity);
        load_codes(words, rings.weights.address() + group * (WEIGHT_BYTES / 2), TWO_IN_A_BYTE ? next / 2 : next, warp, lane);
      }
      if (piece % 2 == 0) wait(rings.tokens.full_barrier(), rings.tokens.parity);
      uint64_t b = rows_of_k(rings.tokens.address()) + piece % 2 * 4;
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < 2; k++) wgmma_rk<N>(d, fragments[piece % 2][k], b + 2 * k, 1);
      wgmma_commit();
      wgmma_wait<1>();
      hold(fragments[1 - piece % 2]);  // the products before these have read them
      if (piece % 2 == 0) {
        if ((step || piece) && lane == 0) arrive(tokens_before);
      } else {
        tokens_before = rings.tokens.empty_barrier();
        rings.tokens.next();
      }
      if (more) {
        hold(words);
        convert(fragments[1 - piece % 2], words, half, factors_of(raw[slot], half, lane % 4));
        if ((next + 1) % (2 * SPAN) == 0) raw[slot] = rows.load((step + 1) * PARTS + slot * SPAN);
        if (next == 2 * PARTS - 1) {
          if (lane == 0) arrive(rings.weights.empty_barrier());
          rings.weights.next();
        }
      }
    }
  }
  wgmma_wait<0>();
  hold(d);
  hold(fragments[0]);
  hold(fragments[1]);
  if (lane == 0) arrive(tokens_before);
  float scale = sum_scale<UP>(scales, tile, first), scale_below = sum_scale<UP>(scales, tile, first + 8);
  if constexpr (UP)
    write_up<N>(d, out, y, tile, scale, scale_below, group, thread);
  else
    write_down<N>(d, 0, out, y, tile, scale, scale_below, group, thread);
}

template <bool UP, int IN, int COLUMN_TILES>
__forceinline__ void experts(const TensorMap* codes, const TensorMap* tokens, const int* totals, const Scales& scales, uint16_t* y,
                             bool totals_are_late) {
  auto ahead = [&](const Tile& tile, int step, int lane) { call_for_scales<UP, IN>(scales, tile, step, lane); };
  auto consume = [&](Shared& shared, Rings rings, uint32_t out, int group, int thread, int count) {
    for (int turn = 0, index; (index = tile_index(turn)) < count; turn++) {
      Tile tile = locate(shared.experts, index);
#define WIDTH(n) \
  if (tile.width <= n) multiply<UP, IN, n>(rings, out, y, scales, tile, group, thread)
      // With more widths the assembler finds too few registers for any. What lies behind a tile's tokens, in its ring or behind
      // that, comes to nothing.
      WIDTH(16);
      else WIDTH(32);
      else WIDTH(64);
      else WIDTH(128);
      else WIDTH(192);
      else if constexpr (WIDEST > 192) WIDTH(256);
#undef WIDTH
    }
  };
  constexpr int STEPS = (IN + SEGMENT * PARTS - 1) / (SEGMENT * PARTS);
  run<UP, STEPS, PARTS, COLUMN_TILES>(codes, tokens, totals, totals_are_late, ahead, consume);
}

#ifdef COMPILE_grouped_codes_up
// `sorted_x [R, H]`, codes `gate_up [L, 2F, H]` → `inner [R, F]`, silu(gate) * up. `scales [L * 2F]` or `[L * 2F, H / BLOCK]`, and
// what `Scales` says of `extra`. `totals [L]`: rows per expert, which lie one expert's behind the other's.
extern "C" __global__ void __launch_bounds__(384, 1)
    grouped_codes_up(const __grid_constant__ TensorMap gate_up, const __grid_constant__ TensorMap sorted_x, const int* totals,
                     const uint8_t* scales, const uint8_t* extra, uint16_t* inner) {
  experts<true, HIDDEN, INTERMEDIATE / (ROWS / 2)>(&gate_up, &sorted_x, totals, {scales, extra}, inner, true);
}
#endif

#ifdef COMPILE_grouped_codes_down
// `inner [R, F]`, codes `down [L, H, F]` → `results [R, H]`.
extern "C" __global__ void __launch_bounds__(384, 1)
    grouped_codes_down(const __grid_constant__ TensorMap down, const __grid_constant__ TensorMap inner, const int* totals,
                       const uint8_t* scales, const uint8_t* extra, uint16_t* results) {
  experts<false, INTERMEDIATE, (HIDDEN + ROWS - 1) / ROWS>(&down, &inner, totals, {scales, extra}, results, false);
}
#endif

#ifdef COMPILE_linear_codes
// `x [R, F]`, codes `weights [1, H, F]` → `y [R, H]`. `totals [1]`: R.
extern "C" __global__ void __launch_bounds__(384, 1)
    linear_codes(const __grid_constant__ TensorMap weights, const __grid_constant__ TensorMap x, const int* totals,
                 const uint8_t* scales, const uint8_t* extra, uint16_t* y) {
  experts<false, INTERMEDIATE, (HIDDEN + ROWS - 1) / ROWS>(&weights, &x, totals, {scales, extra}, y, true);
}
#endif
