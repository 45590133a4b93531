// How a call is served. A function of the shape alone, never of the number of
// threads: so results do not depend on it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../parallel.h"

namespace relu_mlp::cpu {

// Whose products are used: this package's of floats, those of AMX, or PyTorch's.
enum class WhoseProducts { own, amx, library };

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

// `widths` are those of x, of every hidden layer and of y; `is_narrow` says
// whether the numbers have 16 bits, `has_amx` whether AMX multiplies them, and `panel`
// how many columns a panel of this package's products has.
Strategy choose_strategy(
    int64_t rows,
    const std::vector<int64_t>& widths,
    bool is_narrow,
    bool has_amx,
    int64_t panel);

} // namespace relu_mlp::cpu
