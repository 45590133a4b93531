// Chunks of 8 elements of 16 bits: between global memory, of any layout, and
// registers.
#pragma once

#include "parameters.cuh"

namespace relu_mlp::cuda {

// A (rows, columns) matrix of 16-bit elements in global memory.
struct View16 {
  const uint16_t* data;
  int64_t rows;
  int columns;
  int64_t row_stride, column_stride;
  bool in_chunks; // 16 bytes at once, wherever a chunk is whole
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
      m.col_stride == 1 && m.row_stride % chunk_width == 0 &&
          is_aligned(m.data)};
}

template <typename T>
RELU_MLP_DEVICE View16
contiguous_view(const T* data, int64_t rows, int columns) {
  return view(Matrix<const T>{data, rows, columns, columns, 1}, columns);
}

// 8 neighbouring elements of a row; zeros outside of the matrix.
RELU_MLP_DEVICE Vector16 load_chunk(const View16& m, int64_t row, int column) {
  Vector16 chunk{};
  if (row >= m.rows || column >= m.columns) {
    return chunk;
  }
  const uint16_t* const first =
      m.data + row * m.row_stride + column * m.column_stride;
  if (m.in_chunks && column + chunk_width <= m.columns) {
    return load16(first);
  }
  RELU_MLP_UNROLL
  for (int i = 0; i < chunk_width; ++i) {
    if (column + i < m.columns) {
      chunk.word[i / 2] |= uint32_t(first[i * m.column_stride]) << (i % 2 * 16);
    }
  }
  return chunk;
}

// The same into a contiguous matrix.
template <typename T>
RELU_MLP_DEVICE void store_chunk(
    T* data,
    int64_t rows,
    int columns,
    int64_t row,
    int column,
    const Vector16& chunk) {
  if (row >= rows || column >= columns) {
    return;
  }
  uint16_t* const first =
      reinterpret_cast<uint16_t*>(data) + row * columns + column;
  if (columns % chunk_width == 0 && is_aligned(data)) {
    store16(first, chunk);
    return;
  }
  RELU_MLP_UNROLL
  for (int i = 0; i < chunk_width; ++i) {
    if (column + i < columns) {
      first[i] = static_cast<uint16_t>(chunk.word[i / 2] >> (i % 2 * 16));
    }
  }
}

template <bool IsBFloat16>
RELU_MLP_DEVICE Vector16 pack_chunk(const float (&values)[8]) {
  Vector16 chunk;
  RELU_MLP_UNROLL
  for (int i = 0; i < 4; ++i) {
    chunk.word[i] = pack<IsBFloat16>(values[2 * i], values[2 * i + 1]);
  }
  return chunk;
}

template <bool IsBFloat16>
RELU_MLP_DEVICE void unpack_chunk(const Vector16& chunk, float (&values)[8]) {
  RELU_MLP_UNROLL
  for (int i = 0; i < 4; ++i) {
    values[2 * i] = unpack_low<IsBFloat16>(chunk.word[i]);
    values[2 * i + 1] = unpack_high<IsBFloat16>(chunk.word[i]);
  }
}

} // namespace relu_mlp::cuda
