// Packing a matrix into a panel, and what surrounds a product that a library
// did: kernels that are limited by memory.
#pragma once

#include "kernels.h"
#include "shuffle.h"

namespace relu_mlp::cpu::RELU_MLP_ISA {
namespace {

#if defined(RELU_MLP_HAS_SHUFFLE)
// to(s, j) = from(j, s) for s < rows and j < cols, at most a square of vectors;
// `to` gets 0 for the other j. log2(lanes) rounds, in each of which vector i is
// zipped with vector i + lanes / 2.
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

template <typename C>
void column_sums(double* sums, Matrix<const C> m) {
  for (int64_t i = 0; i < m.rows; ++i) {
    const C* const row = m.row(i);
    if (m.col_stride == 1) { // known here, this is vector code
      for (int64_t j = 0; j < m.cols; ++j) {
        sums[j] += double(row[j]);
      }
    } else {
      for (int64_t j = 0; j < m.cols; ++j) {
        sums[j] += double(row[j * m.col_stride]);
      }
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
