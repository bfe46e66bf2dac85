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
