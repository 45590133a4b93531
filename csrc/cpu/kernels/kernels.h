// What the kernels of one instruction set can do, as plain functions. The same
// text (gemm.h, convert.h) is compiled once for each instruction set; which table
// is used is decided when the library is loaded (isa.cpp).
#pragma once

#include <cstdint>

#include "../../mlp.h"

namespace relu_mlp::cpu {

// What happens to a tile of a product before it is written.
enum class Epilogue {
  store, // out = product
  bias, // out = product + bias
  bias_relu, // out = max(product + bias, 0)
  mask, // out = product where mask > 0 or is NaN, else 0
};

// out (m, n) = epilogue(a (m, k) b (k, n)), one panel of columns wide; where it
// continues a sum, out = epilogue(out + a b).
template <typename C>
struct Product {
  int64_t m, n, k; // n <= panel
  const C* a; // any strides
  int64_t a_row, a_col;
  const C* b; // rows contiguous, readable up to the next multiple of `lanes`
  int64_t b_row;
  C* out; // rows contiguous; nothing beyond column n is written
  int64_t out_row;
  Epilogue epilogue = Epilogue::store;
  const C* bias = nullptr; // (n), contiguous; null for 0
  const C* mask = nullptr; // (m, n), rows contiguous
  int64_t mask_row = 0;
  bool continues = false;
};

template <typename C>
struct Kernels {
  int64_t lanes; // elements of a vector
  int64_t panel; // columns that one product may have at most
  void (*product)(const Product<C>&);
  // to (k, n) = b (k, n) of any strides, with contiguous rows at a distance of
  // to_row, and 0 in the columns from n to the next multiple of `lanes`.
  void (*pack)(C* to, int64_t to_row, Matrix<const C> b);
  // out (m, n) = bias + a (m, k) weight^T, then ReLU if asked for, without a
  // packed copy of weight (n, k). All rows are contiguous; bias may be null.
  void (*linear)(
      Matrix<C> out,
      Matrix<const C> a,
      Matrix<const C> weight,
      const C* bias,
      bool relu);
  // sums[j] += sum_i m(i, j), in double precision but for sums of eight. Any strides.
  void (*column_sums)(double* sums, Matrix<const C> m);
  // z += bias, then ReLU if asked for, in place; bias may be null.
  void (*bias_relu)(Matrix<C> z, const C* bias, bool relu);
  // delta = delta where a > 0 or is NaN, else 0, in place.
  void (*mask)(C* delta, const C* a, int64_t count);
};

// What is done with numbers of a 16-bit format, given as their bits. Roundings
// are to the nearest, ties to even; NaN stays NaN.
struct Format {
  void (*widen)(float* to, const uint16_t* from, int64_t count);
  void (*narrow)(uint16_t* to, const float* from, int64_t count);
  void (*relu)(uint16_t* z, int64_t count); // z = max(z, 0), in place
  // delta = delta where a > 0 or is NaN, else 0
  void (*mask)(uint16_t* delta, const uint16_t* a, int64_t count);
  // sums[j] += sum_i m(i, j) for at most 64 columns, rows contiguous
  void (*column_sums)(double* sums, Matrix<const uint16_t> m);
};

// out (m, n) = epilogue(a (m, k) b (k, n)) in bfloat16, with sums in float. The rows
// of a, out and mask are contiguous; b is packed.
struct PairProduct {
  int64_t m, n, k;
  const uint16_t* a;
  int64_t a_row;
  const uint32_t* b;
  uint16_t* out;
  int64_t out_row;
  Epilogue epilogue = Epilogue::store;
  const float* bias = nullptr; // (n); null for 0
  const uint16_t* mask = nullptr; // (m, n)
  int64_t mask_row = 0;
};

// How an instruction set multiplies bfloat16 in pairs: not at all, by dot products
// in vectors, or by the tiles of AMX.
enum class Pairs { none, dots, tiles };

// What such an instruction set does, all of it for bfloat16, given as its bits.
struct PairKernels {
  Pairs pairs;
  // How many slots a packed matrix (k, n) takes.
  static int64_t packed_size(int64_t k, int64_t n) {
    return (k + 31) / 32 * ((n + 15) / 16) * 256;
  }
  // b (k, n), of whose strides one is 1, for use in a product.
  void (*pack)(uint32_t* to, Matrix<const uint16_t> b);
  void (*product)(const PairProduct&);
  // to (m, n) = delta (rows, m)^T a (rows, n), or to += that. All rows are
  // contiguous. scratch: packed_size(rows, m) + packed_size(rows, n) slots.
  void (*grad_weight)(
      Matrix<float> to,
      Matrix<const uint16_t> delta,
      Matrix<const uint16_t> a,
      bool add,
      uint32_t* scratch);
  // The same where these are all rows, so `add` is false: the sums are rounded.
  void (*whole_grad_weight)(
      Matrix<uint16_t> to,
      Matrix<const uint16_t> delta,
      Matrix<const uint16_t> a,
      bool add,
      uint32_t* scratch);
  // As in a Format, but for any number of columns.
  void (*narrow)(uint16_t* to, const float* from, int64_t count);
  void (*column_sums)(double* sums, Matrix<const uint16_t> m);
};

} // namespace relu_mlp::cpu
