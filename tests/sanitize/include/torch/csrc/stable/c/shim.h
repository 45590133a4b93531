// The functions of PyTorch that csrc/parallel.h needs, on our own threads. For
// tests/sanitize/driver.cpp this header is found before PyTorch's header of the
// same name.
#pragma once

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

// Like PyTorch's: equal parts of at least `grain`. A call from within a part is
// not split again.
inline int32_t torch_parallel_for(
    int64_t begin,
    int64_t end,
    int64_t grain,
    void (*f)(int64_t, int64_t, void*),
    void* context) {
  constexpr int64_t most_threads = 3;
  thread_local bool is_within = false;
  const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t parts = std::min(
      most_threads, ceil_div(end - begin, std::max<int64_t>(1, grain)));
  if (is_within || parts < 2) {
    f(begin, end, context);
    return 0;
  }
  std::vector<std::thread> threads;
  const int64_t part = ceil_div(end - begin, parts);
  for (int64_t from = begin; from < end; from += part) {
    threads.emplace_back([=] {
      is_within = true;
      f(from, std::min(end, from + part), context);
    });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  return 0;
}
