// The matrix product of all passes: out (m, n) = epilogue(a (m, k) b (k, n)).
//
// A tile of `rows` x `vectors` vector registers of out is summed over k. Each
// step loads one row of the panel b and broadcasts one element of every row of
// a. Rows of b are contiguous. a may have any strides, so delta^T needs no
// copy. Bias, ReLU and mask are applied while the tile is in registers.
//
// With enough rows the fused multiply-add units limit the speed: a step of the
// 6 x 4 tile of AVX-512 has 24 multiply-adds for 10 loads. With few rows the
// latency of the multiply-add limits it. The caller must keep b in the L1 or L2
// cache.
//
// The order of every sum depends on k alone.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace relu_mlp::cpu::RELU_MLP_ISA {
namespace {

constexpr int64_t registers = RELU_MLP_VECTOR_REGISTERS;
// The widest tile, in vectors.
constexpr int max_vectors = registers >= 32 ? 4 : 2;

// The rows of the tallest tile `vectors` wide whose sums stay in registers,
// together with one row of b and what is loaded of a. On x86 that is one
// broadcast. On AArch64 compilers load an element of every row of a before they
// use the first one (docs/performance-notes.md). All divide 48, 24 or 40, so
// groups of that many rows have no remainder (Tuning::tiles_per_group).
constexpr int max_rows(int vectors) {
#if defined(__aarch64__)
  constexpr int rows[] = {20, 10, 5, 5};
#else
  constexpr int rows[] = {24, 12, 8, 6};
#endif
  if (registers >= 32) {
    return rows[vectors - 1];
  }
  return vectors == 1 ? 12 : 6;
}

// Applies the epilogue to the sums of a tile and writes them.
template <int rows, int vectors, typename C>
RELU_MLP_INLINE void write_tile(
    const ProductArgs<C>& p,
    int64_t row,
    Vec<C> (&sums)[rows][vectors]) {
  constexpr int64_t W = lanes<C>;
  // The edge of the matrix may cut off the last vector.
  const int64_t last = p.n - (vectors - 1) * W;
  const auto load_columns = [last](const C* from, int j) {
    return j + 1 < vectors || last == W ? load(from + j * W)
                                        : load_some(from + j * W, last);
  };
  if (p.continues) {
    RELU_MLP_UNROLL
    for (int i = 0; i < rows; ++i) {
      RELU_MLP_UNROLL
      for (int j = 0; j < vectors; ++j) {
        sums[i][j] += load_columns(p.out + (row + i) * p.out_row, j);
      }
    }
  }
  if (p.bias) {
    RELU_MLP_UNROLL
    for (int j = 0; j < vectors; ++j) {
      const Vec<C> bias_vector = load_columns(p.bias, j);
      RELU_MLP_UNROLL
      for (int i = 0; i < rows; ++i) {
        sums[i][j] += bias_vector;
      }
    }
  }
  const Vec<C> zero = {};
  RELU_MLP_UNROLL
  for (int i = 0; i < rows; ++i) {
    C* const out = p.out + (row + i) * p.out_row;
    const C* const mask = p.mask + (row + i) * p.mask_row;
    RELU_MLP_UNROLL
    for (int j = 0; j < vectors; ++j) {
      Vec<C> v = sums[i][j];
      if (p.epilogue == Epilogue::bias_relu) {
        v = v <= zero ? zero : v; // NaN passes
      } else if (p.epilogue == Epilogue::mask) {
        v = load_columns(mask, j) <= zero ? zero : v;
      }
      if (j + 1 < vectors || last == W) {
        store(out + j * W, v);
      } else {
        store_some(out + j * W, v, last);
      }
    }
  }
}

template <int rows, int vectors, typename C>
void tile(const ProductArgs<C>& p, int64_t row) {
  constexpr int64_t W = lanes<C>;
  Vec<C> sums[rows][vectors] = {};
  const C* b = p.b;
  const int64_t a_row = p.a_row, a_col = p.a_col, b_row = p.b_row;
  // One pointer serves three rows of a: x86 adds 0, 1 or 2 strides to it for
  // free.
  const C* a[(rows + 2) / 3];
  RELU_MLP_UNROLL
  for (int g = 0; g < (rows + 2) / 3; ++g) {
    a[g] = p.a + (row + 3 * g) * a_row;
  }
  for (int64_t s = p.k; s > 0; --s) {
    Vec<C> b_vectors[vectors];
    RELU_MLP_UNROLL
    for (int j = 0; j < vectors; ++j) {
      b_vectors[j] = load(b + j * W);
    }
    RELU_MLP_UNROLL
    for (int i = 0; i < rows; ++i) {
      const Vec<C> a_vector = broadcast(a[i / 3][i % 3 * a_row]);
      RELU_MLP_UNROLL
      for (int j = 0; j < vectors; ++j) {
        sums[i][j] += a_vector * b_vectors[j];
      }
    }
    RELU_MLP_UNROLL
    for (int g = 0; g < (rows + 2) / 3; ++g) {
      a[g] += a_col;
    }
    b += b_row;
  }

  write_tile<rows, vectors>(p, row, sums);
}

// All rows of a panel that is `vectors` wide: first tiles of full height, then
// lower ones for the remaining rows.
template <int rows, int vectors, typename C>
int64_t tiles(const ProductArgs<C>& p, int64_t row) {
  for (; row + rows <= p.m; row += rows) {
    tile<rows, vectors>(p, row);
  }
  if constexpr (rows > 1) {
    constexpr int lower = rows > 4 && rows < 8 ? 4 : rows / 2;
    return tiles<lower, vectors>(p, row);
  }
  return row;
}

// The product over a stretch of k that is summed without a break.
template <typename C>
void product_over_k_block(const ProductArgs<C>& p) {
  if (p.n > 3 * lanes<C>) {
    if constexpr (max_vectors == 4) {
      tiles<max_rows(4), 4>(p, 0);
    }
  } else if (p.n > 2 * lanes<C>) {
    if constexpr (max_vectors == 4) {
      tiles<max_rows(3), 3>(p, 0);
    }
  } else if (p.n > lanes<C>) {
    tiles<max_rows(2), 2>(p, 0);
  } else if (p.n > 0) {
    tiles<max_rows(1), 1>(p, 0);
  }
}

// Sums over more than 128 elements are sums of sums. Their rounding errors then
// grow with the square root of k, like those of a library's products. The 128
// determines the bits of a result, so it is not a tuned number.
template <typename C>
void product(const ProductArgs<C>& p) {
  constexpr int64_t block = 128;
  ProductArgs<C> part = p;
  part.epilogue = Epilogue::store;
  part.bias = nullptr;
  part.k = block;
  int64_t k = 0;
  for (; k + block < p.k; k += block) {
    part.a = p.a + k * p.a_col;
    part.b = p.b + k * p.b_row;
    product_over_k_block(part);
    part.continues = true;
  }
  part.a = p.a + k * p.a_col;
  part.b = p.b + k * p.b_row;
  part.k = p.k - k;
  part.epilogue = p.epilogue;
  part.bias = p.bias;
  product_over_k_block(part);
}

} // namespace
} // namespace relu_mlp::cpu::RELU_MLP_ISA
