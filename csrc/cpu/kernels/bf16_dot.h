// The products of layers in bfloat16 with the dot products of AVX512-BF16, each of
// which adds two products of bfloat16 to a float.
//
// As in gemm.h, a tile of `rows` x `vectors` registers of sums is kept while k goes
// by, two at a time: a step loads one row of slots of b and broadcasts one pair of
// every row of a. Pairs of a lie side by side in its rows, and those of delta^T in
// packed slots.
//
// What limits it: the dot products, of which Zen 4 begins one in a cycle, as it does
// multiply-adds. Subnormal numbers count as 0, as they do in PyTorch's products on the
// same processor.
#pragma once

#include "gemm.h"
#include "bf16_vnni.h"

namespace relu_mlp::cpu::RELU_MLP_ISA {
namespace {

// The operand whose pairs are broadcast, in elements.
struct Left {
  const uint16_t* data; // pair s of row i at data + i * row + s * pair
  int64_t rows, k;
  int64_t row, pair;
};

// Panels of b: columns of tiles, at most max_vectors of them side by side.
struct Right {
  const uint32_t* data;
  int64_t step; // from column to column
};

RELU_MLP_INLINE __m512bh both(const uint16_t* pair) {
  int32_t bits;
  __builtin_memcpy(&bits, pair, sizeof(bits));
  return (__m512bh)_mm512_set1_epi32(bits);
}

RELU_MLP_INLINE __m512bh first_alone(const uint16_t* first) {
  return (__m512bh)_mm512_set1_epi32(*first);
}

// finish(row, sums) for the sums of one tile, which begin with `start`.
template <int rows, int vectors, typename F>
RELU_MLP_INLINE void dot_tile(
    const Left& a,
    int64_t row,
    const Right& b,
    const __m512 (&start)[max_vectors],
    const F& finish) {
  __m512 sums[rows][vectors];
  RELU_MLP_UNROLL
  for (int i = 0; i < rows; ++i) {
    RELU_MLP_UNROLL
    for (int j = 0; j < vectors; ++j) {
      sums[i][j] = start[j];
    }
  }
  // One pointer for three rows, as in gemm.h.
  const uint16_t* of_a[(rows + 2) / 3];
  RELU_MLP_UNROLL
  for (int g = 0; g < (rows + 2) / 3; ++g) {
    of_a[g] = a.data + (row + 3 * g) * a.row;
  }
  const uint32_t* of_b = b.data;
  const auto add = [&]<bool is_pair>() {
    __m512bh slots[vectors];
    RELU_MLP_UNROLL
    for (int j = 0; j < vectors; ++j) {
      slots[j] = (__m512bh)_mm512_loadu_si512(of_b + j * b.step);
    }
    RELU_MLP_UNROLL
    for (int i = 0; i < rows; ++i) {
      const uint16_t* const from = of_a[i / 3] + i % 3 * a.row;
      const __m512bh of_row = is_pair ? both(from) : first_alone(from);
      RELU_MLP_UNROLL
      for (int j = 0; j < vectors; ++j) {
        sums[i][j] = _mm512_dpbf16_ps(sums[i][j], of_row, slots[j]);
      }
    }
  };
  for (int64_t s = a.k / 2; s > 0; --s) {
    add.template operator()<true>();
    RELU_MLP_UNROLL
    for (int g = 0; g < (rows + 2) / 3; ++g) {
      of_a[g] += a.pair;
    }
    of_b += 16;
  }
  if (a.k % 2 != 0) { // what lies beside the last element is not its pair
    add.template operator()<false>();
  }
  finish(row, sums);
}

// All rows of a: tiles of full height, then the rest in lower ones.
template <int rows, int vectors, typename F>
void dot_tiles(
    const Left& a,
    int64_t row,
    const Right& b,
    const __m512 (&start)[max_vectors],
    const F& finish) {
  for (; row + rows <= a.rows; row += rows) {
    dot_tile<rows, vectors>(a, row, b, start, finish);
  }
  if constexpr (rows > 1) {
    dot_tiles<rows == 6 ? 4 : rows / 2, vectors>(a, row, b, start, finish);
  }
}

template <typename F>
void dots_with_panel(
    const Left& a,
    const Right& b,
    int64_t vectors,
    const __m512 (&start)[max_vectors],
    const F& finish) {
  if (vectors > 3) {
    dot_tiles<max_rows(4), 4>(a, 0, b, start, finish);
  } else if (vectors > 2) {
    dot_tiles<max_rows(3), 3>(a, 0, b, start, finish);
  } else if (vectors > 1) {
    dot_tiles<max_rows(2), 2>(a, 0, b, start, finish);
  } else {
    dot_tiles<max_rows(1), 1>(a, 0, b, start, finish);
  }
}

inline void product_of_dots(const PairProduct& p) {
  const Left a{p.a, p.m, p.k, p.a_row, 2};
  const int64_t b_step = steps(p.k, tile_k) * tile_slots;
  for (int64_t col = 0; col < p.n; col += 16 * max_vectors) {
    __m512 start[max_vectors];
    RELU_MLP_UNROLL
    for (int j = 0; j < max_vectors; ++j) {
      start[j] = load_bias(p, col + 16 * j);
    }
    dots_with_panel(
        a, {p.b + col / 16 * b_step, b_step}, steps(p.n - col, 16), start,
        [&]<int rows, int vectors>(int64_t row, __m512(&sums)[rows][vectors]) {
          RELU_MLP_UNROLL
          for (int i = 0; i < rows; ++i) {
            RELU_MLP_UNROLL
            for (int j = 0; j < vectors; j += 2) {
              const int64_t at = col + 16 * j;
              finish(
                  p, row + i, at, first_of_32(p.n - at), sums[i][j],
                  j + 1 < vectors ? sums[i][j + 1] : _mm512_setzero_ps());
            }
          }
        });
  }
}

// to (m, n) = delta^T a, or += that if the sums stay float. Both operands are
// packed first, `scratch` is for that.
template <typename S>
void grad_weight_of_dots(
    Matrix<S> to,
    Matrix<const uint16_t> delta,
    Matrix<const uint16_t> a,
    bool add,
    uint32_t* scratch) {
  const int64_t b_step = steps(a.rows, tile_k) * tile_slots;
  uint32_t* const right = scratch;
  uint32_t* const left = right + steps(to.cols, 16) * b_step;
  pack_rows<false>(right, a);
  pack_rows<false>(left, delta);
  const __m512 zeros[max_vectors] = {};
  for (int64_t col = 0; col < to.cols; col += 16 * max_vectors) {
    const Right b{right + col / 16 * b_step, b_step};
    for (int64_t first = 0; first < to.rows; first += 16) {
      const Left of_delta{
          reinterpret_cast<const uint16_t*>(left + first / 16 * b_step),
          least(16, to.rows - first), a.rows, 2, 32};
      dots_with_panel(
          of_delta, b, steps(to.cols - col, 16), zeros,
          [&]<int rows, int vectors>(
              int64_t row, __m512(&sums)[rows][vectors]) {
            RELU_MLP_UNROLL
            for (int i = 0; i < rows; ++i) {
              RELU_MLP_UNROLL
              for (int j = 0; j < vectors; ++j) {
                const int64_t at = col + 16 * j;
                put(to.row(first + row + i) + at, first_of_16(to.cols - at),
                    sums[i][j], add);
              }
            }
          });
    }
  }
}

} // namespace
} // namespace relu_mlp::cpu::RELU_MLP_ISA
