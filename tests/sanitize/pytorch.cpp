// The functions of PyTorch's C interface that the CPU passes call, so that they
// run without PyTorch: parallel loops on our own threads, and products of
// matrices by plain loops in double precision, rounded once.

#include <algorithm>
#include <thread>
#include <vector>

#include "../../csrc/tensor.h"

struct AtenTensorOpaque {
  void* data;
  int64_t rows, cols, row_stride, col_stride;
  int32_t dtype;

  template <typename T>
  relu_mlp::Matrix<T> matrix() const {
    return {static_cast<T*>(data), rows, cols, row_stride, col_stride};
  }
};

namespace {

// out = beta self + alpha a b. A self with a single row serves every row.
void multiply(
    AtenTensorHandle out,
    AtenTensorHandle self,
    AtenTensorHandle a,
    AtenTensorHandle b,
    double beta,
    double alpha) {
  relu_mlp::dispatch(out->dtype, [&]<typename T>() {
    const auto result = out->matrix<T>(), addend = self->matrix<T>();
    const auto left = a->matrix<T>(), right = b->matrix<T>();
    for (int64_t i = 0; i < result.rows; ++i) {
      for (int64_t j = 0; j < result.cols; ++j) {
        double sum = 0;
        for (int64_t k = 0; k < left.cols; ++k) {
          sum += double(left.at(i, k)) * double(right.at(k, j));
        }
        sum *= alpha;
        if (beta != 0) { // else self may hold NaN
          sum += beta * double(addend.at(addend.rows == 1 ? 0 : i, j));
        }
        result.at(i, j) = T(relu_mlp::compute_t<T>(sum));
      }
    }
  });
}

} // namespace

extern "C" {

int32_t aoti_torch_dtype_float32() {
  return 0;
}
int32_t aoti_torch_dtype_float64() {
  return 1;
}
int32_t aoti_torch_dtype_bfloat16() {
  return 2;
}
int32_t aoti_torch_dtype_float16() {
  return 3;
}
int32_t aoti_torch_device_type_cpu() {
  return 0;
}

// Takes matrices only.
AOTITorchError aoti_torch_create_tensor_from_blob(
    void* data,
    int64_t,
    const int64_t* sizes,
    const int64_t* strides,
    int64_t,
    int32_t dtype,
    int32_t,
    int32_t,
    AtenTensorHandle* result) {
  *result = new AtenTensorOpaque{data,       sizes[0],   sizes[1],
                                 strides[0], strides[1], dtype};
  return 0;
}

AOTITorchError aoti_torch_delete_tensor_object(AtenTensorHandle tensor) {
  delete tensor;
  return 0;
}

AOTITorchError aoti_torch_cpu_mm_out(
    AtenTensorHandle out,
    AtenTensorHandle a,
    AtenTensorHandle b) {
  multiply(out, out, a, b, 0, 1);
  return 0;
}

AOTITorchError aoti_torch_cpu_addmm_out(
    AtenTensorHandle out,
    AtenTensorHandle self,
    AtenTensorHandle a,
    AtenTensorHandle b,
    double beta,
    double alpha) {
  multiply(out, self, a, b, beta, alpha);
  return 0;
}

// Like PyTorch's: equal parts of at least `grain`. A call from within a part is
// not split again.
AOTITorchError torch_parallel_for(
    int64_t begin,
    int64_t end,
    int64_t grain,
    ParallelFunc f,
    void* context) {
  constexpr int64_t most_threads = 3;
  thread_local bool is_within = false;
  const int64_t parts = std::min(
      most_threads,
      relu_mlp::ceil_div(end - begin, std::max<int64_t>(1, grain)));
  if (is_within || parts < 2) {
    f(begin, end, context);
    return 0;
  }
  std::vector<std::thread> threads;
  const int64_t part = relu_mlp::ceil_div(end - begin, parts);
  for (int64_t from = begin; from < end; from += part) {
    threads.emplace_back([=] {
      is_within = true;
      f(from, std::min(end, from + part), context);
    });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  return 0;
}

} // extern "C"
