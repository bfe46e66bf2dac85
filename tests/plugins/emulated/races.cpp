// Ranks that exchange turn after turn by all kernels, for the thread sanitizer. Ends with status 1 where a sum is wrong.
#include <cstdio>
#include <cstdlib>

#include "collectives.cpp"

constexpr int RANKS = 3, TURNS = 40;

static float* array(int elements) { return static_cast<float*>(std::aligned_alloc(256, (elements * 4 + 255) / 256 * 256)); }

static void run(int rank, Region* own) {
  float *x = array(500), *y = array(500 * RANKS), *z = array(500);
  for (int turn = 0; turn < TURNS; turn++) {
    int elements = turn % 3 == 1 ? 500 : 96;
    for (int i = 0; i < elements; i++) x[i] = float(rank + i + turn);
    if (turn % 5 == 3) {
      run_gather(3, x, y, own, 5, 3, 3, 16);
    } else if (turn % 5 == 4) {
      run_one_shot_norm(3, x, x, x, y, z, own, 4, 24, 1e-5f);
    } else {
      (elements == 500 ? run_two_shot : run_one_shot)(turn % 3 + 1, x, y, own, elements);
      for (int i = 0; i < elements; i++) {
        if (y[i] != 3 + 3.0f * (i + turn)) std::exit(1);
      }
    }
  }
  for (float* each : {x, y, z}) std::free(each);
}

int main() {
  Region* regions[RANKS];
  static uint32_t told[RANKS];
  for (Region*& region : regions) {
    region = static_cast<Region*>(std::aligned_alloc(256, sizeof(Region)));
    std::memset(static_cast<void*>(region), 0, sizeof(Region));
  }
  for (int rank = 0; rank < RANKS; rank++) {
    regions[rank]->rank = rank, regions[rank]->ranks = RANKS;
    regions[rank]->patience = 60'000'000'000, regions[rank]->told = &told[rank];
    for (int peer = 0; peer < RANKS; peer++) regions[rank]->regions[peer] = regions[peer];
  }
  std::vector<std::thread> ranks;
  for (int rank = 0; rank < RANKS; rank++) ranks.emplace_back(run, rank, regions[rank]);
  for (auto& each : ranks) each.join();
  for (Region* region : regions) std::free(region);
}
