// Kernels over whole matrices, between the products of wide layers. All are
// limited by memory: they read and write every element once.
#include "kernels.h"

#include <algorithm>

#include "../elementwise.cuh"

namespace relu_mlp::cuda {
namespace {

constexpr int threads = columns_lanes * columns_rows;

// `vector` elements from or to memory: 16 bytes at once, or a single one.
template <int vector, typename T>
RELU_MLP_DEVICE void load(T (&to)[vector], const T* from) {
  if constexpr (vector == 1) {
    to[0] = *from;
  } else {
    const Vector16 v = load16(from);
    memcpy(to, &v, 16);
  }
}
template <int vector, typename T>
RELU_MLP_DEVICE void store(T* to, const T (&from)[vector]) {
  if constexpr (vector == 1) {
    *to = from[0];
  } else {
    Vector16 v;
    memcpy(&v, from, 16);
    store16(to, v);
  }
}

// -- ReLU --------------------------------------------------------------------

template <typename T>
struct Relu {
  T* z;
  int64_t count;
};

// Reads and writes 2 * count * sizeof(T) bytes. A thread has 16 bytes; those of
// the last block that have fewer go one by one.
template <typename T>
RELU_MLP_KERNEL void RELU_MLP_BOUNDS(threads)
    relu_kernel(RELU_MLP_PARAMETER Relu<T> p) {
  using C = compute_t<T>;
  constexpr int vector = 16 / sizeof(T);
  const int64_t first =
      (int64_t(block_index()) * threads + thread_index()) * vector;
  if (first + vector <= p.count) {
    T z[vector];
    load(z, p.z + first);
    RELU_MLP_UNROLL
    for (int v = 0; v < vector; ++v) {
      z[v] = T(relu(C(z[v])));
    }
    store(p.z + first, z);
  } else {
    for (int64_t i = first; i < p.count; ++i) {
      p.z[i] = T(relu(C(p.z[i])));
    }
  }
}

// -- A matrix made and summed down its columns -------------------------------

// The sources of a matrix's elements: `get` returns those at (i, j) and, to
// the right, vector - 1 more. A source that finds a loss adds to `squares`.

template <typename T>
struct Mask {
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
      to[v] = select(C(change[v]), C(on[v]));
    }
  }
};

template <typename T>
struct Output {
  Activation phi;
  Matrix<const T> grad_output;
  const T* y;

  template <int vector, typename C>
  RELU_MLP_DEVICE void get(C (&to)[vector], int64_t i, int64_t j, double&)
      const {
    const Matrix<const T>& g = grad_output;
    const C output = y ? C(y[i * g.cols + j]) : C(0);
    to[0] = times_derivative(
        phi, C(g.data[i * g.row_stride + j * g.col_stride]), output);
  }
};

template <typename T>
struct Error {
  Activation phi;
  const T *y, *target;
  int64_t cols;
  double scale;

  template <int vector, typename C>
  RELU_MLP_DEVICE void
  get(C (&to)[vector], int64_t i, int64_t j, double& squares) const {
    const C output = C(y[i * cols + j]);
    const C error = output - C(target[i * cols + j]);
    squares += double(error) * double(error);
    to[0] = times_derivative(phi, C(2 * scale) * error, output);
  }
};

// The sums of the chunks.
template <typename S>
struct Parts {
  const S* sums;
  int64_t cols;

  template <int vector, typename C>
  RELU_MLP_DEVICE void get(C (&to)[vector], int64_t i, int64_t j, double&)
      const {
    to[0] = sums[i * cols + j];
  }
};

template <typename T, typename Source>
struct Walk {
  Source source;
  int64_t rows, cols;
  Columns plan;
  T* delta; // where the elements go, or null
  // Where the sums go, or null: those of a chunk to a row of `parts`, or, if
  // there is only one, to `total`.
  compute_t<T>* parts;
  T* total;
  double* squares; // those of a block, or null
};

// The sum of what the block's threads hold, in a fixed order; thread 0 has it.
RELU_MLP_DEVICE double block_sum(double value, double* memory) {
  memory[thread_index()] = value;
  RELU_MLP_NO_UNROLL
  for (int half = threads / 2; half > 0; half /= 2) {
    sync();
    if (thread_index() < half) {
      memory[thread_index()] += memory[thread_index() + half];
    }
  }
  return memory[0];
}

// A block has a tile of 32 * vector columns and a chunk of the rows. Each of
// its 8 rows of 32 threads takes every eighth row of the chunk and sums what
// it sees, as it is stored, in compute_t; the 8 sums are added in order. Reads
// what the source reads and writes delta: for Mask, 3 * rows * cols *
// sizeof(T) bytes.
template <typename T, typename Source, int vector>
RELU_MLP_KERNEL void RELU_MLP_BOUNDS(threads)
    walk_kernel(RELU_MLP_PARAMETER Walk<T, Source> p) {
  using C = compute_t<T>;
  const int lane = lane_index(), row = warp_index();
  const int64_t tile = block_index() % p.plan.tiles;
  const int64_t chunk = block_index() / p.plan.tiles;
  const int64_t j = (tile * columns_lanes + lane) * vector;
  const int64_t begin = chunk * p.plan.chunk_rows;
  const int64_t after = begin + p.plan.chunk_rows;
  const int64_t end = after < p.rows ? after : p.rows;
  C sums[vector] = {};
  double squares = 0;
  if (j < p.cols) {
    for (int64_t i = begin + row; i < end; i += columns_rows) {
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
      memory[(row * vector + v) * columns_lanes + lane] = sums[v];
    }
    sync();
    if (row == 0 && j < p.cols) {
      RELU_MLP_UNROLL
      for (int v = 0; v < vector; ++v) {
        C sum = 0;
        RELU_MLP_UNROLL
        for (int r = 0; r < columns_rows; ++r) {
          sum += memory[(r * vector + v) * columns_lanes + lane];
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

// What a walk takes of shared memory: 8 rows of 32 * 16 bytes of T in compute_t,
// at most twice as wide, or a double for each thread.
constexpr int64_t walk_shared = threads * 8 * sizeof(float);
static_assert(walk_shared >= threads * 2 * int64_t(sizeof(double)));

template <typename T, int vector, typename Source>
void launch_walk(const Walk<T, Source>& walk, Stream stream) {
  launch(
      walk_kernel<T, Source, vector>,
      {walk.plan.blocks(), threads, walk_shared}, stream, walk);
}

template <typename T>
struct Squares {
  const double* parts;
  int64_t count;
  double scale;
  T* loss;
};

// One block: every thread sums its share of the squares, then the block.
template <typename T>
RELU_MLP_KERNEL void RELU_MLP_BOUNDS(threads)
    loss_kernel(RELU_MLP_PARAMETER Squares<T> p) {
  double sum = 0;
  for (int64_t i = thread_index(); i < p.count; i += threads) {
    sum += p.parts[i];
  }
  sum = block_sum(sum, reinterpret_cast<double*>(shared_memory()));
  if (thread_index() == 0) {
    *p.loss = T(compute_t<T>(p.scale * sum));
  }
}

template <typename T>
void launch_loss(const Squares<T>& squares, Stream stream) {
  launch(
      loss_kernel<T>, {1, threads, threads * int64_t(sizeof(double))}, stream,
      squares);
}

// Walks over the matrix, and over the sums of its chunks if there are several.
// The workspace has the squares of the blocks first, then those sums.
template <typename T, int vector, typename Source>
Columns make_and_sum(
    const Source& source,
    T* delta,
    int64_t rows,
    int64_t cols,
    const ColumnSums<T>& sums,
    bool has_squares,
    Stream stream) {
  using C = compute_t<T>;
  const Columns plan = plan_columns(rows, cols, vector, device_properties());
  if (cols == 0) {
    return plan;
  }
  double* const squares = static_cast<double*>(sums.workspace);
  C* const parts = reinterpret_cast<C*>(squares + plan.blocks());
  const bool several = sums.total && plan.chunks > 1;
  launch_walk<T, vector>(
      Walk<T, Source>{
          source, rows, cols, plan, delta, several ? parts : nullptr,
          several ? nullptr : sums.total, has_squares ? squares : nullptr},
      stream);
  if (several) {
    // A single chunk, whatever the number of its rows.
    const Columns all{1, ceil_div(cols, columns_lanes), 1, plan.chunks};
    launch_walk<T, 1>(
        Walk<T, Parts<C>>{
            {parts, cols}, plan.chunks, cols, all, nullptr, nullptr, sums.total,
            nullptr},
        stream);
  }
  return plan;
}

} // namespace

int64_t columns_workspace(int64_t rows, int64_t cols, const Device& device) {
  int64_t most = 0;
  for (const int vector : {1, 2, 4, 8}) {
    const Columns plan = plan_columns(rows, cols, vector, device);
    most = std::max<int64_t>(most, plan.blocks() + plan.chunks * cols);
  }
  return most * sizeof(double);
}

template <typename T>
void apply_relu(T* z, int64_t count, Stream stream) {
  constexpr int64_t elements = threads * 16 / sizeof(T); // of a block
  if (count > 0) {
    launch(
        relu_kernel<T>, {ceil_div(count, elements), threads}, stream,
        Relu<T>{z, count});
  }
}

template <typename T>
void mask_delta(
    T* delta,
    const Matrix<const T>& a,
    const ColumnSums<T>& sums,
    Stream stream) {
  constexpr int most = 16 / sizeof(T);
  const Mask<T> mask{delta, a};
  const bool aligned = reinterpret_cast<uintptr_t>(a.data) % 16 == 0;
  if (vector_length(a.cols, a.row_stride, sizeof(T), aligned) == most) {
    make_and_sum<T, most>(mask, delta, a.rows, a.cols, sums, false, stream);
  } else {
    make_and_sum<T, 1>(mask, delta, a.rows, a.cols, sums, false, stream);
  }
}

template <typename T>
void output_delta(
    Activation phi,
    T* delta,
    const Matrix<const T>& grad_output,
    const T* y,
    const ColumnSums<T>& sums,
    Stream stream) {
  make_and_sum<T, 1>(
      Output<T>{phi, grad_output, y}, delta, grad_output.rows, grad_output.cols,
      sums, false, stream);
}

template <typename T>
void loss_delta(
    Activation phi,
    T* delta,
    const T* y,
    const T* target,
    int64_t rows,
    int64_t cols,
    double scale,
    T* loss,
    const ColumnSums<T>& sums,
    Stream stream) {
  const Columns plan = make_and_sum<T, 1>(
      Error<T>{phi, y, target, cols, scale}, delta, rows, cols, sums, true,
      stream);
  launch_loss<T>(
      {static_cast<const double*>(sums.workspace),
       cols > 0 ? plan.blocks() : 0, scale, loss},
      stream);
}

template <typename T>
void write_loss(T* loss, const double* squares, double scale, Stream stream) {
  launch_loss<T>({squares, 1, scale, loss}, stream);
}

#define RELU_MLP_INSTANTIATE(T)                                              \
  template void apply_relu(T*, int64_t, Stream);                             \
  template void mask_delta(                                                  \
      T*, const Matrix<const T>&, const ColumnSums<T>&, Stream);             \
  template void output_delta(                                                \
      Activation, T*, const Matrix<const T>&, const T*, const ColumnSums<T>&, \
      Stream);                                                               \
  template void loss_delta(                                                  \
      Activation, T*, const T*, const T*, int64_t, int64_t, double, T*,      \
      const ColumnSums<T>&, Stream);                                         \
  template void write_loss(T*, const double*, double, Stream);

RELU_MLP_INSTANTIATE(float)
RELU_MLP_INSTANTIATE(double)
RELU_MLP_INSTANTIATE(torch::headeronly::BFloat16)
RELU_MLP_INSTANTIATE(torch::headeronly::Half)

} // namespace relu_mlp::cuda
