// Causal grouped-query attention of many new tokens over a cache that holds them, for SM 9.0: FlashAttention-3 (Shah et al. 2024,
// arXiv:2407.08608) with rotary embedding of the queries and any positions.
//
// Persistent programs; a tile is 128 tokens of a head, those that see most first. One warp fetches keys and values by the copy
// engine; three rotate the next tile's queries; two warpgroups take 64 tokens each, whose products run beside the softmax of
// the step before, and beside the other group's.
//
// Macros: HEADS, KV_HEADS, HEAD_DIM (up to 128, a multiple of 16), WINDOW, ELEMENT_IS_BFLOAT16.
// Shapes: B batch, S new tokens, N heads, KV key-value heads, D head size.

#include "wgmma.cuh"

constexpr int TOKENS = 128;  // of a tile
constexpr int SLOTS = 128;   // of a step
constexpr int WIDTH = HEAD_DIM <= 64 ? 64 : 128;
constexpr int HALF_BYTES = 128 * 128;  // 64 columns of 128 rows
constexpr int BLOCK_BYTES = WIDTH / 64 * HALF_BYTES;
constexpr int STAGES = 2;
constexpr int ROTATORS = 96;
constexpr int CHUNKS = WIDTH / 8;

#include "prefill_softmax.cuh"

struct Range {  // positions of a tile's tokens
  int lowest, highest;
  __forceinline__ int first() const { return WINDOW > 0 ? max(lowest - WINDOW + 1, 0) / SLOTS : 0; }
  __forceinline__ int last() const { return highest / SLOTS; }
  // whether some token does not see some slot of step `j`
  __forceinline__ bool partial(int j) const {
    return j * SLOTS + SLOTS - 1 > lowest || (WINDOW > 0 && j * SLOTS <= highest - WINDOW);
  }
};

struct Shared {
  uint64_t key_full[STAGES], key_empty[STAGES], value_full[STAGES], value_empty[STAGES];
  uint64_t query_full[2], query_empty[2], range_full[2];
  Range range[2];
  int position[2][TOKENS];
};

struct Sizes {
  int batch, length, slots;
};

struct Tile {
  int sequence, head, token;  // the first one
};

// The tile of a program's turn; every other turn runs backwards, so that no program always gets the longer ones.
__forceinline__ int tile_index(int turn) {
  int place = turn % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
  return turn * gridDim.x + place;
}
__forceinline__ int tile_count(const Sizes& sizes) { return (sizes.length + TOKENS - 1) / TOKENS * sizes.batch * HEADS; }
__forceinline__ Tile locate(int index, const Sizes& sizes) {
  int wide = sizes.batch * HEADS, block = (sizes.length + TOKENS - 1) / TOKENS - 1 - index / wide;
  return {index % wide / HEADS, index % HEADS, block * TOKENS};
}

struct Position {  // in a ring of stages
  int stage = 0;
  uint32_t parity = 0;
  __forceinline__ void next() {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
};

// Rows past the end see what the tile's first row sees, and are not written.
__forceinline__ int position_of(const int64_t* positions, const Tile& tile, int row, const Sizes& sizes) {
  int token = tile.token + row < sizes.length ? tile.token + row : tile.token;
  return max(0, min(int(positions[int64_t(tile.sequence) * sizes.length + token]), sizes.slots - 1));
}

__forceinline__ void fetch(Shared& shared, uint32_t keys_at, uint32_t values_at, const TensorMap* keys, const TensorMap* values,
                  const int64_t* positions, const Sizes& sizes, int lane) {
  Position at;
  int count = tile_count(sizes);
  for (int turn = 0, index; (index = tile_index(turn)) < count; turn++) {
    Tile tile = locate(index, sizes);
    Range range = {0x7FFFFFFF, 0};
    for (int row = lane; row < TOKENS; row += 32) {
      int position = position_of(positions, tile, row, sizes);
      range.lowest = min(range.lowest, position);
      range.highest = max(range.highest, position);
    }
    for (int step = 16; step; step /= 2) {
      range.lowest = min(range.lowest, __shfl_xor_sync(~0u, range.lowest, step));
      range.highest = max(range.highest, __shfl_xor_sync(~0u, range.highest, step));
    }
    if (lane) continue;
    int buffer = turn % 2;
    wait(shared_address(shared.query_empty + buffer), (turn / 2 & 1) ^ 1);
    shared.range[buffer] = range;
    arrive(shared_address(shared.range_full + buffer));
    int row = tile.sequence * KV_HEADS + tile.head / (HEADS / KV_HEADS);
    for (int j = range.last(); j >= range.first(); j--) {
      uint32_t to = keys_at + at.stage * BLOCK_BYTES, full = shared_address(shared.key_full + at.stage);
      wait(shared_address(shared.key_empty + at.stage), at.parity ^ 1);
      arrive_expecting(full, BLOCK_BYTES);
      for (int half = 0; half < WIDTH / 64; half++)
        load_box(to + half * HALF_BYTES, keys, full, EVICT_LAST, half * 64, j * SLOTS, row);
      to = values_at + at.stage * BLOCK_BYTES, full = shared_address(shared.value_full + at.stage);
      wait(shared_address(shared.value_empty + at.stage), at.parity ^ 1);
      arrive_expecting(full, BLOCK_BYTES);
      for (int half = 0; half < WIDTH / 64; half++)
        load_box(to + half * HALF_BYTES, values, full, EVICT_LAST, half * 64, j * SLOTS, row);
      at.next();
    }
  }
}

__forceinline__ Chunk load_global(const uint16_t* pointer) { return *reinterpret_cast<const Chunk*>(pointer); }

// x * cos + turned * sin of 8 elements
__forceinline__ Chunk rotated(const Chunk& x, const Chunk& turned, const Chunk& cos, const Chunk& sin, float sign) {
  Chunk y;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    float low = low_float(x.words[i]) * low_float(cos.words[i]) + sign * low_float(turned.words[i]) * low_float(sin.words[i]);
    float high =
        high_float(x.words[i]) * high_float(cos.words[i]) + sign * high_float(turned.words[i]) * high_float(sin.words[i]);
    y.words[i] = to_pair(low, high);
  }
  return y;
}

__forceinline__ void rotate(Shared& shared, uint32_t queries_at, const uint16_t* query, const uint16_t* cos, const uint16_t* sin,
                   const int64_t* positions, const Sizes& sizes, int thread) {
  constexpr int TURNED = HEAD_DIM / 16;  // chunks of half a head
  int count = tile_count(sizes);
  for (int turn = 0, index; (index = tile_index(turn)) < count; turn++) {
    Tile tile = locate(index, sizes);
    int buffer = turn % 2;
    uint32_t block = queries_at + buffer * BLOCK_BYTES;
    wait(shared_address(shared.query_empty + buffer), (turn / 2 & 1) ^ 1);
    for (int row = thread; row < TOKENS; row += ROTATORS)
      shared.position[buffer][row] = position_of(positions, tile, row, sizes);
    for (int item = thread; item < TOKENS * TURNED; item += ROTATORS) {
      int row = item / TURNED, chunk = item % TURNED;
      Chunk low = {}, high = {};
      if (tile.token + row < sizes.length) {
        int64_t token = int64_t(tile.sequence) * sizes.length + tile.token + row;
        const uint16_t* x = query + (token * HEADS + tile.head) * HEAD_DIM + chunk * 8;
        int64_t angle = token * HEAD_DIM + chunk * 8;
        Chunk first = load_global(x), second = load_global(x + HEAD_DIM / 2);
        low = rotated(first, second, load_global(cos + angle), load_global(sin + angle), -1);
        angle += HEAD_DIM / 2;
        high = rotated(second, first, load_global(cos + angle), load_global(sin + angle), 1);
      }
      store_shared(chunk_address(block, row, chunk, HALF_BYTES), low);
      store_shared(chunk_address(block, row, chunk + TURNED, HALF_BYTES), high);
    }
    if constexpr (HEAD_DIM < WIDTH)
      for (int item = thread; item < TOKENS * (CHUNKS - HEAD_DIM / 8); item += ROTATORS)
        store_shared(chunk_address(block, item % TOKENS, HEAD_DIM / 8 + item / TOKENS, HALF_BYTES), Chunk{});
    publish_shared();
    arrive(shared_address(shared.query_full + buffer));
  }
}

__forceinline__ void multiply_keys(float (&scores)[SLOTS / 2], uint32_t queries, uint32_t keys) {
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < WIDTH / 16; k++) {
    int offset = k / 4 * HALF_BYTES + k % 4 * 32;
    wgmma<SLOTS>(scores, rows_of_k(queries + offset), rows_of_k(keys + offset), k > 0);
  }
  wgmma_commit();
}
__forceinline__ void multiply_values(float (&mix)[WIDTH / 2], const uint32_t (&shares)[SLOTS / 16][4], uint32_t values) {
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < SLOTS / 16; k++)
    wgmma_rs<WIDTH>(mix, shares[k], columns_adjacent(values + k * 16 * 128, HALF_BYTES), 1);
  wgmma_commit();
}

// The tile's results of a warpgroup, through the rows of shared memory that held its queries.
__forceinline__ void write(const float (&mix)[WIDTH / 2], const Rows& rows, uint32_t block, uint16_t* output, const Tile& tile,
                  const Sizes& sizes, int group, int thread) {
  int warp = thread / 32, lane = thread % 32, first = group * 64 + warp * 16;
  float part[2];
#pragma unroll
  for (int r = 0; r < 2; r++) {
    float total = quad_sum(rows.total[r]);
    part[r] = total > 0 ? 1.0f / total : 0.0f;
  }
  named_sync(1 + group, 128);  // all of the group's products are done
#pragma unroll
  for (int i = 0; i < WIDTH / 2; i += 8) {
    uint32_t to = chunk_address(block, first + lane / 8 % 2 * 8 + lane % 8, i / 4 + lane / 16, HALF_BYTES);
    store_matrices(to, to_pair(mix[i] * part[0], mix[i + 1] * part[0]), to_pair(mix[i + 2] * part[1], mix[i + 3] * part[1]),
                   to_pair(mix[i + 4] * part[0], mix[i + 5] * part[0]), to_pair(mix[i + 6] * part[1], mix[i + 7] * part[1]));
  }
  __syncwarp();
  for (int item = lane; item < 16 * CHUNKS; item += 32) {
    int row = first + item / CHUNKS, chunk = item % CHUNKS, token = tile.token + row;
    if (token < sizes.length && chunk < HEAD_DIM / 8) {
      int64_t at = (int64_t(tile.sequence) * sizes.length + token) * HEADS + tile.head;
      *reinterpret_cast<Chunk*>(output + at * HEAD_DIM + chunk * 8) = load_shared(chunk_address(block, row, chunk, HALF_BYTES));
    }
  }
  __syncwarp();
}

__forceinline__ void attend(Shared& shared, uint32_t queries_at, uint32_t keys_at, uint32_t values_at, uint16_t* output,
                   const Sizes& sizes, float scale, int group, int thread) {
  int lane = thread % 32, row = group * 64 + thread / 32 * 16 + lane / 4, count = tile_count(sizes);
  Position key, value;
  if (group == 1) named_arrive(3, 256);  // the first group begins
  for (int turn = 0, index; (index = tile_index(turn)) < count; turn++) {
    int buffer = turn % 2;
    uint32_t block = queries_at + buffer * BLOCK_BYTES, queries = block + group * 64 * 128;
    wait(shared_address(shared.range_full + buffer), turn / 2 & 1);
    wait(shared_address(shared.query_full + buffer), turn / 2 & 1);
    Range range = shared.range[buffer];
    Rows rows = {{shared.position[buffer][row], shared.position[buffer][row + 8]}, {nothing(), nothing()}, {0, 0}};
    float scores[SLOTS / 2], mix[WIDTH / 2], fading[2];
    uint32_t shares[SLOTS / 16][4];
#pragma unroll
    for (int i = 0; i < SLOTS / 2; i++) scores[i] = 0;
#pragma unroll
    for (int i = 0; i < WIDTH / 2; i++) mix[i] = 0;

    int j = range.last(), first = range.first();
    wait(shared_address(shared.key_full + key.stage), key.parity);
    multiply_keys(scores, queries, keys_at + key.stage * BLOCK_BYTES);
    wgmma_wait<0>();
    hold(scores);
    if (lane == 0) arrive(shared_address(shared.key_empty + key.stage));
    key.next();
    soften(scores, rows, fading, range.partial(j), j * SLOTS, scale, lane);
    pack(shares, scores);
    for (j--; j >= first; j--) {
      wait(shared_address(shared.key_full + key.stage), key.parity);
      named_sync(3 + group, 256);
      multiply_keys(scores, queries, keys_at + key.stage * BLOCK_BYTES);
      wait(shared_address(shared.value_full + value.stage), value.parity);
      multiply_values(mix, shares, values_at + value.stage * BLOCK_BYTES);
      named_arrive(4 - group, 256);
      wgmma_wait<1>();
      hold(scores);
      if (lane == 0) arrive(shared_address(shared.key_empty + key.stage));
      key.next();
      soften(scores, rows, fading, range.partial(j), j * SLOTS, scale, lane);
      wgmma_wait<0>();
      hold(mix);
      if (lane == 0) arrive(shared_address(shared.value_empty + value.stage));
      value.next();
#pragma unroll
      for (int i = 0; i < WIDTH / 2; i++) mix[i] *= fading[i / 2 % 2];
      pack(shares, scores);
    }
    wait(shared_address(shared.value_full + value.stage), value.parity);
    multiply_values(mix, shares, values_at + value.stage * BLOCK_BYTES);
    wgmma_wait<0>();
    hold(mix);
    if (lane == 0) arrive(shared_address(shared.value_empty + value.stage));
    value.next();
    write(mix, rows, block, output, locate(index, sizes), sizes, group, thread);
    if (lane == 0) arrive(shared_address(shared.query_empty + buffer));
  }
}

// `query [B, S, N * D]`, `cos`, `sin [B, 1, S, D]`, `positions [B, S]`, `keys`, `values [B * KV, slots, D]` → `output [B, S, N * D]`.
// `scale` is the op's times log2(e).
extern "C" __global__ void __launch_bounds__(384, 1)
    prefill(const uint16_t* query, const uint16_t* cos, const uint16_t* sin, const int64_t* positions,
            const __grid_constant__ TensorMap keys, const __grid_constant__ TensorMap values, uint16_t* output, int batch,
            int length, int slots, float scale) {
  extern __shared__ char memory[];
  uint32_t queries_at = (shared_address(memory) + 1023) & ~1023u;
  uint32_t keys_at = queries_at + 2 * BLOCK_BYTES, values_at = keys_at + STAGES * BLOCK_BYTES;
  Shared& shared = *reinterpret_cast<Shared*>(memory + (values_at + STAGES * BLOCK_BYTES - shared_address(memory)));
  Sizes sizes = {batch, length, slots};
  int group = threadIdx.x / 128, thread = threadIdx.x % 128;
  if (threadIdx.x == 0) {
    prefetch(&keys);
    prefetch(&values);
    for (int i = 0; i < STAGES; i++) {
      barrier_init(shared_address(shared.key_full + i), 1);
      barrier_init(shared_address(shared.key_empty + i), 8);
      barrier_init(shared_address(shared.value_full + i), 1);
      barrier_init(shared_address(shared.value_empty + i), 8);
    }
    for (int i = 0; i < 2; i++) {
      barrier_init(shared_address(shared.query_full + i), ROTATORS);
      barrier_init(shared_address(shared.query_empty + i), 8);
      barrier_init(shared_address(shared.range_full + i), 1);
    }
    barrier_init_fence();
  }
  __syncthreads();
  if (group == 0) {
    fewer_registers<56>();
    if (thread < 32) {
      wait_for_previous();  // that writes the cache
      fetch(shared, keys_at, values_at, &keys, &values, positions, sizes, thread);
    } else {
      rotate(shared, queries_at, query, cos, sin, positions, sizes, thread - 32);
    }
  } else {
    more_registers<224>();
    attend(shared, queries_at, keys_at, values_at, output, sizes, scale, group - 1, thread);
  }
}
