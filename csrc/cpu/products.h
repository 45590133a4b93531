// Matrix products by this package's kernels in float and double: panels,
// packing, and the threads that share one product.
//
// C is float or double. A panel is Kernels::panel columns of a right operand.
// The rows of the operand are contiguous within it.
#pragma once

#include <algorithm>

#include "buffer.h"
#include "kernels/kernels.h"
#include "sharing.h"

namespace relu_mlp::cpu {

// A matrix (k, n) as panels. The last panel may be stored elsewhere if it has
// fewer columns.
template <typename C>
struct Panels {
  const C* data = nullptr;
  int64_t k = 0, n = 0;
  int64_t step = 0, row = 0; // from panel to panel; from row to row within one
  const C* last = nullptr;
  int64_t last_row = 0;
};

// The epilogue of a product: see ProductArgs in kernels.h.
template <typename C>
struct EpilogueArgs {
  Epilogue epilogue = Epilogue::store;
  const C* bias = nullptr; // (n)
  Matrix<const C> mask = {}; // (m, n)
  bool continues = false;
};

template <typename C>
class Products {
 public:
  Products(const Kernels<C>& kernels, const Plan& plan)
      : kernels_(kernels), tuning_(*plan.tuning), sharing_(plan) {}

  // How many elements the panels of a matrix (k, n) take.
  int64_t packed_size(int64_t k, int64_t n) const {
    return k * round_up(n, kernels_.panel);
  }

  // Copies b (k, n), of any strides, to panels at `to`.
  Panels<C> pack(Matrix<const C> b, C* to) const {
    const int64_t panel = kernels_.panel, step = b.rows * panel;
    for_each(
        ceil_div(b.cols, panel), sharing_.work_to_pack(b.rows, b.cols),
        [&](int64_t p) { pack_panel(b, p, to + p * step); });
    return {to, b.rows, b.cols, step, panel, to + b.cols / panel * step, panel};
  }

  // Views b (k, n), whose rows are contiguous, as panels. Only a ragged last
  // panel is copied, to `to`, because kernels read whole vectors.
  Panels<C> view_as_panels(Matrix<const C> b, C* to) const {
    const int64_t rest = b.cols % kernels_.panel;
    Panels<C> view{b.data,         b.rows,       b.cols,
                   kernels_.panel, b.row_stride, b.data + b.cols - rest,
                   b.row_stride};
    if (rest % kernels_.lanes != 0) {
      view.last_row = round_up(rest, kernels_.lanes);
      kernels_.pack(
          to, view.last_row,
          {view.last, b.rows, rest, b.row_stride, b.col_stride});
      view.last = to;
    }
    return view;
  }
  // How many elements view_as_panels needs at `to`.
  int64_t edge_panel_size(int64_t k) const {
    return k * kernels_.panel;
  }

  // out (m, n) = epilogue(a (m, k) b (k, n)). Rows of out and mask are
  // contiguous.
  void multiply(
      Matrix<C> out,
      Matrix<const C> a,
      const Panels<C>& b,
      const EpilogueArgs<C>& args) const {
    const int64_t panel = kernels_.panel, panels = ceil_div(b.n, panel);
    const int64_t group = sharing_.is_shared() || panels > 1
        ? rows_of_group(out.rows)
        : std::max<int64_t>(1, out.rows);
    const int64_t groups = ceil_div(out.rows, group);
    const int64_t work = sharing_.work_of_product(out.rows, b.n, b.k);
    for_each(groups * panels, work, [&](int64_t part) {
      const int64_t p = part % panels, row = part / panels * group;
      const bool is_cut = b.n - p * panel < panel;
      multiply_by_panel(
          out, a, row, std::min(group, out.rows - row), p,
          is_cut ? b.last : b.data + p * b.step, is_cut ? b.last_row : b.row,
          args);
    });
  }

  // The same for b of any strides. Each panel is packed just before its use,
  // into memory that stays in the cache.
  void pack_and_multiply(
      Matrix<C> out,
      Matrix<const C> a,
      Matrix<const C> b,
      const EpilogueArgs<C>& args) const {
    const int64_t panel = kernels_.panel;
    sharing_.for_each_range(
        ceil_div(b.cols, panel),
        sharing_.work_of_product(out.rows, b.cols, b.rows),
        [&](int64_t begin, int64_t end) {
          const Buffer<C> packed(b.rows * panel);
          for (int64_t p = begin; p < end; ++p) {
            pack_panel(b, p, packed.get());
            multiply_by_panel(
                out, a, 0, out.rows, p, packed.get(), panel, args);
          }
        });
  }

  // out (m, n) = a (m, k) weight^T + bias, then ReLU if `relu`, by dot products
  // of rows: weight (n, k) is not packed. Rows are contiguous. bias may be
  // null.
  void linear_unpacked(
      Matrix<C> out,
      Matrix<const C> a,
      Matrix<const C> weight,
      const C* bias,
      bool relu) const {
    const int64_t group = tuning_.unpacked_rows_per_group; // of weight
    const int64_t work =
        sharing_.work_of_product(a.rows, weight.rows, weight.cols);
    for_each(ceil_div(weight.rows, group), work, [&](int64_t part) {
      const int64_t first = part * group;
      const int64_t rows = std::min(group, weight.rows - first);
      kernels_.linear_by_dots(
          {out.data + first, out.rows, rows, out.row_stride, 1}, a,
          {weight.row(first), rows, weight.cols, weight.row_stride, 1},
          bias ? bias + first : nullptr, relu);
    });
  }

  // The same, computed as out^T = weight a^T. The rows of a are packed, which
  // pays if there are fewer of them than of weight. Every thread packs them for
  // itself, because a core reads data slowly that another core has just
  // written.
  void linear_packing_rows(
      Matrix<C> out,
      Matrix<const C> a,
      Matrix<const C> weight,
      const C* bias,
      bool relu) const {
    const int64_t tile = kernels_.tile_rows, group = most_rows_of_group();
    const int64_t panel = kernels_.panel, k = a.cols,
                  panels = ceil_div(a.rows, panel);
    sharing_.for_each_range(
        ceil_div(weight.rows, tile),
        sharing_.work_of_product(a.rows, weight.rows, k),
        [&](int64_t begin, int64_t end) {
          const Buffer<C> packed(packed_size(k, a.rows));
          const Buffer<C> sums(group * panel), transposed(panel * group);
          for (int64_t p = 0; p < panels; ++p) {
            pack_panel(a.transposed(), p, packed.get() + p * k * panel);
          }
          const int64_t last = std::min(weight.rows, end * tile);
          for (int64_t first = begin * tile; first < last; first += group) {
            const int64_t rows = std::min(group, last - first);
            for (int64_t p = 0; p < panels; ++p) {
              const int64_t cols = std::min(panel, a.rows - p * panel);
              kernels_.product(
                  {rows, cols, k, weight.row(first), weight.row_stride, 1,
                   packed.get() + p * k * panel, panel, sums.get(), panel});
              kernels_.pack(
                  transposed.get(), group, {sums.get(), cols, rows, 1, panel});
              const Matrix<C> part{
                  out.row(p * panel) + first, cols, rows, out.row_stride, 1};
              for (int64_t i = 0; i < cols; ++i) {
                std::copy_n(transposed.get() + i * group, rows, part.row(i));
              }
              kernels_.bias_relu(part, bias ? bias + first : nullptr, relu);
            }
          }
        });
  }

  // sums[j] += the sum of column j of m. Each column is summed by one thread.
  void column_sums(double* sums, Matrix<const C> m) const {
    const int64_t panel = kernels_.panel;
    for_each(
        ceil_div(m.cols, panel), sharing_.work_to_pack(m.rows, m.cols),
        [&](int64_t p) {
          Matrix<const C> part = m;
          part.data += p * panel * m.col_stride;
          part.cols = std::min(panel, m.cols - p * panel);
          kernels_.column_sums(sums + p * panel, part);
        });
  }

 private:
  // The rows of a result are computed in groups. A group goes through all
  // panels before the next group starts, so writes stay close together. Groups
  // are equal parts of whole tiles. Their number does not change the result:
  // every element is one sum in one order.
  int64_t most_rows_of_group() const {
    return tuning_.tiles_per_group * kernels_.tile_rows;
  }
  int64_t rows_of_group(int64_t rows) const {
    rows = std::max<int64_t>(1, rows);
    return round_up(
        ceil_div(rows, ceil_div(rows, most_rows_of_group())),
        kernels_.tile_rows);
  }

  // Copies panel p of b, of any strides, to `to`.
  void pack_panel(Matrix<const C> b, int64_t p, C* to) const {
    const int64_t panel = kernels_.panel, col = p * panel;
    b.data += col * b.col_stride;
    b.cols = std::min(panel, b.cols - col);
    kernels_.pack(to, panel, b);
  }

  // Computes the rows [row, row + rows) of the columns of out that come from
  // panel p of b.
  void multiply_by_panel(
      Matrix<C> out,
      Matrix<const C> a,
      int64_t row,
      int64_t rows,
      int64_t p,
      const C* b,
      int64_t b_row,
      const EpilogueArgs<C>& args) const {
    const int64_t panel = kernels_.panel, col = p * panel;
    kernels_.product(
        {rows, std::min(panel, out.cols - col), a.cols, a.row(row),
         a.row_stride, a.col_stride, b, b_row, out.row(row) + col,
         out.row_stride, args.epilogue, args.bias ? args.bias + col : nullptr,
         args.mask.data ? args.mask.row(row) + col : nullptr,
         args.mask.row_stride, args.continues});
  }

  // Calls f(0) ... f(count - 1), which take `work` multiply-adds in total.
  template <typename F>
  void for_each(int64_t count, int64_t work, const F& f) const {
    sharing_.for_each_range(count, work, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        f(i);
      }
    });
  }

  const Kernels<C>& kernels_;
  const Tuning& tuning_;
  const Sharing sharing_;
};

} // namespace relu_mlp::cpu
