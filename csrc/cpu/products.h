// Matrix products by this package's kernels: packing, the walk over panels, and
// threads.
#pragma once

#include <algorithm>

#include "../parallel.h"
#include "buffer.h"
#include "isa/isa.h"
#include "plan.h"

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

// What a product does beside the sums: see Product.
template <typename C>
struct Finish {
  Epilogue epilogue = Epilogue::store;
  const C* bias = nullptr;
  Matrix<const C> mask = {};
  bool continues = false;
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
    each(ceil_div(b.cols, panel), b.rows * b.cols * 16,
         [&](int64_t p) { pack_panel(b, p, to + p * step); });
    return {to, b.rows, b.cols, step, panel,
            to + b.cols / panel * step, panel};
  }

  // Whether b has to be packed for a product of `rows` rows, because its own lie at
  // such a distance that they compete for the same lines of the cache.
  bool collides(Matrix<const C> b, int64_t rows) const {
    constexpr int64_t few_rows = 12; // too few to pay for a copy
    return b.row_stride * sizeof(C) % 1024 == 0 &&
        b.row_stride > 2 * kernels.panel && rows > few_rows;
  }

  // The panels of b, whose rows are contiguous, where it lies, but for a last panel
  // that cannot be read beyond its edge: that is copied to `to`, which takes
  // size_beside(k) elements.
  int64_t size_beside(int64_t k) const {
    return k * kernels.panel;
  }
  Panels<C> panels(Matrix<const C> b, C* to) const {
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

  // out = finish(a b). The rows of out and mask are contiguous.
  void multiply(
      Matrix<C> out,
      Matrix<const C> a,
      const Panels<C>& b,
      const Finish<C>& finish) const {
    const int64_t panel = kernels.panel, panels = ceil_div(b.n, panel);
    const int64_t group = parallel || panels > 1 ? group_of(out.rows)
                                                 : std::max<int64_t>(1, out.rows);
    const int64_t groups = ceil_div(out.rows, group);
    each(groups * panels, work_of_product(out.rows, b.n, b.k), [&](int64_t part) {
      const int64_t p = part % panels, row = part / panels * group;
      const bool is_cut = b.n - p * panel < panel;
      multiply_by_panel(
          out, a, row, std::min(group, out.rows - row), p,
          is_cut ? b.last : b.data + p * b.step, is_cut ? b.last_row : b.row,
          finish);
    });
  }

  // The same for b of any strides, each panel of which is packed just before its use,
  // into memory that stays in the cache.
  void pack_and_multiply(
      Matrix<C> out,
      Matrix<const C> a,
      Matrix<const C> b,
      const Finish<C>& finish) const {
    const int64_t panel = kernels.panel;
    each_range(
        ceil_div(b.cols, panel), work_of_product(out.rows, b.cols, b.rows),
        [&](int64_t begin, int64_t end) {
          const Buffer<C> packed(b.rows * panel);
          for (int64_t p = begin; p < end; ++p) {
            pack_panel(b, p, packed.get());
            multiply_by_panel(out, a, 0, out.rows, p, packed.get(), panel, finish);
          }
        });
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
    each(ceil_div(weight.rows, group), work_of_product(a.rows, weight.rows, weight.cols),
         [&](int64_t part) {
      const int64_t first = part * group;
      const int64_t rows = std::min(group, weight.rows - first);
      kernels.linear(
          {out.data + first, out.rows, rows, out.row_stride, 1}, a,
          {weight.row(first), rows, weight.cols, weight.row_stride, 1},
          bias ? bias + first : nullptr, relu);
    });
  }

  // The same by way of out^T = weight a^T: a is packed, which pays where it has fewer
  // rows than weight. Every thread packs it for itself, because what another has just
  // written comes slowly.
  void linear_transposed(
      Matrix<C> out,
      Matrix<const C> a,
      Matrix<const C> weight,
      const C* bias,
      bool relu) const {
    constexpr int64_t group = 48, tile = 6; // rows of weight
    const int64_t panel = kernels.panel, k = a.cols, panels = ceil_div(a.rows, panel);
    each_range(
        ceil_div(weight.rows, tile), work_of_product(a.rows, weight.rows, k),
        [&](int64_t begin, int64_t end) {
          const Buffer<C> packed(packed_size(k, a.rows));
          const Buffer<C> sums(group * panel), turned(panel * group);
          for (int64_t p = 0; p < panels; ++p) {
            pack_panel(a.transposed(), p, packed.get() + p * k * panel);
          }
          const int64_t last = std::min(weight.rows, end * tile);
          for (int64_t first = begin * tile; first < last; first += group) {
            const int64_t rows = std::min(group, last - first);
            for (int64_t p = 0; p < panels; ++p) {
              const int64_t cols = std::min(panel, a.rows - p * panel);
              kernels.product(
                  {rows, cols, k, weight.row(first), weight.row_stride, 1,
                   packed.get() + p * k * panel, panel, sums.get(), panel});
              kernels.pack(turned.get(), group, {sums.get(), cols, rows, 1, panel});
              const Matrix<C> part{
                  out.row(p * panel) + first, cols, rows, out.row_stride, 1};
              for (int64_t i = 0; i < cols; ++i) {
                std::copy_n(turned.get() + i * group, rows, part.row(i));
              }
              kernels.bias_relu(part, bias ? bias + first : nullptr, relu);
            }
          }
        });
  }

  // sums[j] += the sum of column j. Each column is summed by one thread.
  void column_sums(double* sums, Matrix<const C> m) const {
    const int64_t panel = kernels.panel;
    each(ceil_div(m.cols, panel), m.rows * m.cols * 16, [&](int64_t p) {
      Matrix<const C> part = m;
      part.data += p * panel * m.col_stride;
      part.cols = std::min(panel, m.cols - p * panel);
      kernels.column_sums(sums + p * panel, part);
    });
  }

 private:
  // Rows of a result for which all panels are gone through before the next, so that what
  // is written lies close together: equal parts of whole tiles. How many there are does
  // not change the result, every element of which is one sum in one order.
  static int64_t group_of(int64_t rows) {
    constexpr int64_t most = 48, tile = 6;
    rows = std::max<int64_t>(1, rows);
    return round_up(ceil_div(rows, ceil_div(rows, most)), tile);
  }

  // Panel p of b, of any strides, copied to `to`.
  void pack_panel(Matrix<const C> b, int64_t p, C* to) const {
    const int64_t panel = kernels.panel, col = p * panel;
    b.data += col * b.col_stride;
    b.cols = std::min(panel, b.cols - col);
    kernels.pack(to, panel, b);
  }

  // The rows [row, row + rows) of the columns of out that come from panel p of b.
  void multiply_by_panel(
      Matrix<C> out,
      Matrix<const C> a,
      int64_t row,
      int64_t rows,
      int64_t p,
      const C* b,
      int64_t b_row,
      const Finish<C>& finish) const {
    const int64_t panel = kernels.panel, col = p * panel;
    kernels.product(
        {rows, std::min(panel, out.cols - col), a.cols, a.row(row),
         a.row_stride, a.col_stride, b, b_row, out.row(row) + col,
         out.row_stride, finish.epilogue,
         finish.bias ? finish.bias + col : nullptr,
         finish.mask.data ? finish.mask.row(row) + col : nullptr,
         finish.mask.row_stride, finish.continues});
  }

  // Calls f(begin, end) for ranges of [0, count), which make `work`
  // multiply-adds together.
  template <typename F>
  void each_range(int64_t count, int64_t work, const F& f) const {
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
