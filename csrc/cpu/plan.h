// How a call is served. A function of the shape alone, never of the number of
// threads: so results do not depend on it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../parallel.h"
#include "kernels/kernels.h"

namespace relu_mlp::cpu {

// Whose products are used: this package's of floats, its own of pairs of bfloat16, or
// PyTorch's.
enum class WhoseProducts { own, pairs, library };

// The multiply-adds of a product (m, n) = (m, k) (k, n), or as many as take the time
// that its largest matrix takes to be read or written.
inline int64_t work_of_product(int64_t m, int64_t n, int64_t k) {
  constexpr int64_t of_an_element = 64;
  return std::max(m * n * k, of_an_element * std::max({m * n, m * k, n * k}));
}
// Below this, to wake a thread takes longer than what it takes over.
constexpr int64_t min_work = 1 << 21;

struct Strategy {
  WhoseProducts products;
  int64_t chunk; // rows that have sums of their own
  int64_t block; // rows that go through all layers at once
  int64_t chunks;

  // Calls f(c, begin, end) for every chunk c of the rows, on several threads.
  template <typename F>
  void each_chunk(int64_t rows, const F& f) const {
    parallel_for(chunks, 1, [&](int64_t first, int64_t last) {
      for (int64_t c = first; c < last; ++c) {
        f(c, std::min(rows, c * chunk), std::min(rows, (c + 1) * chunk));
      }
    });
  }
};

// What it depends on beside the shape: the dtype, and the instruction set.
struct Means {
  bool is_narrow; // whether the numbers have 16 bits
  Pairs pairs; // how they are multiplied in pairs
  int64_t panel; // columns of a panel of this package's products
  bool outruns_library; // whether these are faster than PyTorch's at any size
};

// `widths` are those of x, of every hidden layer and of y.
Strategy choose_strategy(
    int64_t rows,
    const std::vector<int64_t>& widths,
    const Means& means);

} // namespace relu_mlp::cpu
