// How the ranks of a group exchange what lies on their GPUs: each has a region of its own memory that its peers write to.
//
// A launch on every rank of the group is a turn; turns have numbers, which are counted in the region, so that a CUDA graph can
// hold a launch and be replayed. A rank writes its part of turn t into the places of parity t mod 2 of its peers' regions, and
// waits until theirs are in its own.
//
// Nobody has to say that it has read. A rank writes to the places of turn t again in turn t + 2. By then its launch of turn t + 1
// has ended; that launch had waited for something of turn t + 1 from every peer; so every peer's launch of turn t + 1 had begun,
// and its launch of turn t, the one that reads those places, had ended, for launches of a region follow one another on a stream.
// It holds for all kernels here alike, since each waits for every peer whatever the message is.
//
// No program waits for another of its own launch: program p waits for the peers' programs p alone. So launches need not be on
// GPUs as a whole at the same time, and ranks can share a GPU.
//
// Macros: ELEMENT, THREADS of a program, PROGRAMS at most, ONE_SHOT bytes of a one-shot message at most, SLOT bytes of any other,
// REGION bytes.
#pragma once
#include "system.cuh"

constexpr int MOST_RANKS = 8;

struct alignas(16) Vector {
  uint32_t words[4];
};
constexpr int PER_WORD = 4 / sizeof(Element);
constexpr int PER_VECTOR = 4 * PER_WORD;  // elements

struct Bulk {
  Vector parts[SLOT / 16 + MOST_RANKS], results[SLOT / 16 + MOST_RANKS];
};

struct alignas(256) Region {
  uint32_t turn, finished, lost;  // of the last launch; how many programs of this one have ended; 1 + a rank that did not come
  uint32_t rank, ranks, unused;   // places in the group
  uint64_t patience;              // nanoseconds
  uint32_t* told;                 // of the host: `lost`
  Region* regions[MOST_RANKS];
  alignas(256) uint32_t flags[2][MOST_RANKS][PROGRAMS];
  Line lines[2][MOST_RANKS][ONE_SHOT / 8];
  Bulk bulk[2];
};
static_assert(sizeof(Region) == REGION, "the host lays regions out in the same way");

struct Group {
  Region* own;
  Region* regions[MOST_RANKS];
  int rank, ranks;
  uint32_t turn;
};

// The turn after a turn. Places that were never written hold 0, so no turn is 0, or the one before it.
__forceinline__ uint32_t after(uint32_t turn) { return turn == 0xFFFFFFFDu ? 2 : turn + 1; }

__forceinline__ Group begin(Region* own) {
  Group group;
  group.own = own, group.rank = own->rank, group.ranks = own->ranks;
  group.turn = after(own->turn);
#pragma unroll
  for (int k = 0; k < MOST_RANKS; k++) group.regions[k] = own->regions[k];
  return group;
}

// The last program to end ends the turn: all have begun, and know its number.
__forceinline__ void end(const Group& group) {
  meet();
  if (thread() != 0) return;
  if (count_up(&group.own->finished) == programs() - 1) {
    group.own->finished = 0;
    group.own->turn = group.turn;
  }
}

template <class Body>
__forceinline__ void for_peers(const Group& group, Body body) {
#pragma unroll
  for (int k = 0; k < MOST_RANKS; k++) {
    if (k < group.ranks && k != group.rank) body(k, group.regions[k]);
  }
}

// Of one that waits. It ends when a peer is given up, by this thread or another, in this launch or an earlier one: what was to come
// is then missing, and the host is told.
struct Patience {
  int turns = 0;
  uint64_t start = 0;

  __forceinline__ bool more(const Group& group, int missing) {
    if (++turns < 64) return true;
    rest();
    uint64_t now = nanoseconds();
    if (start == 0) start = now;
    if (look_at(&group.own->lost) != 0) return false;
    if (now - start < group.own->patience) return true;
    tell(&group.own->lost, missing + 1);
    tell(group.own->told, missing + 1);
    return false;
  }
};

// Numbers

// Vector `at` of a message; zeros behind its end.
__forceinline__ Vector load(const void* message, int at, int elements) {
  if ((at + 1) * PER_VECTOR <= elements) return static_cast<const Vector*>(message)[at];
  Vector vector = {};
#pragma unroll
  for (int i = 0; i < PER_VECTOR; i++) {
    if (at * PER_VECTOR + i < elements) {
      uint32_t element = static_cast<const Element*>(message)[at * PER_VECTOR + i];
      vector.words[i / PER_WORD] |= element << (i % PER_WORD * 16);
    }
  }
  return vector;
}
__forceinline__ void store(void* message, int at, int elements, const Vector& vector) {
  if ((at + 1) * PER_VECTOR <= elements) {
    static_cast<Vector*>(message)[at] = vector;
    return;
  }
#pragma unroll
  for (int i = 0; i < PER_VECTOR; i++) {
    if (at * PER_VECTOR + i < elements) {
      static_cast<Element*>(message)[at * PER_VECTOR + i] = Element(vector.words[i / PER_WORD] >> (i % PER_WORD * 16));
    }
  }
}

__forceinline__ void widen(const Vector& vector, float (&values)[PER_VECTOR]) {
#pragma unroll
  for (int i = 0; i < 4; i++) widen_word(vector.words[i], values + i * PER_WORD);
}
__forceinline__ Vector narrow(const float (&values)[PER_VECTOR]) {
  Vector vector;
#pragma unroll
  for (int i = 0; i < 4; i++) vector.words[i] = narrow_word(values + i * PER_WORD);
  return vector;
}

// In float32 and in rank order, rounded once: every rank gets the same bits, and those of the way through the host.
__forceinline__ Vector sum(const Group& group, const Vector (&parts)[MOST_RANKS]) {
  float total[PER_VECTOR];
  widen(parts[0], total);
#pragma unroll
  for (int k = 1; k < MOST_RANKS; k++) {
    if (k >= group.ranks) break;
    float values[PER_VECTOR];
    widen(parts[k], values);
#pragma unroll
    for (int i = 0; i < PER_VECTOR; i++) total[i] += values[i];
  }
  return narrow(total);
}

// By lines: one way through the link and no fence, at twice the bytes (NCCL's protocol LL).

__forceinline__ void send_lines(const Group& group, int at, const Vector& vector) {
  uint64_t turn = uint64_t(group.turn) << 32;
  for_peers(group, [&](int k, Region* peer) {
    Line* to = &peer->lines[group.turn & 1][group.rank][2 * at];
    put_line(to, {turn | vector.words[0], turn | vector.words[1]});
    put_line(to + 1, {turn | vector.words[2], turn | vector.words[3]});
  });
}

// The peers' vectors `at` into their places. A line that is not of this turn is of turn t - 2 or earlier: see above.
__forceinline__ void receive_lines(const Group& group, int at, Vector (&parts)[MOST_RANKS]) {
  Patience patience;
  int missing;
  do {
    missing = -1;
    for_peers(group, [&](int k, Region*) {
      const Line* from = &group.own->lines[group.turn & 1][k][2 * at];
      Line a = get_line(from), b = get_line(from + 1);
      uint32_t late = (uint32_t(a.first >> 32) ^ group.turn) | (uint32_t(a.second >> 32) ^ group.turn) |
                      (uint32_t(b.first >> 32) ^ group.turn) | (uint32_t(b.second >> 32) ^ group.turn);
      if (late != 0) missing = k;
      parts[k] = {{uint32_t(a.first), uint32_t(a.second), uint32_t(b.first), uint32_t(b.second)}};
    });
  } while (missing >= 0 && patience.more(group, missing));
}

// By flags: what the program's threads have written to peers' regions is there when their programs of the same number go on.
// Phases of a turn have flags of their own. A peer may be a turn ahead, never two; its data then lie elsewhere.
__forceinline__ void wait_for_peers(const Group& group, int phase) {
  meet();
  for_peers(group, [&](int k, Region* peer) {
    if (thread() == k) raise_flag(&peer->flags[phase][group.rank][program()], group.turn);
  });
  for_peers(group, [&](int k, Region*) {
    if (thread() != k) return;
    const uint32_t* flag = &group.own->flags[phase][k][program()];
    Patience patience;
    for (uint32_t seen = see_flag(flag); seen != group.turn && seen != after(group.turn); seen = see_flag(flag)) {
      if (!patience.more(group, k)) break;
    }
  });
  meet();
}

// `use(i, load(i))` for this thread's share of 0 to count - 1, several loads at a time.
template <class T, class Load, class Use>
__forceinline__ void for_share(int count, Load load, Use use) {
  constexpr int BATCH = 4;
  int stride = programs() * THREADS;
  for (int first = program() * THREADS + thread(); first < count; first += BATCH * stride) {
    T loaded[BATCH];
#pragma unroll
    for (int i = 0; i < BATCH; i++) {
      if (first + i * stride < count) loaded[i] = load(first + i * stride);
    }
#pragma unroll
    for (int i = 0; i < BATCH; i++) {
      if (first + i * stride < count) use(first + i * stride, loaded[i]);
    }
  }
}
