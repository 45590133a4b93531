// Loads and stores vectors of 8 elements of 16 bits: between registers and
// global memory of any layout.
#pragma once

#include "parameters.cuh"

namespace relu_mlp::cuda {

// A (rows, columns) matrix of 16-bit elements in global memory.
struct View16 {
  const uint16_t* data;
  int64_t rows;
  int columns;
  int64_t row_stride, column_stride;
  bool has_aligned_vectors; // whole vectors are 16-byte accesses
};

RELU_MLP_DEVICE bool is_aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

template <typename T>
RELU_MLP_DEVICE View16 view(const Matrix<const T>& m, int columns) {
  return {
      reinterpret_cast<const uint16_t*>(m.data),
      m.rows,
      columns,
      m.row_stride,
      m.col_stride,
      m.col_stride == 1 && m.row_stride % vector_width == 0 &&
          is_aligned(m.data)};
}

template <typename T>
RELU_MLP_DEVICE View16
contiguous_view(const T* data, int64_t rows, int columns) {
  return view(Matrix<const T>{data, rows, columns, columns, 1}, columns);
}

// Loads 8 neighboring elements of a row. Elements outside the matrix are 0.
RELU_MLP_DEVICE Vector16Bytes
load_vector(const View16& m, int64_t row, int column) {
  Vector16Bytes vector{};
  if (row >= m.rows || column >= m.columns) {
    return vector;
  }
  const uint16_t* const first =
      m.data + row * m.row_stride + column * m.column_stride;
  if (m.has_aligned_vectors && column + vector_width <= m.columns) {
    return load_16_bytes(first);
  }
  RELU_MLP_UNROLL
  for (int i = 0; i < vector_width; ++i) {
    if (column + i < m.columns) {
      vector.word[i / 2] |= uint32_t(first[i * m.column_stride])
          << (i % 2 * 16);
    }
  }
  return vector;
}

// Stores such a vector to a contiguous matrix, except for elements outside it.
template <typename T>
RELU_MLP_DEVICE void store_vector(
    T* data,
    int64_t rows,
    int columns,
    int64_t row,
    int column,
    const Vector16Bytes& vector) {
  if (row >= rows || column >= columns) {
    return;
  }
  uint16_t* const first =
      reinterpret_cast<uint16_t*>(data) + row * columns + column;
  if (columns % vector_width == 0 && is_aligned(data)) {
    store_16_bytes(first, vector);
    return;
  }
  RELU_MLP_UNROLL
  for (int i = 0; i < vector_width; ++i) {
    if (column + i < columns) {
      first[i] = static_cast<uint16_t>(vector.word[i / 2] >> (i % 2 * 16));
    }
  }
}

template <bool IsBFloat16>
RELU_MLP_DEVICE Vector16Bytes pack_vector(const float (&values)[8]) {
  Vector16Bytes vector;
  RELU_MLP_UNROLL
  for (int i = 0; i < 4; ++i) {
    vector.word[i] = pack<IsBFloat16>(values[2 * i], values[2 * i + 1]);
  }
  return vector;
}

template <bool IsBFloat16>
RELU_MLP_DEVICE void unpack_vector(
    const Vector16Bytes& vector,
    float (&values)[8]) {
  RELU_MLP_UNROLL
  for (int i = 0; i < 4; ++i) {
    values[2 * i] = unpack_low<IsBFloat16>(vector.word[i]);
    values[2 * i + 1] = unpack_high<IsBFloat16>(vector.word[i]);
  }
}

} // namespace relu_mlp::cuda
