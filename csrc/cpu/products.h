// Matrix products by this package's kernels: packing, the walk over panels, and
// threads.
#pragma once

#include <algorithm>

#include "../parallel.h"
#include "buffer.h"
#include "isa.h"

namespace relu_mlp::cpu {

// A matrix (k, n) as panels of columns. The last one, if it is narrower, may lie
// elsewhere.
template <typename C>
struct Panels {
  const C* data = nullptr;
  int64_t k = 0, n = 0;
  int64_t step = 0, row = 0; // from panel to panel; from row to row within one
  const C* last = nullptr;
  int64_t last_row = 0;
};

template <typename C>
class Products {
 public:
  const Kernels<C>& kernels;
  const bool parallel; // whether one product may be spread over several threads

  Products(const Kernels<C>& kernels, bool parallel)
      : kernels(kernels), parallel(parallel) {}

  // How many elements the panels of a matrix (k, n) take.
  int64_t packed_size(int64_t k, int64_t n) const {
    return k * round_up(n, kernels.panel);
  }

  // b, of any strides, copied to panels at `to`.
  Panels<C> pack(Matrix<const C> b, C* to) const {
    const int64_t panel = kernels.panel, step = b.rows * panel;
    each(ceil_div(b.cols, panel), b.rows * b.cols * 16, [&](int64_t p) {
      Matrix<const C> part = b;
      part.data += p * panel * b.col_stride;
      part.cols = std::min(panel, b.cols - p * panel);
      kernels.pack(to + p * step, panel, part);
    });
    return {to, b.rows, b.cols, step, panel,
            to + b.cols / panel * step, panel};
  }

  // The panels of b, whose rows are contiguous, for a product of `rows` rows:
  // where b lies, but for a last panel that cannot be read beyond its edge; or
  // all copied to `to`, if that pays.
  Panels<C> panels(Matrix<const C> b, int64_t rows, C* to) const {
    // Rows at such a distance compete for the same lines of the cache.
    const bool collide = b.row_stride * sizeof(C) % 1024 == 0 &&
        b.row_stride > 2 * kernels.panel;
    constexpr int64_t few_rows = 12; // too few to pay for a copy
    if (collide && rows > few_rows) {
      return pack(b, to);
    }
    const int64_t rest = b.cols % kernels.panel;
    Panels<C> where{b.data, b.rows, b.cols, kernels.panel, b.row_stride,
                    b.data + b.cols - rest, b.row_stride};
    if (rest % kernels.lanes != 0) {
      where.last_row = round_up(rest, kernels.lanes);
      kernels.pack(
          to, where.last_row,
          {where.last, b.rows, rest, b.row_stride, b.col_stride});
      where.last = to;
    }
    return where;
  }

  // out = a weight^T + bias, then ReLU if asked for, without packing. Rows are
  // contiguous.
  void linear(
      Matrix<C> out,
      Matrix<const C> a,
      Matrix<const C> weight,
      const C* bias,
      bool relu) const {
    constexpr int64_t group = 32; // rows of weight, to be read for all rows of a
    each(ceil_div(weight.rows, group), a.rows * weight.rows * weight.cols,
         [&](int64_t part) {
      const int64_t first = part * group;
      const int64_t rows = std::min(group, weight.rows - first);
      kernels.linear(
          {out.data + first, out.rows, rows, out.row_stride, 1}, a,
          {weight.row(first), rows, weight.cols, weight.row_stride, 1},
          bias ? bias + first : nullptr, relu);
    });
  }

  // out = epilogue(a b) for b of any strides, each panel of which is packed just
  // before its use, into memory that stays in the cache.
  void pack_and_multiply(
      Matrix<C> out,
      Matrix<const C> a,
      Matrix<const C> b,
      Epilogue epilogue,
      const C* bias) const {
    const int64_t panel = kernels.panel;
    each_range(
        ceil_div(b.cols, panel), out.rows * b.rows * b.cols,
        [&](int64_t begin, int64_t end) {
          const Buffer<C> packed(b.rows * panel);
          for (int64_t p = begin; p < end; ++p) {
            const int64_t col = p * panel;
            const int64_t cols = std::min(panel, b.cols - col);
            kernels.pack(
                packed.get(), panel,
                {b.data + col * b.col_stride, b.rows, cols, b.row_stride,
                 b.col_stride});
            kernels.product(
                {out.rows, cols, b.rows, a.data, a.row_stride, a.col_stride,
                 packed.get(), panel, out.data + col, out.row_stride, epilogue,
                 bias ? bias + col : nullptr});
          }
        });
  }

  // out = epilogue(a b), or where it continues a sum epilogue(out + a b). The rows
  // of out and mask are contiguous.
  void multiply(
      Matrix<C> out,
      Matrix<const C> a,
      const Panels<C>& b,
      Epilogue epilogue,
      const C* bias = nullptr,
      Matrix<const C> mask = {},
      bool continues = false) const {
    // Enough parts for any number of threads. How many, does not change the
    // result: every element of out is one sum in one order.
    constexpr int64_t parts = 32, tallest_tile = 48;
    const int64_t panel = kernels.panel, panels = ceil_div(b.n, panel);
    int64_t group = std::max<int64_t>(1, out.rows);
    if (parallel && panels > 0) {
      group = round_up(
          ceil_div(group, std::max<int64_t>(1, parts / panels)), tallest_tile);
    }
    const int64_t groups = ceil_div(out.rows, group);
    each(panels * groups, out.rows * b.n * b.k, [&](int64_t part) {
      const int64_t p = part / groups, col = p * panel;
      const int64_t row = part % groups * group;
      const bool is_cut = b.n - col < panel;
      kernels.product(
          {std::min(group, out.rows - row), is_cut ? b.n - col : panel, b.k,
           a.row(row), a.row_stride, a.col_stride,
           is_cut ? b.last : b.data + p * b.step, is_cut ? b.last_row : b.row,
           out.row(row) + col, out.row_stride, epilogue,
           bias ? bias + col : nullptr,
           mask.data ? mask.row(row) + col : nullptr, mask.row_stride,
           continues});
    });
  }

 private:
  // Calls f(begin, end) for ranges of [0, count), which make `work`
  // multiply-adds together.
  template <typename F>
  void each_range(int64_t count, int64_t work, const F& f) const {
    // Below this, to wake a thread takes longer than what it takes over.
    constexpr int64_t min_work = 1 << 21;
    parallel_for(count, parallel && work >= min_work ? 1 : count, f);
  }

  // Calls f(0) ... f(count - 1).
  template <typename F>
  void each(int64_t count, int64_t work, const F& f) const {
    each_range(count, work, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        f(i);
      }
    });
  }
};

} // namespace relu_mlp::cpu
