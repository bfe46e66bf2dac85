// Causal grouped-query attention of one new token per sequence over its cache, for SM 9.0, with rotary embedding and the cache
// written in place: Flash-Decoding (Dao et al. 2023) in one launch.
//
// A cluster of programs shares a key-value head of a sequence. Each of its warps has a stream of tiles of 16 slots, a ring of
// them in shared memory that the copy engine fills, and its own softmax, so warps wait for nobody: a tile's place is filled again
// as soon as the warp has read it. At the end each warp hands its part of the results to the programs that merge them, through
// the cluster's shared memory. Where there is no window, a stream's first tile is fetched before the position is known.
//
// The new key and value are a tile of their own, in the stream whose turn it would be. The cache's slot for them is hidden from
// all streams, since it may be fetched before, while or after it is written.
//
// The cache may hold codes, bytes that are int8 or E4M3 (CODES 1 and 2; 0: numbers). They are converted in registers, so what a
// lane gets of four adjacent bytes decides which columns are whose: queries and new keys lie in shared memory as pairs that fit,
// and results come in another order of columns (`decode_codes.cuh`). Scores and results are multiplied with the layer's scales.
//
// Macros: CODES, HEADS, KV_HEADS (HEADS up to 16 times as many), HEAD_DIM (up to 128, a multiple of 8), WINDOW, ELEMENT_IS_BFLOAT16,
// STAGES of a ring, SHARED bytes of shared memory. Shapes: B batch, N heads, KV key-value heads, D head size.

#include "cluster.cuh"

constexpr int WARPS = 4;
constexpr int THREADS = 32 * WARPS;
constexpr int MOST_PROGRAMS = 8;  // of a cluster
constexpr int SLOTS = CODES ? 32 : 16;  // of a tile
constexpr int PARTS = SLOTS / 16;        // of a tile, 16 slots
constexpr int GROUP = HEADS / KV_HEADS;
constexpr int ROWS = GROUP > 8 ? 2 : 1;        // query heads of a lane, 8 apart
constexpr int STEPS = (HEAD_DIM + 15) / 16;    // of 16 columns
constexpr int ROW_COLUMNS = CODES ? 128 : 64;  // in 128 swizzled bytes
constexpr int HALVES = (HEAD_DIM + ROW_COLUMNS - 1) / ROW_COLUMNS;  // of a tile
constexpr int HALF_BYTES = SLOTS * 128;
constexpr int STAGE_BYTES = HALVES * HALF_BYTES;  // keys or values of a tile
constexpr int QUERY_PITCH = STEPS * 32 + 16;      // bytes; so that rows differ in their banks
constexpr int BLOCKS = GROUP * HEAD_DIM / 8;      // of 8 results

struct Sum {
  float highest, total;
};

struct Shared {
  uint64_t full[WARPS][STAGES], handed_over;
  Sum sums[WARPS * MOST_PROGRAMS][GROUP];
  float mixed[WARPS * ((BLOCKS + MOST_PROGRAMS - 1) / MOST_PROGRAMS * MOST_PROGRAMS) * 8];  // [streams, own blocks, 8]
  alignas(16) char query[ROWS * 8 * QUERY_PITCH];
  alignas(128) char key[256], value[256];  // the new ones, as first rows of tiles; the rows behind are whatever is there
};
constexpr int BEFORE_RINGS = (sizeof(Shared) + 1023) / 1024 * 1024;
static_assert(1024 + BEFORE_RINGS + WARPS * STAGES * STAGE_BYTES <= SHARED && STAGES >= 2, "shared memory");

#include "decode_tile.cuh"
#include "decode_codes.cuh"

typedef Cached<CODES>::Element Element;  // of the cache

struct Tensors {
  const uint16_t *query, *key, *value, *cos, *sin;
};

// Keys and values of every `stride`-th tile by turns, in a ring.
struct Stream {
  const TensorMap *keys, *values;
  uint32_t memory, full;
  int row, slot, stride, count, stage;
  uint32_t parity;

  __forceinline__ uint32_t address() const { return memory + stage * STAGE_BYTES; }
  __forceinline__ void arrived() const { wait(full + 8 * stage, parity); }
  // One lane: the `item`-th of the stream to where the stream is in its ring.
  __forceinline__ void fetch(int item) const {
    const TensorMap* map = item % 2 ? values : keys;
    arrive_expecting(full + 8 * stage, STAGE_BYTES);
#pragma unroll
    for (int half = 0; half < HALVES; half++)
      load_box(address() + half * HALF_BYTES, map, full + 8 * stage, EVICT_FIRST, half * ROW_COLUMNS, slot + item / 2 * stride, row);
  }
  __forceinline__ void next() {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
  // The warp has read item `item`: its place goes to the one that comes a ring later.
  __forceinline__ void read(int item, int lane) {
    __syncwarp();
    if (lane == 0 && item + STAGES < 2 * count) fetch(item + STAGES);
    next();
  }
};

struct alignas(8) Four {  // elements
  uint32_t words[2];
};
__forceinline__ Four load_four(const uint16_t* from) { return *reinterpret_cast<const Four*>(from); }

// Four columns of a head, and of what it is rotated with.
struct Piece {
  Four x, turned, cos, sin;
  float sign;
};
constexpr int ROW_PIECES = STEPS * 4;
constexpr int PIECE_ROWS = GROUP + 2;  // query heads, the new key, the new value
constexpr int PIECES = (PIECE_ROWS * ROW_PIECES + THREADS - 1) / THREADS;  // of a thread

__forceinline__ Piece load_piece(const Tensors& tensors, int row, int column, int sequence, int head) {
  Piece piece = {};
  if (row >= PIECE_ROWS || column >= HEAD_DIM) return piece;
  int64_t pair = int64_t(sequence) * KV_HEADS + head, angle = int64_t(sequence) * HEAD_DIM;
  if (row == GROUP + 1) {
    piece.x = load_four(tensors.value + pair * HEAD_DIM + column);
    return piece;
  }
  const uint16_t* x = row < GROUP ? tensors.query + (pair * GROUP + row) * HEAD_DIM : tensors.key + pair * HEAD_DIM;
  bool low = column < HEAD_DIM / 2;
  piece.x = load_four(x + column);
  piece.turned = load_four(x + (low ? column + HEAD_DIM / 2 : column - HEAD_DIM / 2));
  piece.cos = load_four(tensors.cos + angle + column);
  piece.sin = load_four(tensors.sin + angle + column);
  piece.sign = low ? -1.0f : 1.0f;
  return piece;
}

__forceinline__ Four rotated(const Piece& piece) {
  Four y;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    uint32_t x = piece.x.words[i], turned = piece.turned.words[i], cos = piece.cos.words[i], sin = piece.sin.words[i];
    y.words[i] = to_pair(low_float(x) * low_float(cos) + piece.sign * low_float(turned) * low_float(sin),
                         high_float(x) * high_float(cos) + piece.sign * high_float(turned) * high_float(sin));
  }
  return y;
}

// Rotated queries, new key and new value to shared memory, and with `keys` and `values`, the slot's, to the cache too.
__forceinline__ void place_piece(Shared& shared, const Piece& piece, int row, int column, Element* keys, Element* values,
                                 Scales scales) {
  if (row >= PIECE_ROWS) return;
  bool is_value = row == GROUP + 1;
  Four y = is_value ? piece.x : rotated(piece);
  char* to = row < GROUP ? shared.query + row * QUERY_PITCH : is_value ? shared.value : shared.key;
#if CODES
  if (row >= GROUP) {
    uint32_t codes = to_codes(y.words, is_value ? scales.values : scales.keys);
    if (keys && column < HEAD_DIM) *reinterpret_cast<uint32_t*>((is_value ? values : keys) + column) = codes;
    from_codes(y.words, codes);
  }
  // columns 4 q to 4 q + 3 of 16: pairs q and 4 + q are the first two and the last two, of values the even and the odd ones
  uint32_t first = is_value ? __byte_perm(y.words[0], y.words[1], 0x5410) : y.words[0];
  uint32_t second = is_value ? __byte_perm(y.words[0], y.words[1], 0x7632) : y.words[1];
  uint32_t* pairs = reinterpret_cast<uint32_t*>(to + column / 16 * 32) + column % 16 / 4;
  pairs[0] = first, pairs[4] = second;
#else
  *reinterpret_cast<Four*>(to + column * 2) = y;
  if (keys && row >= GROUP && column < HEAD_DIM) *reinterpret_cast<Four*>((is_value ? values : keys) + column) = y;
#endif
}

// Results are merged by all programs of the cluster, whose number is a power of two: block i by program i % programs.
__forceinline__ int own_blocks(int programs, int program) { return (BLOCKS - program + programs - 1) >> (__ffs(programs) - 1); }
__forceinline__ int bytes_handed_over(int programs, int program) {
  return programs * WARPS * (GROUP * int(sizeof(Sum)) + own_blocks(programs, program) * 32);
}

// To a program's shared memory; a program that is alone needs no cluster.
__forceinline__ void store(uint32_t address, uint32_t barrier, int programs, int program, float first, float second) {
  if (programs == 1)
    store_pair(address, first, second);
  else
    store_remote(remote_address(address, program), remote_address(barrier, program), first, second);
}

// A stream's part to the programs that merge it.
__forceinline__ void hand_over(Shared& shared, Softmax& softmax, int programs, int stream, int lane) {
  int own = own_blocks(programs, 0), shift = __ffs(programs) - 1;
  uint32_t mixed = shared_address(shared.mixed) + (stream * own * 8 + lane % 4 * 2) * 4;
  uint32_t barrier = shared_address(&shared.handed_over);
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    float total = quad_sum(softmax.total[r]);
    int row = lane / 4 + 8 * r;
    if (row >= GROUP) continue;
#pragma unroll 1
    for (int program = lane % 4; program < programs; program += 4)
      store(shared_address(&shared.sums[stream][row]), barrier, programs, program, softmax.highest[r], total);
#pragma unroll
    for (int j = 0; j < HEAD_DIM / 8; j++) {
      int block = row * (HEAD_DIM / 8) + j, program = block & (programs - 1);
      store(mixed + (block >> shift) * 32, barrier, programs, program, softmax.mix[j][2 * r], softmax.mix[j][2 * r + 1]);
    }
  }
}

// A program's blocks from all streams' parts, a pair of results at a time; where there are fewer pairs than threads, adjacent
// lanes divide the streams. `output [GROUP, D]`, `scale` times what was mixed.
__forceinline__ void merge(const Shared& shared, uint16_t* output, float scale, int programs, int program, int thread) {
  int own = own_blocks(programs, 0), streams = programs * WARPS, pairs = own * 4, lanes = 1;
  while (2 * lanes * pairs <= THREADS && 2 * lanes <= streams) lanes *= 2;
  for (int first = 0; first < pairs * lanes; first += THREADS) {
    int pair = min(first + thread, pairs * lanes - 1) / lanes, share = thread % lanes;
    int block = pair / 4 * programs + program, column = block % (HEAD_DIM / 8) * 8 + pair % 4 * 2;
    int row = min(block / (HEAD_DIM / 8), GROUP - 1);
    float highest = nothing(), total = 0, low = 0, high = 0;
#pragma unroll 4
    for (int stream = share; stream < streams; stream += lanes) highest = fmaxf(highest, shared.sums[stream][row].highest);
    for (int step = 1; step < lanes; step *= 2) highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, step));
#pragma unroll 4
    for (int stream = share; stream < streams; stream += lanes) {
      Sum sum = shared.sums[stream][row];
      const float* mixed = shared.mixed + (stream * own + pair / 4) * 8 + pair % 4 * 2;
      float weight = power_of_2(sum.highest - highest);
      total += weight * sum.total, low += weight * mixed[0], high += weight * mixed[1];
    }
    for (int step = 1; step < lanes; step *= 2) {
      total += __shfl_xor_sync(~0u, total, step);
      low += __shfl_xor_sync(~0u, low, step);
      high += __shfl_xor_sync(~0u, high, step);
    }
    if (share != 0 || first + thread >= pairs * lanes || block >= BLOCKS) continue;
    uint32_t result = to_pair(low * scale / total, high * scale / total);
#if CODES
    // block 2 c has the even ones of 16 columns, block 2 c + 1 the odd ones
    uint16_t* to = output + row * HEAD_DIM + column / 16 * 16 + pair % 4 * 4 + column / 8 % 2;
    to[0] = uint16_t(result), to[2] = uint16_t(result >> 16);
#else
    *reinterpret_cast<uint32_t*>(output + row * HEAD_DIM + column) = result;
#endif
  }
}

// `query [B, 1, N * D]`, `key`, `value [B, 1, KV * D]`, `cos`, `sin [B, 1, 1, D]`, `positions [B, 1]` → `output [B, 1, N * D]`;
// the cache, `[B * KV, slots, D]`, is read through tensor maps and written through `key_cache` and `value_cache`. Program (p, h, b)
// is part p, of 1, 2, 4 or 8 that are a cluster, of key-value head h in sequence b. `scale` is the op's times log2(e);
// `key_scales`, `value_scales [1]` are there where the cache holds codes.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    decode(const uint16_t* query, const uint16_t* key, const uint16_t* value, const uint16_t* cos, const uint16_t* sin,
           const int64_t* positions, const __grid_constant__ TensorMap keys, const __grid_constant__ TensorMap values,
           Element* key_cache, Element* value_cache, uint16_t* output, int slots, float scale
#if CODES
           , const uint16_t* key_scales, const uint16_t* value_scales
#endif
    ) {
  extern __shared__ char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory + (-shared_address(memory) & 1023));
  uint32_t rings = shared_address(&shared) + BEFORE_RINGS;
  int thread = threadIdx.x, lane = thread % 32, warp = __shfl_sync(~0u, thread / 32, 0);  // the warp's, not a lane's
  int programs = gridDim.x, program = blockIdx.x, head = blockIdx.y, sequence = blockIdx.z;
  int streams = programs * WARPS, index = program * WARPS + warp, pair = sequence * KV_HEADS + head;
  Stream stream = {&keys, &values, rings + warp * STAGES * STAGE_BYTES, shared_address(shared.full[warp]), pair, index * SLOTS,
                   streams * SLOTS, 0, 0, 0};
  bool early = WINDOW == 0 && stream.slot < slots;
  int position = int(positions[sequence]);
#if CODES
  Scales scales = {low_float(*key_scales), low_float(*value_scales)};
#else
  Scales scales = {1.0f, 1.0f};
#endif
  scale *= scales.keys;
  if (lane == 0) {
    for (int i = 0; i < STAGES; i++) barrier_init(stream.full + 8 * i, 1);
    if (warp == 0) barrier_init(shared_address(&shared.handed_over), 1);
    barrier_init_fence();
    if (warp == 0) arrive_expecting(shared_address(&shared.handed_over), bytes_handed_over(programs, program));
  }
  if (programs > 1) cluster_announce();
  __syncwarp();
  Stream filling = stream;
  if (early) {
    if (lane == 0) filling.fetch(0);
    filling.next();
    if (lane == 0) filling.fetch(1);
    filling.next();
  }

  Tensors tensors = {query, key, value, cos, sin};
  Piece pieces[PIECES];
#pragma unroll
  for (int i = 0; i < PIECES; i++) {
    int item = thread + i * THREADS;
    pieces[i] = load_piece(tensors, item / ROW_PIECES, item % ROW_PIECES * 4, sequence, head);
  }
  int before = min(position, slots), oldest = WINDOW > 0 ? max(position - WINDOW + 1, 0) : 0;
  int first = oldest / SLOTS, tiles = before > oldest ? (before + SLOTS - 1) / SLOTS - first : 0;
  stream.slot += first * SLOTS, filling.slot = stream.slot;
  stream.count = tiles > index ? ((tiles - index - 1) >> (__ffs(streams) - 1)) + 1 : 0;
  for (int item = early ? 2 : 0; item < min(STAGES, 2 * stream.count); item++, filling.next())
    if (lane == 0) filling.fetch(item);
  bool writes = program == 0 && position >= 0 && position < slots;
  int64_t at = (int64_t(pair) * slots + position) * HEAD_DIM;
#pragma unroll
  for (int i = 0; i < PIECES; i++) {
    int item = thread + i * THREADS;
    Element* new_key = writes ? key_cache + at : nullptr;
    place_piece(shared, pieces[i], item / ROW_PIECES, item % ROW_PIECES * 4, new_key, value_cache + at, scales);
  }
  __syncthreads();

  uint32_t operand[STEPS][4];
  Softmax softmax = {};
#pragma unroll
  for (int r = 0; r < ROWS; r++) softmax.highest[r] = nothing();
  load_query(operand, shared_address(shared.query), lane);
  if (index == (tiles & (streams - 1))) {
    Seen seen = {0, 1};
    uint32_t shares[1][4];
    float scores[1][2][4];
    multiply_keys(scores[0], operand, shared_address(shared.key), 128, lane);
    soften(shares, scores, softmax, seen, scale, lane);
    multiply_values(softmax, shares[0], shared_address(shared.value), 128, seen, lane);
  }
  for (int tile = 0; tile < stream.count; tile++) {
    int slot = stream.slot + tile * stream.stride;
    Seen seen = {oldest - slot, before - slot};
    uint32_t shares[PARTS][4];
    float scores[PARTS][2][4];
    stream.arrived();
    Cached<CODES>::multiply_keys(scores, operand, stream.address(), lane);
    stream.read(2 * tile, lane);
    soften(shares, scores, softmax, seen, scale, lane);
    stream.arrived();
    Cached<CODES>::multiply_values(softmax, shares, stream.address(), seen, lane);
    stream.read(2 * tile + 1, lane);
  }
  if (early && stream.count == 0) {  // what was fetched in vain has to arrive before the memory is another program's
    stream.arrived();
    stream.next();
    stream.arrived();
  }

  if (programs > 1) cluster_wait();
  hand_over(shared, softmax, programs, index, lane);
  if (programs == 1)
    __syncthreads();
  else
    wait(shared_address(&shared.handed_over), 0);  // and nobody reaches into this program's memory any more
  merge(shared, output + (int64_t(sequence) * HEADS + head * GROUP) * HEAD_DIM, scales.values, programs, program,
        thread);
}
