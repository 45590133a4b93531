// A kernel that computes a matrix element by element and sums its columns in
// the same pass over memory. Memory bandwidth limits the speed: the kernel
// reads and writes every element once.
#pragma once

#include "../../activation.h"
#include "../machine.h"
#include "kernels.h"

namespace relu_mlp::cuda {

// Threads of a block.
constexpr int reduction_threads = reduction_lanes * reduction_rows;

// Loads or stores `vector` elements: 16 bytes at once, or a single element.
template <int vector, typename T>
RELU_MLP_DEVICE void load(T (&to)[vector], const T* from) {
  if constexpr (vector == 1) {
    to[0] = *from;
  } else {
    const Vector16Bytes v = load_16_bytes(from);
    memcpy(to, &v, 16);
  }
}
template <int vector, typename T>
RELU_MLP_DEVICE void store(T* to, const T (&from)[vector]) {
  if constexpr (vector == 1) {
    *to = from[0];
  } else {
    Vector16Bytes v;
    memcpy(&v, from, 16);
    store_16_bytes(to, v);
  }
}

// grad * phi'(z), for an activation chosen at run time.
template <typename C>
RELU_MLP_DEVICE C activation_backward(Activation phi, C grad, C y) {
  return with_row(phi, [=]<typename Row>() { return Row::backward(grad, y); });
}

// The sources of the matrix. `get` returns element (i, j) and the next vector -
// 1 elements of the row. A source with a loss adds its squared errors to
// `squares`.

template <typename T>
struct MaskedDelta {
  const T* delta;
  Matrix<const T> a;

  template <int vector, typename C>
  RELU_MLP_DEVICE void get(C (&to)[vector], int64_t i, int64_t j, double&)
      const {
    T change[vector], on[vector];
    load(change, delta + i * a.cols + j);
    load(on, a.data + i * a.row_stride + j);
    RELU_MLP_UNROLL
    for (int v = 0; v < vector; ++v) {
      to[v] = ActivationRow<Activation::relu>::backward(C(change[v]), C(on[v]));
    }
  }
};

template <typename T>
struct OutputDelta {
  Activation phi;
  Matrix<const T> grad_output;
  const T* y;

  template <int vector, typename C>
  RELU_MLP_DEVICE void get(C (&to)[vector], int64_t i, int64_t j, double&)
      const {
    const Matrix<const T>& g = grad_output;
    const C output = y ? C(y[i * g.cols + j]) : C(0);
    to[0] = activation_backward(
        phi, C(g.data[i * g.row_stride + j * g.col_stride]), output);
  }
};

template <typename T>
struct LossDelta {
  Activation phi;
  const T *y, *target;
  int64_t cols;
  double scale;

  template <int vector, typename C>
  RELU_MLP_DEVICE void get(
      C (&to)[vector],
      int64_t i,
      int64_t j,
      double& squares) const {
    const C output = C(y[i * cols + j]);
    const C error = output - C(target[i * cols + j]);
    squares += double(error) * double(error);
    to[0] = activation_backward(phi, C(2 * scale) * error, output);
  }
};

// The sums of the chunks, one row for each chunk.
template <typename S>
struct PartialSums {
  const S* sums;
  int64_t cols;

  template <int vector, typename C>
  RELU_MLP_DEVICE void get(C (&to)[vector], int64_t i, int64_t j, double&)
      const {
    to[0] = sums[i * cols + j];
  }
};

template <typename T, typename Source>
struct Reduction {
  Source source;
  int64_t rows, cols;
  ColumnReduction plan;
  T* delta; // receives the matrix, or null
  // The results: the sums of each chunk in a row of `parts`, or in `total` if
  // there is only one chunk. Null if not needed.
  compute_t<T>* parts;
  T* total;
  double* squares; // one sum per block, or null
};

// Sums one value of every thread of the block, in a fixed order. Thread 0 gets
// the sum.
RELU_MLP_DEVICE double block_sum(double value, double* memory) {
  memory[thread_index()] = value;
  RELU_MLP_NO_UNROLL
  for (int half = reduction_threads / 2; half > 0; half /= 2) {
    sync();
    if (thread_index() < half) {
      memory[thread_index()] += memory[thread_index() + half];
    }
  }
  return memory[0];
}

// A block sums a tile of 32 * vector columns over a chunk of the rows. Each of
// its 8 rows of 32 threads takes every eighth row of the chunk. It sums the
// elements in compute_t, rounded as they are stored. The 8 sums are added in
// order. The kernel reads the operands of the source and writes delta: for
// MaskedDelta, 3 * rows * cols * sizeof(T) bytes.
template <typename T, typename Source, int vector>
RELU_MLP_KERNEL void RELU_MLP_BOUNDS(reduction_threads)
    reduce_kernel(RELU_MLP_PARAMETER Reduction<T, Source> p) {
  using C = compute_t<T>;
  const int lane = lane_index(), row = warp_index();
  const int64_t tile = block_index() % p.plan.tiles;
  const int64_t chunk = block_index() / p.plan.tiles;
  const int64_t j = (tile * reduction_lanes + lane) * vector;
  const int64_t begin = chunk * p.plan.chunk_rows;
  const int64_t after = begin + p.plan.chunk_rows;
  const int64_t end = after < p.rows ? after : p.rows;
  C sums[vector] = {};
  double squares = 0;
  if (j < p.cols) {
    for (int64_t i = begin + row; i < end; i += reduction_rows) {
      C values[vector];
      p.source.get(values, i, j, squares);
      T stored[vector];
      RELU_MLP_UNROLL
      for (int v = 0; v < vector; ++v) {
        stored[v] = T(values[v]);
        sums[v] += C(stored[v]);
      }
      if (p.delta) {
        store(p.delta + i * p.cols + j, stored);
      }
    }
  }

  if (p.parts || p.total) {
    C* const memory = reinterpret_cast<C*>(shared_memory());
    RELU_MLP_UNROLL
    for (int v = 0; v < vector; ++v) {
      memory[(row * vector + v) * reduction_lanes + lane] = sums[v];
    }
    sync();
    if (row == 0 && j < p.cols) {
      RELU_MLP_UNROLL
      for (int v = 0; v < vector; ++v) {
        C sum = 0;
        RELU_MLP_UNROLL
        for (int r = 0; r < reduction_rows; ++r) {
          sum += memory[(r * vector + v) * reduction_lanes + lane];
        }
        if (p.total) {
          p.total[j + v] = T(sum);
        } else {
          p.parts[chunk * p.cols + j + v] = sum;
        }
      }
    }
  }
  if (p.squares) {
    sync(); // the memory may still be read
    const double sum =
        block_sum(squares, reinterpret_cast<double*>(shared_memory()));
    if (thread_index() == 0) {
      p.squares[block_index()] = sum;
    }
  }
}

// The shared memory of a block: 8 rows of 32 * 16 bytes of T, converted to
// compute_t, which at most doubles the size; or a double for each thread.
constexpr int64_t reduction_shared = reduction_threads * 8 * sizeof(float);
static_assert(
    reduction_shared >= reduction_threads * 2 * int64_t(sizeof(double)));

template <typename T, int vector, typename Source>
void launch_reduction(const Reduction<T, Source>& reduction, Stream stream) {
  launch(
      reduce_kernel<T, Source, vector>,
      {reduction.plan.blocks(), reduction_threads, reduction_shared}, stream,
      reduction);
}

// Computes the matrix and its column sums, then adds the sums of the chunks if
// there are several. The workspace holds the squares of the blocks, then the
// sums of the chunks.
template <typename T, int vector, typename Source>
ColumnReduction compute_and_sum(
    const Source& source,
    T* delta,
    int64_t rows,
    int64_t cols,
    const ColumnSums<T>& sums,
    bool has_squares,
    Stream stream) {
  using C = compute_t<T>;
  const ColumnReduction plan =
      plan_reduction(rows, cols, vector, device_properties());
  if (cols == 0) {
    return plan;
  }
  double* const squares = static_cast<double*>(sums.workspace);
  C* const parts = reinterpret_cast<C*>(squares + plan.blocks());
  const bool several = sums.total && plan.chunks > 1;
  launch_reduction<T, vector>(
      Reduction<T, Source>{
          source, rows, cols, plan, delta, several ? parts : nullptr,
          several ? nullptr : sums.total, has_squares ? squares : nullptr},
      stream);
  if (several) {
    // A single chunk, whatever the number of its rows.
    const ColumnReduction all{
        1, ceil_div(cols, reduction_lanes), 1, plan.chunks};
    launch_reduction<T, 1>(
        Reduction<T, PartialSums<C>>{
            {parts, cols},
            plan.chunks,
            cols,
            all,
            nullptr,
            nullptr,
            sums.total,
            nullptr},
        stream);
  }
  return plan;
}

} // namespace relu_mlp::cuda
