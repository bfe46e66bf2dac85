// Clusters of programs that reach into each other's shared memory (PTX ISA, `barrier.cluster`, `mapa`, `st.async`).
#pragma once

#include "ptx.cuh"

// All programs of the cluster have begun once all their threads have announced it: then their shared memory is theirs, and
// barriers that were initialised and fenced (`barrier_init_fence`) before are there for all.
__forceinline__ void cluster_announce() { asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory"); }
__forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

// Where program `rank` of the cluster has what is at `address` here.
__forceinline__ uint32_t remote_address(uint32_t address, int rank) {
  uint32_t remote;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
  return remote;
}

// Writes 8 bytes to a program's shared memory and counts them in a barrier of the same program: whoever waits for it sees them.
__forceinline__ void store_remote(uint32_t address, uint32_t barrier, float first, float second) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%2, %3}, [%1];" ::"r"(address),
               "r"(barrier), "f"(first), "f"(second)
               : "memory");
}

__forceinline__ int cluster_rank() {
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// At a barrier of another program, by its `remote_address`.
__forceinline__ void arrive_remote(uint32_t barrier) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// A box for every program in `programs` (a bit each): to the same address in each, and counted by the barrier at the same address.
__forceinline__ void load_box_for_all(uint32_t to, const TensorMap* map, uint32_t barrier, uint64_t policy, uint16_t programs, int x,
                             int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint [%0], "
      "[%1, {%5, %6}], [%2], %3, %4;" ::"r"(to),
      "l"(map), "r"(barrier), "h"(programs), "l"(policy), "r"(x), "r"(y)
      : "memory");
}
