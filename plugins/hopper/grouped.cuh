// What persistent products of grouped rows share: experts' weights are the left operand and the tokens the right one, whose
// width may be any multiple of 16: an expert's rows are cut into equal tiles of at most WIDEST, and little is computed in vain
// whatever their number. One warp fetches weights by the copy engine and one tokens, each into a ring of its own, so that neither
// waits for the other's stages. Two warpgroups multiply 64 rows of weights each. Tiles of wide experts come first.
//
// Before it: LOCAL, HIDDEN, constants COLUMNS of a step, which take 128 bytes of a token's row, and WIDEST, at most 288. A step
// of weights, 128 bytes of a row of codes, may be of more columns: PARTS steps of tokens go with it.
#pragma once

#include "wgmma.cuh"

constexpr int ROWS = 128;              // of weights in a tile
constexpr int BOX = 32;                // tokens that are fetched at once
constexpr int STEP_BYTES = 128;        // of a row
constexpr int WEIGHT_BYTES = ROWS * STEP_BYTES;
constexpr int BOX_BYTES = BOX * STEP_BYTES;
constexpr int GROUP_OUT_BYTES = 8192;  // a warpgroup's results on their way to memory
constexpr int RING_BYTES = 212992;     // of weights and tokens
constexpr int MOST_STAGES = 10;
constexpr int CONSUMERS = 8;  // warps

struct Experts {  // with rows here, those with the widest tiles first
  int expert[LOCAL], row[LOCAL], count[LOCAL], tiles[LOCAL], width[LOCAL], first[LOCAL + 1];
};

struct Ring {
  uint64_t full[MOST_STAGES], empty[MOST_STAGES];
};

struct Shared {
  Ring weights, tokens;
  Experts experts;
};

// A ring as one warp goes through it.
struct Cursor {
  uint32_t full, empty, memory, bytes;
  int stages, stage;
  uint32_t parity;
  __forceinline__ uint32_t full_barrier() const { return full + 8 * stage; }
  __forceinline__ uint32_t empty_barrier() const { return empty + 8 * stage; }
  __forceinline__ uint32_t address() const { return memory + stage * bytes; }
  __forceinline__ void next() {
    if (++stage == stages) stage = 0, parity ^= 1;
  }
};

struct Rings {
  Cursor weights, tokens;
};

// If the widest tile has `width` tokens: as many stages of them as leave room for as many of weights. A stage of tokens is on its
// way for longer than a step takes, though the cache has it.
template <int PARTS>
__forceinline__ Rings make_rings(Shared& shared, uint32_t memory, int width) {
  int bytes = (width + BOX - 1) / BOX * BOX_BYTES, tokens = min(MOST_STAGES, RING_BYTES / (bytes + WEIGHT_BYTES / PARTS));
  int weights = min(MOST_STAGES, (RING_BYTES - tokens * bytes) / WEIGHT_BYTES);
  return {{shared_address(shared.weights.full), shared_address(shared.weights.empty), memory, WEIGHT_BYTES, weights, 0, 0},
          {shared_address(shared.tokens.full), shared_address(shared.tokens.empty), memory + weights * WEIGHT_BYTES,
           uint32_t(bytes), tokens, 0, 0}};
}

struct Tile {
  int expert, column, row, count, width, tiles;  // column: of tiles; row: the first one; count: rows that are the expert's
};

// A program's tile of a turn. Every other turn runs backwards: who had a wide tile gets a narrow one.
__forceinline__ int tile_index(int turn) {
  return turn * gridDim.x + (turn % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
}

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

__forceinline__ float silu(float x) { return __fdividef(x, 1.0f + __expf(-x)); }

// Of each row of weights the product with the tile's tokens from `first` on, to `results [rows, HIDDEN]`. `scale` is of a
// thread's row, `scale_below` of the one 8 rows below.
template <int N>
__forceinline__ void write_down(float (&d)[N / 2], int first, uint32_t out, uint16_t* results, const Tile& tile, float scale,
                                float scale_below, int group, int thread) {
  constexpr int TOKENS = 64;  // at a time
  int warp = thread / 32, lane = thread % 32;
  int chunk = thread % 8, column = tile.column * ROWS + group * 64 + chunk * 8;
#pragma unroll
  for (int part = 0; part < N; part += TOKENS) {
    named_sync(1 + group, 128);
#pragma unroll
    for (int j = 0; j < TOKENS; j += 16) {
      if (part + j < N) {
        constexpr int LAST = N / 2 - 8;
        int s = part / 2 + j / 2 < LAST ? part / 2 + j / 2 : LAST, token = j + lane / 16 * 8 + lane % 8;
        store_transposed(out + token * 128 + ((2 * warp + lane / 8 % 2) ^ (token & 7)) * 16,
                         to_pair(scale * d[s], scale * d[s + 1]), to_pair(scale_below * d[s + 2], scale_below * d[s + 3]),
                         to_pair(scale * d[s + 4], scale * d[s + 5]), to_pair(scale_below * d[s + 6], scale_below * d[s + 7]));
      }
    }
    named_sync(1 + group, 128);
    if (column < HIDDEN)
      for (int token = thread / 8; token < min(min(TOKENS, N - part), tile.count - first - part); token += 16) {
        Chunk values = load_shared(out + token * 128 + (chunk ^ (token & 7)) * 16);
        *reinterpret_cast<Chunk*>(results + int64_t(tile.row + first + part + token) * HIDDEN + column) = values;
      }
  }
}

// A whole warp does it, or its first lane alone; `ahead(tile, step, lane)` is what it does besides when the step's weights are on
// their way. STEP: a step's elements, as the tensor map counts them.
template <bool UP, int STEPS, int STEP, bool WHOLE_WARP, class Ahead>
__forceinline__ void fetch_weights(Shared& shared, Cursor ring, const TensorMap* weights, int count, int lane, Ahead ahead) {
  for (int turn = 0, index; (index = tile_index(turn)) < count; turn++) {
    Tile tile = locate(shared.experts, index);
    uint64_t policy = tile.tiles > 1 ? EVICT_NORMAL : EVICT_FIRST;
    for (int step = 0; step < STEPS; step++, ring.next()) {
      wait(ring.empty_barrier(), ring.parity ^ 1);
      if (lane == 0) {
        arrive_expecting(ring.full_barrier(), WEIGHT_BYTES);
        if constexpr (UP)  // groups of 8 rows of gate and of up by turns
          load_box(ring.address(), weights, ring.full_barrier(), policy, step * STEP, 0, 0, tile.column * (ROWS / 16),
                   tile.expert);
        else
          load_box(ring.address(), weights, ring.full_barrier(), policy, step * STEP, tile.column * ROWS, tile.expert);
      }
      ahead(tile, step, lane);
      if constexpr (WHOLE_WARP) __syncwarp();  // no lane may wait for what the others have left a whole ring behind
    }
  }
}

template <int STEPS>
__forceinline__ void fetch_tokens(Shared& shared, Cursor ring, const TensorMap* tokens, int count) {
  for (int turn = 0, index; (index = tile_index(turn)) < count; turn++) {
    Tile tile = locate(shared.experts, index);
    int boxes = (tile.width + BOX - 1) / BOX;
    for (int step = 0; step < STEPS; step++, ring.next()) {
      wait(ring.empty_barrier(), ring.parity ^ 1);
      arrive_expecting(ring.full_barrier(), boxes * BOX_BYTES);
      for (int box = 0; box < boxes; box++)
        load_box(ring.address() + box * BOX_BYTES, tokens, ring.full_barrier(), EVICT_LAST, step * COLUMNS,
                 tile.row + box * BOX);
    }
  }
}

// `consume(shared, rings, out, group, thread, count)` is what each of the two warpgroups does with `count` tiles. If
// `totals_are_late`, the launch before this one writes `totals`; else they are there when it starts. STEPS: of weights.
template <bool UP, int STEPS, int PARTS, int COLUMN_TILES, int STEP = STEP_BYTES, bool WHOLE_WARP = true, class Ahead,
          class Consume>
__forceinline__ void run(const TensorMap* weights, const TensorMap* tokens, const int* totals, bool totals_are_late, Ahead ahead,
                         Consume consume) {
  extern __shared__ char memory[];
  uint32_t ring = (shared_address(memory) + 1023) & ~1023u, outs = ring + RING_BYTES;
  Shared& shared = *reinterpret_cast<Shared*>(memory + (outs + 2 * GROUP_OUT_BYTES - shared_address(memory)));
  int group = threadIdx.x / 128, thread = threadIdx.x % 128;
  if (threadIdx.x == 0) {
    prefetch(weights);
    prefetch(tokens);
    for (int i = 0; i < MOST_STAGES; i++)
      for (Ring* ring : {&shared.weights, &shared.tokens}) {
        barrier_init(shared_address(ring->full + i), 1);
        barrier_init(shared_address(ring->empty + i), CONSUMERS);
      }
    barrier_init_fence();
  }
  if (totals_are_late) wait_for_previous();
  let_next_start();
  if (threadIdx.x == 0) plan(shared.experts, totals, COLUMN_TILES);
  __syncthreads();
  int count = shared.experts.first[LOCAL];
  Rings rings = make_rings<PARTS>(shared, ring, shared.experts.width[0]);
  if (group == 0) {
    fewer_registers<40>();
    if (thread < (WHOLE_WARP ? 32 : 1))
      fetch_weights<UP, STEPS, STEP, WHOLE_WARP>(shared, rings.weights, weights, count, WHOLE_WARP ? thread : 0, ahead);
    if (thread == 32) {
      wait_for_previous();
      fetch_tokens<STEPS * PARTS>(shared, rings.tokens, tokens, count);
    }
  } else {
    more_registers<232>();
    wait_for_previous();  // what it computed may stand where this launch's results go
    consume(shared, rings, outs + (group - 1) * GROUP_OUT_BYTES, group - 1, thread, count);
  }
}

template <bool UP, int STEPS, int COLUMN_TILES, class Consume>
__forceinline__ void run(const TensorMap* weights, const TensorMap* tokens, const int* totals, bool totals_are_late,
                         Consume consume) {
  auto nothing = [](const Tile&, int, int) {};
  run<UP, STEPS, 1, COLUMN_TILES, COLUMNS, false>(weights, tokens, totals, totals_are_late, nothing, consume);
}
