// Experts on many tokens, for SM 9.0: persistent grouped matrix products over rows sorted by expert.
//
// The weights are the left operand and the tokens the right one, whose width may be any multiple of 16: an expert's rows are cut
// into equal tiles of at most 256, and little is computed in vain whatever their number. One warp fetches tiles by the copy
// engine, two warpgroups multiply 64 rows of weights each. Tiles are handed out by a counter, those of wide experts first.
//
// Macros: HIDDEN, INTERMEDIATE, LOCAL experts, ELEMENT_IS_BFLOAT16. Shapes: R rows, H hidden, F intermediate, L local experts.

#include "wgmma.cuh"

constexpr int ROWS = 128;      // of weights in a tile
constexpr int COLUMNS = 64;    // of a step
constexpr int WIDEST = 256;    // tokens in a tile
constexpr int BOX = 32;        // tokens that are fetched at once
constexpr int STAGES = 4;
constexpr int WEIGHT_BYTES = ROWS * COLUMNS * 2;
constexpr int STAGE_BYTES = WEIGHT_BYTES + WIDEST * COLUMNS * 2;
constexpr int GROUP_OUT_BYTES = 16384;  // a warpgroup's results on their way to memory
constexpr int CONSUMERS = 256;
constexpr int RING = 2;

struct Experts {  // with rows here, those with the widest tiles first
  int expert[LOCAL], row[LOCAL], count[LOCAL], tiles[LOCAL], width[LOCAL], first[LOCAL + 1];
};

struct Shared {
  uint64_t full[STAGES], empty[STAGES], given[RING], taken[RING];
  int tile[RING];
  Experts experts;
};

struct Tile {
  int expert, column, row, count, width, tiles;  // column: of tiles; row: the first one; count: rows that are the expert's
};

__forceinline__ Tile locate(const Experts& experts, int index) {
  int s = 0;
  while (s + 1 < LOCAL && experts.first[s + 1] <= index) s++;
  int inside = index - experts.first[s], tiles = experts.tiles[s], width = experts.width[s];
  int before = inside % tiles * width;
  return {experts.expert[s], inside / tiles, experts.row[s] + before, min(width, experts.count[s] - before), width, tiles};
}

// Few tokens wait for memory, not for products: so their tiles are of fewer widths.
__forceinline__ int tile_width(int tokens) {
  int step = tokens <= 16 || tokens > 128 ? 16 : 32;
  return (tokens + step - 1) / step * step;
}

// One thread: which expert's tiles come where; `column_tiles` for each tile of rows.
__forceinline__ void plan(Experts& experts, const int* totals, int column_tiles) {
  int row = 0;
  for (int e = 0; e < LOCAL; e++) {
    int count = totals[e], tiles = (count + WIDEST - 1) / WIDEST;
    int width = tiles ? tile_width((count + tiles - 1) / tiles) : 0;
    int s = e;
    for (; s > 0 && experts.width[s - 1] < width; s--) {
      experts.expert[s] = experts.expert[s - 1];
      experts.row[s] = experts.row[s - 1];
      experts.count[s] = experts.count[s - 1];
      experts.tiles[s] = experts.tiles[s - 1];
      experts.width[s] = experts.width[s - 1];
    }
    experts.expert[s] = e, experts.row[s] = row, experts.count[s] = count, experts.tiles[s] = tiles, experts.width[s] = width;
    row += count;
  }
  experts.first[0] = 0;
  for (int s = 0; s < LOCAL; s++) experts.first[s + 1] = experts.first[s] + experts.tiles[s] * column_tiles;
}

struct Position {  // in the ring of stages
  int stage = 0;
  uint32_t parity = 0;
  __forceinline__ void next() {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
};

__forceinline__ float silu(float x) { return __fdividef(x, 1.0f + __expf(-x)); }

// The up product's results: of each warp, sums of 8 rows of gate and, 8 below, of up.
template <int N>
__forceinline__ void write_up(float (&d)[N / 2], uint32_t out, uint16_t* inner, const Tile& tile, int group, int thread) {
  int warp = thread / 32, lane = thread % 32;
  named_sync(1 + group, 128);
#pragma unroll
  for (int j = 0; j < N / 8; j += 2) {
    uint32_t pairs[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      float* s = d + 4 * (j + i);
      pairs[i] = to_pair(silu(s[0]) * s[2], silu(s[1]) * s[3]);
    }
    int token = 8 * j + lane % 16;
    store_transposed(out + token * 64 + (warp ^ (token >> 1 & 3)) * 16, pairs[0], pairs[1]);
  }
  named_sync(1 + group, 128);
  int chunk = thread % 4, column = tile.column * (ROWS / 2) + group * 32 + chunk * 8;
  if (column < INTERMEDIATE)
    for (int token = thread / 4; token < tile.count; token += 32) {
      Chunk values = load_shared(out + token * 64 + (chunk ^ (token >> 1 & 3)) * 16);
      *reinterpret_cast<Chunk*>(inner + int64_t(tile.row + token) * INTERMEDIATE + column) = values;
    }
}

template <int N>
__forceinline__ void write_down(float (&d)[N / 2], uint32_t out, uint16_t* results, const Tile& tile, int group, int thread) {
  constexpr int TOKENS = 128;  // at a time
  int warp = thread / 32, lane = thread % 32;
  int chunk = thread % 8, column = tile.column * ROWS + group * 64 + chunk * 8;
#pragma unroll
  for (int first = 0; first < N; first += TOKENS) {
    named_sync(1 + group, 128);
#pragma unroll
    for (int j = 0; j < TOKENS; j += 16) {
      if (first + j < N) {
        constexpr int LAST = N / 2 - 8;
        int s = first / 2 + j / 2 < LAST ? first / 2 + j / 2 : LAST, token = j + lane / 16 * 8 + lane % 8;
        store_transposed(out + token * 128 + ((2 * warp + lane / 8 % 2) ^ (token & 7)) * 16, to_pair(d[s], d[s + 1]),
                         to_pair(d[s + 2], d[s + 3]), to_pair(d[s + 4], d[s + 5]), to_pair(d[s + 6], d[s + 7]));
      }
    }
    named_sync(1 + group, 128);
    if (column < HIDDEN)
      for (int token = thread / 8; token < min(TOKENS, tile.count - first); token += 16) {
        Chunk values = load_shared(out + token * 128 + (chunk ^ (token & 7)) * 16);
        *reinterpret_cast<Chunk*>(results + int64_t(tile.row + first + token) * HIDDEN + column) = values;
      }
  }
}

// A warpgroup's 64 rows of weights by the tile's tokens.
template <bool UP, int STEPS, int N>
__forceinline__ void multiply(Shared& shared, uint32_t stages, uint32_t out, Position& at, uint16_t* y, const Tile& tile, int group,
                     int thread) {
  float d[N / 2];
#pragma unroll
  for (int i = 0; i < N / 2; i++) d[i] = 0;
  uint32_t full = shared_address(shared.full), empty = shared_address(shared.empty);
  int before = 0;
  for (int step = 0; step < STEPS; step++) {
    wait(full + 8 * at.stage, at.parity);
    uint32_t weights = stages + at.stage * STAGE_BYTES;
    uint64_t a = rows_of_k(weights + group * (WEIGHT_BYTES / 2)), b = rows_of_k(weights + WEIGHT_BYTES);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < COLUMNS / 16; k++) wgmma<N>(d, a + 2 * k, b + 2 * k, 1);
    wgmma_commit();
    wgmma_wait<1>();
    if (step && thread % 32 == 0) arrive(empty + 8 * before);
    before = at.stage;
    at.next();
  }
  wgmma_wait<0>();
  hold(d);
  if (thread % 32 == 0) arrive(empty + 8 * before);
  if constexpr (UP)
    write_up<N>(d, out, y, tile, group, thread);
  else
    write_down<N>(d, out, y, tile, group, thread);
}

template <bool UP, int STEPS>
__forceinline__ void consume(Shared& shared, uint32_t stages, uint32_t outs, uint16_t* y, int group, int thread, int count) {
  uint32_t given = shared_address(shared.given), taken = shared_address(shared.taken);
  uint32_t out = outs + group * GROUP_OUT_BYTES;
  Position at;
  for (int turn = 0;; turn++) {
    int slot = turn % RING;
    wait(given + 8 * slot, turn / RING & 1);
    int index = *static_cast<volatile int*>(shared.tile + slot);
    arrive(taken + 8 * slot);
    if (index >= count) break;
    Tile tile = locate(shared.experts, index);
#define WIDTH(n) \
  case n: multiply<UP, STEPS, n>(shared, stages, out, at, y, tile, group, thread); break;
    switch (tile.width) {
      WIDTH(16) WIDTH(32) WIDTH(64) WIDTH(96) WIDTH(128)
      WIDTH(144) WIDTH(160) WIDTH(176) WIDTH(192) WIDTH(208) WIDTH(224) WIDTH(240) WIDTH(256)
    }
#undef WIDTH
  }
}

template <bool UP, int STEPS>
__forceinline__ void produce(Shared& shared, uint32_t stages, const TensorMap* weights, const TensorMap* tokens, int* counter,
                    int count) {
  uint32_t full = shared_address(shared.full), empty = shared_address(shared.empty);
  uint32_t given = shared_address(shared.given), taken = shared_address(shared.taken);
  Position at;
  int index = atomicAdd(counter, 1);
  for (int turn = 0;; turn++) {
    int slot = turn % RING;
    wait(taken + 8 * slot, (turn / RING & 1) ^ 1);
    *static_cast<volatile int*>(shared.tile + slot) = index;
    arrive(given + 8 * slot);
    if (index >= count) break;
    Tile tile = locate(shared.experts, index);
    index = atomicAdd(counter, 1);
    int boxes = (tile.width + BOX - 1) / BOX;
    uint64_t policy = tile.tiles > 1 ? EVICT_NORMAL : EVICT_FIRST;
    for (int step = 0; step < STEPS; step++) {
      wait(empty + 8 * at.stage, at.parity ^ 1);
      uint32_t to = stages + at.stage * STAGE_BYTES, barrier = full + 8 * at.stage;
      arrive_expecting(barrier, WEIGHT_BYTES + boxes * (BOX * COLUMNS * 2));
      if constexpr (UP)  // groups of 8 rows of gate and of up by turns
        load_box(to, weights, barrier, policy, step * COLUMNS, 0, 0, tile.column * (ROWS / 16), tile.expert);
      else
        load_box(to, weights, barrier, policy, step * COLUMNS, tile.column * ROWS, tile.expert);
      for (int box = 0; box < boxes; box++)
        load_box(to + WEIGHT_BYTES + box * (BOX * COLUMNS * 2), tokens, barrier, EVICT_LAST, step * COLUMNS,
                 tile.row + box * BOX);
      at.next();
    }
  }
}

template <bool UP, int STEPS, int COLUMN_TILES>
__forceinline__ void run(const TensorMap* weights, const TensorMap* tokens, const int* totals, int* counter, uint16_t* y) {
  extern __shared__ char memory[];
  uint32_t stages = (shared_address(memory) + 1023) & ~1023u;
  char* begin = memory + (stages - shared_address(memory));
  uint32_t outs = stages + STAGES * STAGE_BYTES;
  Shared& shared = *reinterpret_cast<Shared*>(begin + STAGES * STAGE_BYTES + 2 * GROUP_OUT_BYTES);
  int group = threadIdx.x / 128, thread = threadIdx.x % 128;
  if (threadIdx.x == 0) {
    prefetch(weights);
    prefetch(tokens);
    for (int i = 0; i < STAGES; i++) {
      barrier_init(shared_address(shared.full + i), 1);
      barrier_init(shared_address(shared.empty + i), CONSUMERS / 32);
    }
    for (int i = 0; i < RING; i++) {
      barrier_init(shared_address(shared.given + i), 1);
      barrier_init(shared_address(shared.taken + i), CONSUMERS);
    }
    barrier_init_fence();
  }
  let_next_start();
  wait_for_previous();
  if (threadIdx.x == 0) plan(shared.experts, totals, COLUMN_TILES);
  __syncthreads();
  int count = shared.experts.first[LOCAL];
  if (group == 0) {
    fewer_registers<40>();
    if (thread == 0) produce<UP, STEPS>(shared, stages, weights, tokens, counter, count);
  } else {
    more_registers<232>();
    consume<UP, STEPS>(shared, stages, outs, y, group - 1, thread, count);
  }
}

#ifdef COMPILE_grouped_up
// `sorted_x [R, H]`, `gate_up [L, 2F, H]` → `inner [R, F]`, silu(gate) * up. `totals [L]`: rows per expert, which lie one
// expert's behind the other's; `counter` is 0 when it starts.
extern "C" __global__ void __launch_bounds__(384, 1)
    grouped_up(const __grid_constant__ TensorMap gate_up, const __grid_constant__ TensorMap sorted_x, const int* totals,
               int* counter, uint16_t* inner) {
  run<true, (HIDDEN + COLUMNS - 1) / COLUMNS, (INTERMEDIATE + ROWS / 2 - 1) / (ROWS / 2)>(&gate_up, &sorted_x, totals, counter,
                                                                                       inner);
}

#endif

#ifdef COMPILE_grouped_down
// `inner [R, F]`, `down [L, H, F]` → `results [R, H]`.
extern "C" __global__ void __launch_bounds__(384, 1)
    grouped_down(const __grid_constant__ TensorMap down, const __grid_constant__ TensorMap inner, const int* totals, int* counter,
                 uint16_t* results) {
  run<false, (INTERMEDIATE + COLUMNS - 1) / COLUMNS, (HIDDEN + ROWS - 1) / ROWS>(&down, &inner, totals, counter, results);
}
#endif
