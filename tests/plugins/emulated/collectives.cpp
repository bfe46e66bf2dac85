// The kernels of `plugins/collectives` as functions of a shared library: a launch returns when it has ended.
#include <functional>
#include <memory>
#include <random>
#include <vector>

#include "exchange.cu"
#include "norm.cu"

static void launch(int programs, const std::function<void()>& kernel) {
  std::vector<std::thread> threads;
  std::vector<std::vector<float>> shared(programs, std::vector<float>(THREADS));
  std::vector<std::unique_ptr<std::barrier<>>> barriers;
  std::mt19937 random(std::random_device{}());
  for (int p = 0; p < programs; p++) barriers.push_back(std::make_unique<std::barrier<>>(THREADS));
  for (int p = 0; p < programs; p++) {
    auto late = std::chrono::microseconds(random() % 300);  // programs of a GPU start in no order that one may count on
    for (int t = 0; t < THREADS; t++) {
      threads.emplace_back([&, p, t, late] {
        current = {p, programs, barriers[p].get(), shared[p].data()};
        current_thread = t;
        std::this_thread::sleep_for(late);
        kernel();
      });
    }
  }
  for (auto& each : threads) each.join();
}

extern "C" {
void run_one_shot(int programs, void* x, void* y, Region* own, int elements) {
  launch(programs, [=] { one_shot(x, y, own, elements); });
}
void run_two_shot(int programs, void* x, void* y, Region* own, int elements) {
  launch(programs, [=] { two_shot(x, y, own, elements); });
}
void run_gather(int programs, void* x, void* y, Region* own, int rows, int width, int pitch, int unit) {
  launch(programs, [=] { gather(x, y, own, rows, width, pitch, unit); });
}
void run_one_shot_norm(int programs, void* residual, void* branch, void* weight, void* y, void* x, Region* own, int rows,
                       int hidden, float epsilon) {
  launch(programs, [=] { one_shot_norm(residual, branch, weight, y, x, own, rows, hidden, epsilon); });
}
}
