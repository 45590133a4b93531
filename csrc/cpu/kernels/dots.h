// A linear layer without a packed copy of its weight. Every element of the
// result is the dot product of a row of a and a row of weight, with vectors
// along both.
//
// A tile has as many dot products as a vector has lanes, so adding up its sums
// over their lanes gives one vector of results. That costs as much as 3 or 4
// steps along the rows. It pays if rows are long, or if there are too few rows
// for a packed copy. Loads limit the speed: there is one for each multiply-add.
// With few rows, the bandwidth to the weight limits it.
#pragma once

#include "kernels.h"
#include "shuffle.h"

namespace relu_mlp::cpu::RELU_MLP_ISA {
namespace {

// The sums over the lanes of as many vectors as a vector has lanes.
template <typename C>
RELU_MLP_INLINE void sums_over_lanes(C* to, Vec<C>* v) {
  constexpr int64_t W = lanes<C>;
#if defined(RELU_MLP_HAS_SHUFFLE)
  constexpr auto all = std::make_index_sequence<W>();
  RELU_MLP_UNROLL
  for (int64_t half = W / 2; half > 0; half /= 2) {
    RELU_MLP_UNROLL
    for (int64_t i = 0; i < half; ++i) {
      v[i] =
          zip_lower(v[i], v[i + half], all) + zip_upper(v[i], v[i + half], all);
    }
  }
  store(to, v[0]);
#else
  for (int64_t i = 0; i < W; ++i) {
    C lane[W];
    store(lane, v[i]);
    to[i] = 0;
    for (const C& value : lane) {
      to[i] += value;
    }
  }
#endif
}

// A tile of `rows` rows of a by lanes / rows rows of weight. An index beyond
// the last row reads the last row again, and its result is not written. A sum
// over more than 64 vectors is a sum of sums, which keeps its rounding error
// small.
template <int rows, typename C>
void dots_tile(
    Matrix<C> out,
    Matrix<const C> a,
    Matrix<const C> weight,
    const C* bias,
    bool relu,
    int64_t row,
    int64_t col) {
  constexpr int64_t W = lanes<C>, cols = W / rows, block = 64 * W;
  const int64_t last_row = a.rows - 1, last_col = weight.rows - 1;
  const C *a_rows[rows], *weight_rows[cols];
  for (int64_t i = 0; i < rows; ++i) {
    a_rows[i] = a.row(row + i < last_row ? row + i : last_row);
  }
  for (int64_t j = 0; j < cols; ++j) {
    weight_rows[j] = weight.row(col + j < last_col ? col + j : last_col);
  }
  C z[W] = {};
  for (int64_t first = 0; first < a.cols; first += block) {
    Vec<C> sums[W] = {};
    const auto step = [&](const auto& load_from) {
      Vec<C> factors[cols];
      RELU_MLP_UNROLL
      for (int64_t j = 0; j < cols; ++j) {
        factors[j] = load_from(weight_rows[j]);
      }
      RELU_MLP_UNROLL
      for (int64_t i = 0; i < rows; ++i) {
        const Vec<C> factor = load_from(a_rows[i]);
        RELU_MLP_UNROLL
        for (int64_t j = 0; j < cols; ++j) {
          sums[i * cols + j] += factor * factors[j];
        }
      }
    };
    const int64_t end = first + block < a.cols ? first + block : a.cols;
    int64_t s = first;
    for (; s + W <= end; s += W) {
      step([s](const C* from) { return load(from + s); });
    }
    if (const int64_t rest = end - s) {
      step([s, rest](const C* from) { return load_some(from + s, rest); });
    }
    C sum[W];
    sums_over_lanes<C>(sum, sums);
    for (int64_t i = 0; i < W; ++i) {
      z[i] += sum[i];
    }
  }
  for (int64_t i = 0; i < rows && row + i < a.rows; ++i) {
    for (int64_t j = 0; j < cols && col + j < weight.rows; ++j) {
      C value = z[i * cols + j];
      value += bias ? bias[col + j] : C(0);
      out.row(row + i)[col + j] = relu && value <= C(0) ? C(0) : value;
    }
  }
}

template <typename C>
void linear_by_dots(
    Matrix<C> out,
    Matrix<const C> a,
    Matrix<const C> weight,
    const C* bias,
    bool relu) {
  constexpr int64_t W = lanes<C>;
  constexpr int tall = W >= 16 ? 4 : W >= 8 ? 2 : 1;
  if (a.rows == 1) {
    for (int64_t col = 0; col < weight.rows; col += W) {
      dots_tile<1>(out, a, weight, bias, relu, 0, col);
    }
    return;
  }
  // The rows of weight of one tile stay in the cache while all rows of a pass.
  for (int64_t col = 0; col < weight.rows; col += W / tall) {
    for (int64_t row = 0; row < a.rows; row += tall) {
      dots_tile<tall>(out, a, weight, bias, relu, row, col);
    }
  }
}

} // namespace
} // namespace relu_mlp::cpu::RELU_MLP_ISA
