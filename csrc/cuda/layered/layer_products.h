// The three products of a layer, computed by cuBLASLt with fused epilogues, or
// by PyTorch.
#pragma once

#include <type_traits>

#include "../../tensor.h"
#include "cublaslt.h"
#include "../plan.h"
#include "kernels.h"

// PyTorch's products as C functions, which bypass autograd and autocast. The
// symbols are weak because the library also loads with a PyTorch without CUDA,
// which lacks them.
#ifdef RELU_MLP_CUDA_ON_HOST
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#else
extern "C" {
__attribute__((weak)) AOTITorchError aoti_torch_cuda_mm_out(
    AtenTensorHandle out,
    AtenTensorHandle self,
    AtenTensorHandle mat2);
__attribute__((weak)) AOTITorchError aoti_torch_cuda_addmm_out(
    AtenTensorHandle out,
    AtenTensorHandle self,
    AtenTensorHandle mat1,
    AtenTensorHandle mat2,
    double beta,
    double alpha);
}
#endif

namespace relu_mlp::cuda {

template <typename T>
class LayerProducts {
 public:
  // On a stream of the current device; `like` is a tensor there.
  LayerProducts(const Tensor& like, Stream stream)
      : like_(like), stream_(stream) {}

  // out = a w^T + bias, then ReLU if `relu`. out: (rows, out),
  // a: (rows, in), w: (out, in); bias may be null.
  void linear(
      Matrix<T> out,
      Matrix<const T> a,
      Matrix<const T> w,
      const T* bias,
      bool relu) const {
    if (is_for_cublaslt(shape_of(out, a, w, bias))) {
      using cublaslt::LtEpilogue;
      const bool fuses =
          relu && cublaslt::relu_passes_nan(type(), like_, stream_);
      const LtEpilogue epilogue = fuses
          ? (bias ? LtEpilogue::relu_bias : LtEpilogue::relu)
          : (bias ? LtEpilogue::bias : LtEpilogue::none);
      if (cublaslt::multiply(
              {type(), true, false, w.rows, a.rows, w.cols, ld(w), ld(a),
               ld(out), epilogue},
              {w.data, a.data, out.data, bias}, like_, stream_)) {
        if (relu && !fuses) {
          apply_activation(
              Activation::relu, out.data, out.rows * out.cols, stream_);
        }
        return;
      }
    }
    multiply(out, a, w.transposed(), bias);
    if (relu) {
      apply_activation(
          Activation::relu, out.data, out.rows * out.cols, stream_);
    }
  }

  // to = delta^T a, (out, in). Returns whether it also wrote the sums of
  // delta's columns to `grad_bias`, which may be null.
  bool grad_weight(
      Matrix<T> to,
      Matrix<const T> delta,
      Matrix<const T> a,
      T* grad_bias) const {
    if (is_for_cublaslt(shape_of(delta, a, to, grad_bias))) {
      using cublaslt::LtEpilogue;
      const auto by_cublaslt = [&](LtEpilogue epilogue, T* bias) {
        return cublaslt::multiply(
            {type(), false, true, to.cols, to.rows, a.rows, ld(a), ld(delta),
             ld(to), epilogue},
            {a.data, delta.data, to.data, bias}, like_, stream_);
      };
      if (grad_bias && by_cublaslt(LtEpilogue::gradient_of_b, grad_bias)) {
        return true;
      }
      if (by_cublaslt(LtEpilogue::none, nullptr)) {
        return false;
      }
    }
    multiply(to, delta.transposed(), a, nullptr);
    return false;
  }

  // out = delta w: (rows, in) from (rows, out) and (out, in).
  void grad_input(Matrix<T> out, Matrix<const T> delta, Matrix<const T> w)
      const {
    if (is_for_cublaslt(shape_of(delta, out, w, nullptr)) &&
        cublaslt::multiply(
            {type(), false, false, w.cols, delta.rows, w.rows, ld(w), ld(delta),
             ld(out), cublaslt::LtEpilogue::none},
            {w.data, delta.data, out.data, nullptr}, like_, stream_)) {
      return;
    }
    multiply(out, delta, w, nullptr);
  }

 private:
  static int type() {
    return std::is_same_v<T, BFloat16> ? cublaslt::bfloat16 : cublaslt::float16;
  }

  // The leading dimension of m. The stride of a single row is arbitrary.
  template <typename U>
  static int64_t ld(const Matrix<U>& m) {
    return m.rows == 1 ? m.cols : m.row_stride;
  }

  // The shape of a product of y (rows, out), a (rows, in) and w (out, in). One
  // of them is its result.
  template <typename Y, typename A, typename W>
  static ProductShape shape_of(
      const Matrix<Y>& y,
      const Matrix<A>& a,
      const Matrix<W>& w,
      const T* bias) {
    const bool is_row_major =
        y.col_stride == 1 && a.col_stride == 1 && w.col_stride == 1;
    const uintptr_t bits = address(y.data) | address(a.data) | address(w.data) |
        address(bias) | uintptr_t(ld(w) * sizeof(T));
    const bool available = sizeof(T) == 2 && cublaslt::is_available();
    return {
        a.rows,
        a.cols,
        y.cols,
        ld(a),
        ld(y),
        int(sizeof(T)),
        available && is_row_major && bits % 16 == 0};
  }
  static uintptr_t address(const void* pointer) {
    return reinterpret_cast<uintptr_t>(pointer);
  }

  // out = a b + bias by PyTorch.
  void multiply(
      Matrix<T> out,
      Matrix<const T> a,
      Matrix<const T> b,
      const T* bias) const {
#ifdef RELU_MLP_CUDA_ON_HOST
    const auto mm = aoti_torch_cpu_mm_out;
    const auto addmm = aoti_torch_cpu_addmm_out;
#else
    const auto mm = aoti_torch_cuda_mm_out;
    const auto addmm = aoti_torch_cuda_addmm_out;
    if (!mm || !addmm) {
      fail("relu_mlp: this PyTorch has no products on CUDA");
    }
#endif
    const Tensor to = view(as_const(out)), left = view(a), right = view(b);
    if (bias) {
      check_call(addmm(
          to.get(), view<1>(bias, {out.cols}, {1}).get(), left.get(),
          right.get(), 1.0, 1.0));
    } else {
      check_call(mm(to.get(), left.get(), right.get()));
    }
  }

  // A temporary tensor over device memory.
  template <std::size_t N>
  Tensor view(
      const T* data,
      const std::array<int64_t, N>& sizes,
      const std::array<int64_t, N>& strides) const {
    return from_blob(
        data, sizes, strides, like_.device_type(), like_.device_index());
  }
  Tensor view(const Matrix<const T>& m) const {
    return view<2>(m.data, {m.rows, m.cols}, {m.row_stride, m.col_stride});
  }

  const Tensor& like_;
  const Stream stream_;
};

} // namespace relu_mlp::cuda
