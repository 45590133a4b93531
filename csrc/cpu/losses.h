// The losses of a block of rows: their sum, and delta_L, their gradient at z_L.
// docs/derivation.md derives the formulas.
//
// Values are summed in double precision, in an order that does not depend on
// the number of threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "../network.h"
#include "../parallel.h"
#include "buffer.h"
#include "elementwise.h"

namespace relu_mlp::cpu {

// -- Losses of elements -------------------------------------------------------

// The sum of (y - target)^2, and the gradient of scale times that sum through
// phi. Row is the row of phi in the table of activations. The compiler
// vectorizes the loop because its eight sums are independent.
template <typename Row, typename F>
double squared_error(
    F* delta,
    const F* y,
    const F* target,
    int64_t count,
    double scale) {
  constexpr int64_t together = 8;
  const F slope = F(2 * scale);
  double sums[together] = {};
  int64_t i = 0;
  for (; i + together <= count; i += together) {
    F output[together], error[together];
    for (int64_t u = 0; u < together; ++u) {
      output[u] = y[i + u];
      error[u] = output[u] - target[i + u];
    }
    for (int64_t u = 0; u < together; ++u) {
      sums[u] += double(error[u]) * double(error[u]);
    }
    for (int64_t u = 0; u < together; ++u) {
      delta[i + u] = Row::backward(slope * error[u], output[u]);
    }
  }
  for (; i < count; ++i) {
    const F output = y[i], error = output - target[i];
    sums[0] += double(error) * double(error);
    delta[i] = Row::backward(slope * error, output);
  }
  double sum = 0;
  for (const double part : sums) {
    sum += part;
  }
  return sum;
}

// delta = delta * phi'(z).
template <typename Row, typename F>
void through_activation(F* delta, const F* y, int64_t count) {
  if constexpr (!std::is_same_v<Row, ActivationRow<Activation::none>>) {
    for (int64_t i = 0; i < count; ++i) {
      delta[i] = Row::backward(delta[i], y[i]);
    }
  }
}

// The sum of a loss that consists of elements, and its gradient through phi.
template <typename Row, typename F>
double element_loss(
    Loss loss,
    F* delta,
    const F* y,
    const F* target,
    int64_t count,
    double scale) {
  const auto& kernels = chosen_kernels<F>();
  const auto by_kernel = [&](ElementLoss<F> kernel) {
    const double sum = kernel(delta, y, target, count, F(scale));
    through_activation<Row>(delta, y, count);
    return sum;
  };
  switch (loss) {
    case Loss::sse:
    case Loss::half_sse:
    case Loss::mse:
      return squared_error<Row>(delta, y, target, count, scale);
    case Loss::l1:
      return by_kernel(kernels.l1);
    case Loss::huber:
      return by_kernel(kernels.huber);
    case Loss::bce_with_logits:
      return by_kernel(kernels.bce_with_logits);
    case Loss::cross_entropy:
      break; // consists of rows
  }
  return 0;
}

// The elements that are converted from 16 bits at once, in one row and in
// several.
constexpr int64_t converted_at_once = 512, converted_rows_elements = 4096;

// element_loss for elements that may have 16 bits.
template <typename Row, typename C, typename T>
double converted_element_loss(
    Loss loss,
    C* delta,
    const C* y,
    const T* target,
    int64_t count,
    double scale) {
  using F = compute_t<C>;
  if constexpr (!is_16bit<C> && !is_16bit<T>) {
    return element_loss<Row>(loss, delta, y, target, count, scale);
  } else {
    F deltas[converted_at_once], ys[converted_at_once],
        targets[converted_at_once];
    double sum = 0;
    for (int64_t i = 0; i < count; i += converted_at_once) {
      const int64_t piece = std::min(converted_at_once, count - i);
      F* to = deltas;
      if constexpr (!is_16bit<C>) {
        to = delta + i;
      }
      sum += element_loss<Row>(
          loss, to, computed(y + i, ys, piece),
          computed(target + i, targets, piece), piece, scale);
      if constexpr (is_16bit<C>) {
        round_to(delta + i, deltas, piece);
      }
    }
    return sum;
  }
}

// -- Cross entropy, row by row -----------------------------------------------

// The logarithm of a sum of at least 1. (log itself needs a newer C library than
// the rest of this package, and so would the wheel.)
inline double log_of(double sum) {
  return std::log1p(sum - 1);
}

// The softmax of a row y: exps[j] / sum, with exps[j] = exp(y[j] - largest).
template <typename F>
struct SoftmaxRow {
  const F* exps;
  F largest;
  double sum;

  // -log of the softmax at an element y of the row.
  double cross_entropy(F y) const {
    return log_of(sum) - (double(y) - double(largest));
  }
};

// Calls f(first, count, g, y) for pieces of a row: g gets the gradient at y,
// which then goes through phi to delta. exps may be delta.
template <typename Row, typename C, typename G>
void write_delta(C* delta, const C* y, int64_t cols, const G& f) {
  using F = compute_t<C>;
  F gs[converted_at_once], ys[converted_at_once];
  for (int64_t first = 0; first < cols; first += converted_at_once) {
    const int64_t count = std::min(converted_at_once, cols - first);
    F* g = gs;
    if constexpr (!is_16bit<C>) {
      g = delta + first;
    }
    f(first, count, g);
    if constexpr (!std::is_same_v<Row, ActivationRow<Activation::none>>) {
      through_activation<Row>(g, computed(y + first, ys, count), count);
    }
    if constexpr (is_16bit<C>) {
      round_to(delta + first, gs, count);
    }
  }
}

// The cross entropy of a row with a class, and its gradient
// scale * (softmax - [j = class]). An ignored row has none. If its softmax is
// NaN, so is its gradient, as in PyTorch.
template <typename Row, typename C>
double cross_entropy_with_class(
    C* delta,
    const C* y,
    int64_t cols,
    int64_t row_class,
    const SoftmaxRow<compute_t<C>>& softmax,
    double scale) {
  using F = compute_t<C>;
  const bool is_ignored = row_class == ignored_class;
  const double row_scale = is_ignored ? 0 : scale;
  const double value = is_ignored ? 0 : softmax.cross_entropy(F(y[row_class]));
  const F factor = F(row_scale / softmax.sum);
  write_delta<Row>(delta, y, cols, [&](int64_t first, int64_t count, F* g) {
    for (int64_t j = 0; j < count; ++j) {
      g[j] = softmax.exps[first + j] * factor;
    }
    if (row_class >= first && row_class < first + count) {
      g[row_class - first] -= F(row_scale);
    }
  });
  return value;
}

// The cross entropy of a row with probabilities t, and its gradient
// scale * (softmax * sum(t) - t).
template <typename Row, typename C, typename T>
double cross_entropy_with_probabilities(
    C* delta,
    const C* y,
    const T* target,
    int64_t cols,
    const SoftmaxRow<compute_t<C>>& softmax,
    double scale) {
  using F = compute_t<C>;
  constexpr int64_t together = 8;
  F ys[converted_at_once], targets[converted_at_once];
  const F log_sum = F(log_of(softmax.sum)), largest = softmax.largest;
  double values[together] = {}, totals[together] = {};
  for (int64_t first = 0; first < cols; first += converted_at_once) {
    const int64_t count = std::min(converted_at_once, cols - first);
    const F* const z = computed(y + first, ys, count);
    const F* const t = computed(target + first, targets, count);
    int64_t j = 0;
    for (; j + together <= count; j += together) {
      for (int64_t u = 0; u < together; ++u) {
        values[u] += double(t[j + u] * (log_sum - (z[j + u] - largest)));
        totals[u] += double(t[j + u]);
      }
    }
    for (; j < count; ++j) {
      values[0] += double(t[j] * (log_sum - (z[j] - largest)));
      totals[0] += double(t[j]);
    }
  }
  double value = 0, total = 0;
  for (int64_t u = 0; u < together; ++u) {
    value += values[u];
    total += totals[u];
  }
  const F factor = F(scale * total / softmax.sum);
  write_delta<Row>(delta, y, cols, [&](int64_t first, int64_t count, F* g) {
    const F* const t = computed(target + first, targets, count);
    for (int64_t j = 0; j < count; ++j) {
      g[j] = softmax.exps[first + j] * factor - t[j] * F(scale);
    }
  });
  return value;
}

template <typename Row, typename C, typename T>
double cross_entropy_of_row(
    Matrix<C> delta,
    Matrix<const C> y,
    const Target<T>& target,
    int64_t i,
    const SoftmaxRow<compute_t<C>>& softmax,
    double scale) {
  if (target.classes.data) {
    return cross_entropy_with_class<Row>(
        delta.row(i), y.row(i), y.cols, target.classes.data[i], softmax, scale);
  }
  return cross_entropy_with_probabilities<Row>(
      delta.row(i), y.row(i), target.values.row(i), y.cols, softmax, scale);
}

// The sum of the cross entropies of all rows, and their gradient.
template <typename Row, typename C, typename T>
double cross_entropy(
    Matrix<C> delta,
    Matrix<const C> y,
    const Target<T>& target,
    double scale) {
  using F = compute_t<C>;
  constexpr int64_t most_rows = 64;
  const int64_t cols = y.cols;
  const int64_t together = is_16bit<C>
      ? std::clamp<int64_t>(
            converted_rows_elements / std::max<int64_t>(1, cols), 1, most_rows)
      : most_rows;
  const Buffer<F> converted(is_16bit<C> ? together * cols : 0);
  F largest[most_rows];
  double sums[most_rows], sum = 0;
  for (int64_t first = 0; first < y.rows; first += together) {
    const int64_t rows = std::min(together, y.rows - first);
    Matrix<F> exps = contiguous(converted.get(), rows, cols);
    Matrix<const F> logits = as_const(exps);
    if constexpr (is_16bit<C>) {
      widen(exps.data, y.row(first), rows * cols);
    } else {
      exps = rows_of(delta, first, rows);
      logits = rows_of(y, first, rows);
    }
    chosen_kernels<F>().softmax(exps, logits, largest, sums);
    for (int64_t i = 0; i < rows; ++i) {
      sum += cross_entropy_of_row<Row>(
          delta, y, target, first + i, {exps.row(i), largest[i], sums[i]},
          scale);
    }
  }
  return sum;
}

// -- Any loss ----------------------------------------------------------------

// The sum of f(begin, end) over parts of [0, count) of at most `part` each, in
// order.
template <typename F>
double sum_of_parts(int64_t count, int64_t part, const F& f) {
  if (count <= part) {
    return f(int64_t(0), count);
  }
  std::vector<double> sums(ceil_div(count, part));
  parallel_for(std::ssize(sums), 1, [&](int64_t first, int64_t last) {
    for (int64_t n = first; n < last; ++n) {
      sums[n] = f(n * part, std::min(count, (n + 1) * part));
    }
  });
  double sum = 0;
  for (const double value : sums) {
    sum += value;
  }
  return sum;
}

// delta = the gradient of a loss at z, through phi. Returns the sum, which the
// caller multiplies by `scale`. y, delta and the target have the same rows and
// are contiguous. Threads share parts of about `elements_per_task` elements,
// unless the caller is one of several already.
template <typename C, typename T>
double loss_and_delta(
    Loss loss,
    Activation phi,
    Matrix<C> delta,
    Matrix<const C> y,
    const Target<T>& target,
    double scale,
    int64_t elements_per_task) {
  return with_row(phi, [&]<typename Row>() {
    if (loss != Loss::cross_entropy) {
      return sum_of_parts(
          y.rows * y.cols, elements_per_task, [&](int64_t begin, int64_t end) {
            return converted_element_loss<Row>(
                loss, delta.data + begin, y.data + begin,
                target.values.data + begin, end - begin, scale);
          });
    }
    const int64_t rows =
        ceil_div(elements_per_task, std::max<int64_t>(1, y.cols));
    return sum_of_parts(y.rows, rows, [&](int64_t begin, int64_t end) {
      const int64_t part = end - begin;
      return cross_entropy<Row>(
          rows_of(delta, begin, part), rows_of(y, begin, part),
          rows_of(target, begin, part), scale);
    });
  });
}

} // namespace relu_mlp::cpu
