// Products of bfloat16 with the instruction vdpbf16ps of AVX512-BF16, which
// adds two products of bfloat16 to a float.
//
// As in gemm.h, a tile of `rows` x `vectors` registers of sums is kept while k
// advances, here by two elements a step. A step loads one row of 32-bit words
// of b and broadcasts one word, two neighboring elements, of every row of a.
// For delta^T these words come from a packed matrix.
//
// The dot products limit the speed. Zen 4 starts one per cycle, as many as
// multiply-adds. Subnormal numbers count as 0, as in PyTorch's products on the
// same processor.
#pragma once

#include "bf16_vnni.h"
#include "gemm.h"

namespace relu_mlp::cpu::RELU_MLP_ISA {
namespace {

// The operand (rows, k) whose words are broadcast. Distances count elements:
// word s of row i is at data + i * row + s * word.
struct LeftOperand {
  const uint16_t* data;
  int64_t rows, k;
  int64_t row, word;
};

// A panel of b: at most max_vectors columns of tiles, `step` words apart.
struct RightPanel {
  const uint32_t* data;
  int64_t step;
};

RELU_MLP_INLINE __m512bh broadcast_word(const uint16_t* from) {
  int32_t bits;
  __builtin_memcpy(&bits, from, sizeof(bits));
  return (__m512bh)_mm512_set1_epi32(bits);
}

// A word whose upper element is 0.
RELU_MLP_INLINE __m512bh broadcast_element(const uint16_t* from) {
  return (__m512bh)_mm512_set1_epi32(*from);
}

// Computes the sums of one tile, which start with `start`, and calls write(row,
// sums).
template <int rows, int vectors, typename F>
RELU_MLP_INLINE void dot_tile(
    const LeftOperand& a,
    int64_t row,
    const RightPanel& b,
    const __m512 (&start)[max_vectors],
    const F& write) {
  __m512 sums[rows][vectors];
  RELU_MLP_UNROLL
  for (int i = 0; i < rows; ++i) {
    RELU_MLP_UNROLL
    for (int j = 0; j < vectors; ++j) {
      sums[i][j] = start[j];
    }
  }
  // One pointer serves three rows, as in gemm.h.
  const uint16_t* a_pointers[(rows + 2) / 3];
  RELU_MLP_UNROLL
  for (int g = 0; g < (rows + 2) / 3; ++g) {
    a_pointers[g] = a.data + (row + 3 * g) * a.row;
  }
  const uint32_t* b_words = b.data;
  const auto add = [&]<bool is_whole>() {
    __m512bh words[vectors];
    RELU_MLP_UNROLL
    for (int j = 0; j < vectors; ++j) {
      words[j] = (__m512bh)_mm512_loadu_si512(b_words + j * b.step);
    }
    RELU_MLP_UNROLL
    for (int i = 0; i < rows; ++i) {
      const uint16_t* const from = a_pointers[i / 3] + i % 3 * a.row;
      const __m512bh a_word =
          is_whole ? broadcast_word(from) : broadcast_element(from);
      RELU_MLP_UNROLL
      for (int j = 0; j < vectors; ++j) {
        sums[i][j] = _mm512_dpbf16_ps(sums[i][j], a_word, words[j]);
      }
    }
  };
  for (int64_t s = a.k / 2; s > 0; --s) {
    add.template operator()<true>();
    RELU_MLP_UNROLL
    for (int g = 0; g < (rows + 2) / 3; ++g) {
      a_pointers[g] += a.word;
    }
    b_words += 16;
  }
  // The neighbor of the last element is not part of the row.
  if (a.k % 2 != 0) {
    add.template operator()<false>();
  }
  write(row, sums);
}

// All rows of a: first tiles of full height, then lower ones for the remaining
// rows.
template <int rows, int vectors, typename F>
void dot_tiles(
    const LeftOperand& a,
    int64_t row,
    const RightPanel& b,
    const __m512 (&start)[max_vectors],
    const F& write) {
  for (; row + rows <= a.rows; row += rows) {
    dot_tile<rows, vectors>(a, row, b, start, write);
  }
  if constexpr (rows > 1) {
    dot_tiles<rows == 6 ? 4 : rows / 2, vectors>(a, row, b, start, write);
  }
}

template <typename F>
void multiply_by_panel(
    const LeftOperand& a,
    const RightPanel& b,
    int64_t vectors,
    const __m512 (&start)[max_vectors],
    const F& write) {
  if (vectors > 3) {
    dot_tiles<max_rows(4), 4>(a, 0, b, start, write);
  } else if (vectors > 2) {
    dot_tiles<max_rows(3), 3>(a, 0, b, start, write);
  } else if (vectors > 1) {
    dot_tiles<max_rows(2), 2>(a, 0, b, start, write);
  } else {
    dot_tiles<max_rows(1), 1>(a, 0, b, start, write);
  }
}

inline void product_dpbf16(const Bf16ProductArgs& p) {
  const LeftOperand a{p.a, p.m, p.k, p.a_row, 2};
  const int64_t b_step = ceil_div(p.k, tile_k) * tile_words;
  for (int64_t col = 0; col < p.n; col += 16 * max_vectors) {
    __m512 start[max_vectors];
    RELU_MLP_UNROLL
    for (int j = 0; j < max_vectors; ++j) {
      start[j] = load_bias(p, col + 16 * j);
    }
    multiply_by_panel(
        a, {p.b + col / 16 * b_step, b_step}, ceil_div(p.n - col, 16), start,
        [&]<int rows, int vectors>(int64_t row, __m512(&sums)[rows][vectors]) {
          RELU_MLP_UNROLL
          for (int i = 0; i < rows; ++i) {
            RELU_MLP_UNROLL
            for (int j = 0; j < vectors; j += 2) {
              const int64_t at = col + 16 * j;
              write_row(
                  p, row + i, at, first_of_32(p.n - at), sums[i][j],
                  j + 1 < vectors ? sums[i][j + 1] : _mm512_setzero_ps());
            }
          }
        });
  }
}

// Computes delta^T a and writes its sums to `to` (m, n) by `write`. Both
// operands are first packed into `scratch`.
template <typename S, typename Write>
void grad_weight_with(
    Matrix<S> to,
    Matrix<const uint16_t> delta,
    Matrix<const uint16_t> a,
    uint32_t* scratch,
    const Write& write) {
  const int64_t b_step = ceil_div(a.rows, tile_k) * tile_words;
  uint32_t* const right = scratch;
  uint32_t* const left = right + ceil_div(to.cols, 16) * b_step;
  pack_vnni_rows<false>(right, a);
  pack_vnni_rows<false>(left, delta);
  const __m512 zeros[max_vectors] = {};
  for (int64_t col = 0; col < to.cols; col += 16 * max_vectors) {
    const RightPanel b{right + col / 16 * b_step, b_step};
    for (int64_t first = 0; first < to.rows; first += 16) {
      const LeftOperand left_operand{
          reinterpret_cast<const uint16_t*>(left + first / 16 * b_step),
          min(16, to.rows - first), a.rows, 2, 32};
      multiply_by_panel(
          left_operand, b, ceil_div(to.cols - col, 16), zeros,
          [&]<int rows, int vectors>(
              int64_t row, __m512(&sums)[rows][vectors]) {
            RELU_MLP_UNROLL
            for (int i = 0; i < rows; ++i) {
              RELU_MLP_UNROLL
              for (int j = 0; j < vectors; ++j) {
                const int64_t at = col + 16 * j;
                write(
                    to.row(first + row + i) + at, first_of_16(to.cols - at),
                    sums[i][j]);
              }
            }
          });
    }
  }
}

inline void grad_weight_dpbf16(
    Matrix<float> to,
    Matrix<const uint16_t> delta,
    Matrix<const uint16_t> a,
    bool add,
    uint32_t* scratch) {
  grad_weight_with(to, delta, a, scratch, StoreOrAdd{add});
}
inline void grad_weight_rounded_dpbf16(
    Matrix<uint16_t> to,
    Matrix<const uint16_t> delta,
    Matrix<const uint16_t> a,
    uint32_t* scratch) {
  grad_weight_with(to, delta, a, scratch, StoreRounded{});
}

} // namespace
} // namespace relu_mlp::cpu::RELU_MLP_ISA
