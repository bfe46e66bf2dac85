// All-reduce in two ways, and all-gather; `exchange.cuh` says how ranks exchange at all.
#include "exchange.cuh"

// y = Σ x of `elements`: every rank sends its whole message to every peer, and adds all of them up.
#ifdef COMPILE_one_shot
extern "C" __global__ void __launch_bounds__(THREADS) one_shot(const void* x, void* y, Region* own, int elements) {
  Group group = begin(own);
  int count = (elements + PER_VECTOR - 1) / PER_VECTOR, stride = programs() * THREADS;
  for (int at = program() * THREADS + thread(); at < count; at += stride) send_lines(group, at, load(x, at, elements));
  for (int at = program() * THREADS + thread(); at < count; at += stride) {
    Vector parts[MOST_RANKS], mine = load(x, at, elements);
    receive_lines(group, at, parts);
#pragma unroll
    for (int k = 0; k < MOST_RANKS; k++) {
      if (k == group.rank) parts[k] = mine;
    }
    store(y, at, elements, sum(group, parts));
  }
  end(group);
}
#endif

// The same: every rank adds up one share of the message, sent to it by all, and sends the sum to all.
#ifdef COMPILE_two_shot
extern "C" __global__ void __launch_bounds__(THREADS) two_shot(const void* x, void* y, Region* own, int elements) {
  Group group = begin(own);
  int count = (elements + PER_VECTOR - 1) / PER_VECTOR, share = (count + group.ranks - 1) / group.ranks;
  Bulk& here = own->bulk[group.turn & 1];
  auto mine = [&](int rank, int i) { return load(x, rank * share + i, elements); };  // zeros behind the end

  for (int step = 1; step < group.ranks; step++) {  // not all to the same rank at a time
    int peer = (group.rank + step) % group.ranks;
    Vector* parts = own->regions[peer]->bulk[group.turn & 1].parts + group.rank * share;
    for_share<Vector>(share, [&](int i) { return mine(peer, i); }, [&](int i, const Vector& part) { parts[i] = part; });
  }
  wait_for_peers(group, 0);

  auto added = [&](int i) {
    Vector parts[MOST_RANKS];
#pragma unroll
    for (int k = 0; k < MOST_RANKS; k++) {
      if (k < group.ranks) parts[k] = k == group.rank ? mine(k, i) : here.parts[k * share + i];
    }
    return sum(group, parts);
  };
  for_share<Vector>(share, added, [&](int i, const Vector& total) {
    store(y, group.rank * share + i, elements, total);
    for_peers(group, [&](int k, Region* peer) { peer->bulk[group.turn & 1].results[group.rank * share + i] = total; });
  });
  wait_for_peers(group, 1);

  for (int k = 0; k < group.ranks; k++) {
    if (k == group.rank) continue;
    auto result = [&](int i) { return here.results[k * share + i]; };
    for_share<Vector>(share, result, [&](int i, const Vector& total) { store(y, k * share + i, elements, total); });
  }
  end(group);
}
#endif

// y [rows, ranks * pitch] = every rank's x [rows, pitch] side by side, of which the first `width` columns; all in units of a type.
#ifdef COMPILE_gather
template <class Unit>
__forceinline__ void gather_units(const Unit* x, Unit* y, const Group& group, int rows, int width, int pitch) {
  constexpr int PIECE = sizeof(Bulk) / MOST_RANKS / 16 * 16;  // bytes of a rank's part
  int count = rows * width;
  auto piece = [&](Region* region, int rank) {
    return reinterpret_cast<Unit*>(reinterpret_cast<char*>(&region->bulk[group.turn & 1]) + rank * PIECE);
  };
  auto spread = [&](int rank, int i, Unit unit) {
    int row = i / width;
    y[(int64_t(row) * group.ranks + rank) * pitch + (i - row * width)] = unit;
  };
  auto mine = [&](int i) { return x[int64_t(i / width) * pitch + i % width]; };
  for_share<Unit>(count, mine, [&](int i, Unit unit) {
    for_peers(group, [&](int k, Region* peer) { piece(peer, group.rank)[i] = unit; });
    spread(group.rank, i, unit);
  });
  wait_for_peers(group, 0);
  for (int k = 0; k < group.ranks; k++) {
    if (k == group.rank) continue;
    const Unit* from = piece(group.own, k);
    for_share<Unit>(count, [&](int i) { return from[i]; }, [&](int i, Unit unit) { spread(k, i, unit); });
  }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    gather(const void* x, void* y, Region* own, int rows, int width, int pitch, int unit) {
  Group group = begin(own);
  if (unit == 16) {
    gather_units(static_cast<const Vector*>(x), static_cast<Vector*>(y), group, rows, width, pitch);
  } else if (unit == 8) {
    gather_units(static_cast<const uint64_t*>(x), static_cast<uint64_t*>(y), group, rows, width, pitch);
  } else if (unit == 4) {
    gather_units(static_cast<const uint32_t*>(x), static_cast<uint32_t*>(y), group, rows, width, pitch);
  } else {
    gather_units(static_cast<const uint16_t*>(x), static_cast<uint16_t*>(y), group, rows, width, pitch);
  }
  end(group);
}
#endif
