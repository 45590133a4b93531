// Kernels that memory bandwidth limits: packing a matrix into a panel, column
// sums, and the bias, ReLU and mask for a product of a library.
#pragma once

#include "kernels.h"
#include "shuffle.h"

namespace relu_mlp::cpu::RELU_MLP_ISA {
namespace {

#if defined(RELU_MLP_HAS_SHUFFLE)
// to(s, j) = from(j, s) for s < rows and j < cols, which are at most the number
// of lanes. For the other j, `to` gets 0. This takes log2(lanes) rounds. Each
// round zips vector i with vector i + lanes / 2.
template <bool is_whole, typename C>
RELU_MLP_INLINE void transpose_square(
    C* to,
    int64_t to_row,
    const C* from,
    int64_t from_row,
    int64_t rows,
    int64_t cols) {
  constexpr int64_t W = lanes<C>;
  constexpr auto all = std::make_index_sequence<W>();
  Vec<C> v[W], zipped[W];
  RELU_MLP_UNROLL
  for (int64_t j = 0; j < W; ++j) {
    if (is_whole) {
      v[j] = load(from + j * from_row);
    } else {
      v[j] = Vec<C>{};
      if (j < cols) {
        v[j] = rows < W ? load_some(from + j * from_row, rows)
                        : load(from + j * from_row);
      }
    }
  }
  RELU_MLP_UNROLL
  for (int64_t round = 1; round < W; round *= 2) {
    RELU_MLP_UNROLL
    for (int64_t i = 0; i < W / 2; ++i) {
      zipped[2 * i] = zip_lower(v[i], v[i + W / 2], all);
      zipped[2 * i + 1] = zip_upper(v[i], v[i + W / 2], all);
    }
    RELU_MLP_UNROLL
    for (int64_t i = 0; i < W; ++i) {
      v[i] = zipped[i];
    }
  }
  RELU_MLP_UNROLL
  for (int64_t s = 0; s < W; ++s) {
    if (is_whole || s < rows) {
      store(to + s * to_row, v[s]);
    }
  }
}
#endif

template <typename C>
void pack(C* to, int64_t to_row, Matrix<const C> b) {
  constexpr int64_t W = lanes<C>;
#if defined(RELU_MLP_HAS_SHUFFLE)
  if (b.row_stride == 1 && b.col_stride != 1) {
    for (int64_t j = 0; j < b.cols; j += W) {
      for (int64_t s = 0; s < b.rows; s += W) {
        const int64_t rows = b.rows - s, cols = b.cols - j;
        C* const square = to + s * to_row + j;
        if (rows >= W && cols >= W) {
          transpose_square<true>(
              square, to_row, &b.at(s, j), b.col_stride, W, W);
        } else {
          transpose_square<false>(
              square, to_row, &b.at(s, j), b.col_stride, rows, cols);
        }
      }
    }
    return;
  }
#endif
  const int64_t end = (b.cols + W - 1) / W * W;
  for (int64_t s = 0; s < b.rows; ++s) {
    C* const row = to + s * to_row;
    int64_t j = 0;
    if (b.col_stride == 1) {
      const C* const from = b.row(s);
      for (; j + W <= b.cols; j += W) {
        store(row + j, load(from + j));
      }
    }
    for (; j < b.cols; ++j) {
      row[j] = b.at(s, j);
    }
    for (; j < end; ++j) {
      row[j] = 0;
    }
  }
}

// sums[j] += the sum of column j of m, which is at most `vectors` vectors wide.
// Eight rows are summed in C before the sum is widened, because widening a
// number takes longer than adding it.
template <int vectors, typename C>
void column_sums_in_vectors(double* sums, Matrix<const C> m) {
  constexpr int64_t W = lanes<C>, together = 8;
  const int64_t last = m.cols - (vectors - 1) * W;
  const auto load_row = [&](int64_t i, int j) {
    const C* const from = m.row(i) + j * W;
    return j + 1 < vectors || last == W ? load(from) : load_some(from, last);
  };
  double totals[vectors * W] = {};
  for (int64_t first = 0; first < m.rows; first += together) {
    const int64_t rest = m.rows - first;
    const int64_t end = rest < together ? m.rows : first + together;
    Vec<C> parts[vectors] = {};
    int64_t i = first;
    // Two rows at once: this halves the chain of dependent additions.
    for (; i + 2 <= end; i += 2) {
      RELU_MLP_UNROLL
      for (int j = 0; j < vectors; ++j) {
        parts[j] += load_row(i, j) + load_row(i + 1, j);
      }
    }
    if (i < end) {
      RELU_MLP_UNROLL
      for (int j = 0; j < vectors; ++j) {
        parts[j] += load_row(i, j);
      }
    }
    C part[vectors * W];
    for (int j = 0; j < vectors; ++j) {
      store(part + j * W, parts[j]);
    }
    for (int64_t j = 0; j < vectors * W; ++j) {
      totals[j] += double(part[j]);
    }
  }
  for (int64_t j = 0; j < m.cols; ++j) {
    sums[j] += totals[j];
  }
}

template <typename C>
void column_sums(double* sums, Matrix<const C> m) {
  if (m.col_stride != 1) {
    for (int64_t i = 0; i < m.rows; ++i) {
      for (int64_t j = 0; j < m.cols; ++j) {
        sums[j] += double(m.at(i, j));
      }
    }
    return;
  }
  constexpr int64_t W = lanes<C>;
  int64_t j = 0;
  for (; j < m.cols; j += 4 * W) {
    Matrix<const C> part = m;
    part.data += j;
    part.cols = m.cols - j < 4 * W ? m.cols - j : 4 * W;
    if (part.cols > 3 * W) {
      column_sums_in_vectors<4>(sums + j, part);
    } else if (part.cols > 2 * W) {
      column_sums_in_vectors<3>(sums + j, part);
    } else if (part.cols > W) {
      column_sums_in_vectors<2>(sums + j, part);
    } else {
      column_sums_in_vectors<1>(sums + j, part);
    }
  }
}

template <typename C>
void bias_relu(Matrix<C> z, const C* bias, bool relu) {
  for (int64_t i = 0; i < z.rows; ++i) {
    C* const row = z.row(i);
    for (int64_t j = 0; j < z.cols; ++j) {
      const C sum = row[j] + (bias ? bias[j] : C(0));
      row[j] = relu && sum <= C(0) ? C(0) : sum;
    }
  }
}

template <typename C>
void mask(C* delta, const C* a, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    delta[i] = a[i] <= C(0) ? C(0) : delta[i];
  }
}

} // namespace
} // namespace relu_mlp::cpu::RELU_MLP_ISA
