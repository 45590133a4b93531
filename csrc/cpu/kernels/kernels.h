// The kernels of one instruction set as tables of plain functions.
//
// The other headers in this folder are compiled once for every instruction set,
// each time in another namespace (isa/). The first call chooses the table for
// all calls (isa/isa.cpp). Nothing here depends on PyTorch: bfloat16 and
// float16 are passed as their bits.
#pragma once

#include <cstdint>

#include "../../mlp.h"

namespace relu_mlp::cpu {

// What a product does to a tile of sums before it writes it.
enum class Epilogue {
  store, // out = product
  bias, // out = product + bias
  bias_relu, // out = max(product + bias, 0)
  mask, // out = product where mask > 0 or is NaN, else 0
};

// out (m, n) = epilogue(a (m, k) b (k, n)) for one panel of columns. If
// `continues`, out = epilogue(out + a b).
template <typename C>
struct ProductArgs {
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

// One step of torch.optim.SGD for `count` contiguous elements:
//   g = gradient_factor * gradient + weight_decay * parameter
//   if there is a buffer:
//     buffer = momentum * buffer + undampened * g
//     g = g + momentum * buffer if `nesterov`, else buffer
//   parameter -= lr * g
template <typename C>
struct SgdArgs {
  int64_t count;
  C* parameter;
  const C* gradient;
  C* buffer; // null without momentum
  C gradient_factor, weight_decay, momentum, undampened, lr;
  bool nesterov;
};

// One step of torch.optim.Adam or AdamW for `count` contiguous elements:
//   g = gradient_factor * gradient + weight_decay * parameter
//   parameter *= parameter_factor
//   mean += weight * (g - mean)
//   square = beta2 * square + weight_of_square * g^2
//   s = max_square = max(max_square, square) if there is one, else square
//   parameter -= step_size * mean / (root_factor * sqrt(s) + eps)
template <typename C>
struct AdamArgs {
  int64_t count;
  C* parameter;
  const C* gradient;
  C *mean, *square, *max_square; // max_square is null without amsgrad
  C gradient_factor, weight_decay, parameter_factor;
  C weight, beta2, weight_of_square; // weight = 1 - beta1
  C step_size, root_factor, eps;
};

template <typename C>
using ElementLoss = double (*)(
    C* gradient,
    const C* y,
    const C* target,
    int64_t count,
    C scale);

// Kernels that compute in C, float or double.
template <typename C>
struct Kernels {
  int64_t lanes; // elements of a vector
  int64_t panel; // the maximum columns of one product
  int64_t tile_rows; // rows of a tile as wide as a panel
  void (*product)(const ProductArgs<C>&);
  // to (k, n) = b (k, n) of any strides. Rows of `to` are contiguous and to_row
  // apart. Columns from n to the next multiple of `lanes` get 0.
  void (*pack)(C* to, int64_t to_row, Matrix<const C> b);
  // out (m, n) = bias + a (m, k) weight^T, then ReLU if `relu`, without a
  // packed copy of weight (n, k). All rows are contiguous. bias may be null.
  void (*linear_by_dots)(
      Matrix<C> out,
      Matrix<const C> a,
      Matrix<const C> weight,
      const C* bias,
      bool relu);
  // sums[j] += sum_i m(i, j). m may have any strides. Up to eight rows are
  // summed in C, and these sums are added in double precision.
  void (*column_sums)(double* sums, Matrix<const C> m);
  // z += bias, then ReLU if `relu`, in place; bias may be null.
  void (*bias_relu)(Matrix<C> z, const C* bias, bool relu);
  // delta = delta where a > 0 or is NaN, else 0, in place.
  void (*mask)(C* delta, const C* a, int64_t count);
  // These return whether the gradient is finite.
  bool (*sgd)(const SgdArgs<C>&);
  bool (*adam)(const AdamArgs<C>&);
  // exps(i, j) = exp(y(i, j) - largest[i]), where largest[i] is the largest
  // element of row i, and sums[i] the sum of its exps. All rows are contiguous.
  // exps may be y.
  void (*softmax)(Matrix<C> exps, Matrix<const C> y, C* largest, double* sums);
  // The losses l1, huber and bce_with_logits: the gradient of scale * loss at y,
  // and the sum of the loss, which is returned.
  ElementLoss<C> l1, huber, bce_with_logits;
};

// Kernels for a 16-bit format, bfloat16 or float16. Rounding is to the nearest,
// ties to even; NaN stays NaN.
struct Kernels16 {
  void (*widen)(float* to, const uint16_t* from, int64_t count);
  void (*round)(uint16_t* to, const float* from, int64_t count);
  void (*relu)(uint16_t* z, int64_t count); // z = max(z, 0), in place
  // delta = delta where a > 0 or is NaN, else 0, in place
  void (*mask)(uint16_t* delta, const uint16_t* a, int64_t count);
  // sums[j] += sum_i m(i, j) for at most 64 columns, rows contiguous
  void (*column_sums)(double* sums, Matrix<const uint16_t> m);
};

// out (m, n) = epilogue(a (m, k) b (k, n)) in bfloat16, summed in float. Rows
// of a, out and mask are contiguous. b is packed in the VNNI layout
// (bf16_vnni.h).
struct Bf16ProductArgs {
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

// Which instructions multiply bfloat16: none, the dot products of AVX512-BF16
// (vdpbf16ps), or the tiles of AMX (tdpbf16ps).
enum class Bf16Kind { none, dpbf16, amx };

// The kernels of an instruction set that multiplies bfloat16.
struct Bf16Kernels {
  // The columns that two neighboring tiles of a packed matrix hold.
  static constexpr int64_t column_step = 32;

  Bf16Kind kind;
  // How many 32-bit words a packed matrix (k, n) takes: whole tiles of 32 rows
  // by 16 columns.
  static int64_t packed_size(int64_t k, int64_t n) {
    return (k + 31) / 32 * ((n + 15) / 16) * 256;
  }
  // Packs b (k, n), one of whose strides is 1, for use in a product.
  void (*pack)(uint32_t* to, Matrix<const uint16_t> b);
  void (*product)(const Bf16ProductArgs&);
  // to (m, n) = delta (rows, m)^T a (rows, n), or to += that. All rows are
  // contiguous. scratch has packed_size(rows, m) + packed_size(rows, n) words.
  void (*grad_weight)(
      Matrix<float> to,
      Matrix<const uint16_t> delta,
      Matrix<const uint16_t> a,
      bool add,
      uint32_t* scratch);
  // The same for a single block of rows: `to` is overwritten with the sums,
  // rounded to bfloat16.
  void (*grad_weight_rounded)(
      Matrix<uint16_t> to,
      Matrix<const uint16_t> delta,
      Matrix<const uint16_t> a,
      uint32_t* scratch);
  // As in Kernels16, but column_sums takes any number of columns.
  void (*round)(uint16_t* to, const float* from, int64_t count);
  void (*column_sums)(double* sums, Matrix<const uint16_t> m);
};

} // namespace relu_mlp::cpu
