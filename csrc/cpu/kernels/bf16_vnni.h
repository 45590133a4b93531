// Shared by the kernels that multiply bfloat16: the VNNI layout of packed
// matrices, the epilogue of a product, column sums, and rounding.
//
// A packed matrix (k, n) is the operand b of a product. Elements (2 s, j) and
// (2 s + 1, j) share one 32-bit word (s, j), the even one in its lower half. 16
// rows of words by 16 columns make a tile, so a tile holds 32 rows of b. One
// column of tiles follows another, and missing elements are 0. All other
// matrices are read and written in place.
//
// Shuffles limit the speed of packing; memory limits the rest.
#pragma once

#include "kernels.h"
#include "pack.h"

namespace relu_mlp::cpu::RELU_MLP_ISA {
namespace {

// Rows of b in a tile, and its 32-bit words.
constexpr int64_t tile_k = 32, tile_words = 256;

constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}
constexpr int64_t min(int64_t a, int64_t b) {
  return a < b ? a : b;
}
constexpr __mmask16 first_of_16(int64_t count) {
  return __mmask16((1u << min(count, 16)) - 1);
}
constexpr __mmask32 first_of_32(int64_t count) {
  return __mmask32((uint64_t(1) << min(count, 32)) - 1);
}

// -- Packing -----------------------------------------------------------------

// Two rows of 32 elements as one row of 32 words, in two vectors.
RELU_MLP_INLINE void interleave(
    __m512i (&words)[2],
    __m512i even,
    __m512i odd) {
  const __m512i lower = _mm512_set_epi16(
      47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38,
      6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i upper = _mm512_add_epi16(lower, _mm512_set1_epi16(16));
  words[0] = _mm512_permutex2var_epi16(even, lower, odd);
  words[1] = _mm512_permutex2var_epi16(even, upper, odd);
}

// to (j, i) = from (i, j) for 16 x 16 words.
RELU_MLP_INLINE void transpose_words(uint32_t* to, const void* from) {
  transpose_square<true>(
      reinterpret_cast<float*>(to), 16, static_cast<const float*>(from), 16, 16,
      16);
}

// Packs b (k, n), whose rows are contiguous. If `transposes`, every tile is
// transposed, which makes it a tile of the operand a = b^T.
template <bool transposes>
void pack_vnni_rows(uint32_t* to, Matrix<const uint16_t> b) {
  const int64_t tiles_k = ceil_div(b.rows, tile_k),
                tiles_n = ceil_div(b.cols, 16);
  for (int64_t k = 0; k < tiles_k; ++k) {
    for (int64_t n = 0; n < tiles_n; n += 2) {
      const __mmask32 columns = first_of_32(b.cols - 16 * n);
      uint32_t* const first = to + (n * tiles_k + k) * tile_words;
      uint32_t* const second = first + tiles_k * tile_words;
      alignas(64) uint32_t squares[2][tile_words];
      uint32_t* const lower = transposes ? squares[0] : first;
      uint32_t* const upper = transposes ? squares[1] : second;
      for (int64_t s = 0; s < 16; ++s) {
        const int64_t row = k * tile_k + 2 * s;
        const auto load_row = [&](int64_t i) {
          return i < b.rows
              ? _mm512_maskz_loadu_epi16(columns, b.row(i) + 16 * n)
              : _mm512_setzero_si512();
        };
        __m512i words[2];
        interleave(words, load_row(row), load_row(row + 1));
        _mm512_storeu_si512(lower + 16 * s, words[0]);
        if (transposes || n + 1 < tiles_n) {
          _mm512_storeu_si512(upper + 16 * s, words[1]);
        }
      }
      if (transposes) {
        transpose_words(first, lower);
        if (n + 1 < tiles_n) {
          transpose_words(second, upper);
        }
      }
    }
  }
}

// Packs b (k, n), whose columns are contiguous: two neighbors in a column make
// a word.
inline void pack_vnni_columns(uint32_t* to, Matrix<const uint16_t> b) {
  const int64_t tiles_k = ceil_div(b.rows, tile_k),
                tiles_n = ceil_div(b.cols, 16);
  for (int64_t n = 0; n < tiles_n; ++n) {
    for (int64_t k = 0; k < tiles_k; ++k) {
      const uint16_t* const from = &b.at(k * tile_k, 16 * n);
      const int64_t rows = b.rows - k * tile_k, cols = b.cols - 16 * n;
      uint32_t* const tile = to + (n * tiles_k + k) * tile_words;
      alignas(64) uint16_t square[16 * tile_k];
      for (int64_t j = 0; j < 16; ++j) {
        _mm512_store_si512(
            square + j * tile_k,
            j < cols ? _mm512_maskz_loadu_epi16(
                           first_of_32(rows), from + j * b.col_stride)
                     : _mm512_setzero_si512());
      }
      transpose_words(tile, square);
    }
  }
}

inline void pack_vnni(uint32_t* to, Matrix<const uint16_t> b) {
  if (b.col_stride == 1) {
    pack_vnni_rows<false>(to, b);
  } else {
    pack_vnni_columns(to, b);
  }
}

// -- After a product ---------------------------------------------------------

// Which of 32 numbers are positive or NaN.
RELU_MLP_INLINE __mmask32 is_on(__m512i numbers) {
  return _mm512_cmpgt_epi16_mask(numbers, _mm512_setzero_si512()) |
      _mm512_cmpgt_epu16_mask(numbers, _mm512_set1_epi16(int16_t(0xff80)));
}

// The bias of the 16 columns from `col` on. Sums start with it.
RELU_MLP_INLINE __m512 load_bias(const Bf16ProductArgs& p, int64_t col) {
  return p.bias && p.n > col
      ? _mm512_maskz_loadu_ps(first_of_16(p.n - col), p.bias + col)
      : _mm512_setzero_ps();
}

// Rounds two vectors of sums, which include the bias, applies ReLU or the mask,
// and writes the result to row `row` of out, from column `col` on.
RELU_MLP_INLINE void write_row(
    const Bf16ProductArgs& p,
    int64_t row,
    int64_t col,
    __mmask32 columns,
    __m512 lower,
    __m512 upper) {
  __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh(upper, lower);
  if (p.epilogue == Epilogue::bias_relu) {
    rounded = _mm512_maskz_mov_epi16(is_on(rounded), rounded);
  } else if (p.epilogue == Epilogue::mask) {
    const uint16_t* const mask = p.mask + row * p.mask_row + col;
    rounded = _mm512_maskz_mov_epi16(
        is_on(_mm512_maskz_loadu_epi16(columns, mask)), rounded);
  }
  _mm512_mask_storeu_epi16(p.out + row * p.out_row + col, columns, rounded);
}

// How a weight gradient writes the first `columns` of 16 sums: in float it
// overwrites or adds, in bfloat16 it rounds.
struct StoreOrAdd {
  bool add;
  RELU_MLP_INLINE void operator()(float* to, __mmask16 columns, __m512 sum)
      const {
    _mm512_mask_storeu_ps(
        to, columns,
        add ? _mm512_add_ps(sum, _mm512_maskz_loadu_ps(columns, to)) : sum);
  }
};
struct StoreRounded {
  RELU_MLP_INLINE void operator()(uint16_t* to, __mmask16 columns, __m512 sum)
      const {
    _mm256_mask_storeu_epi16(to, columns, (__m256i)_mm512_cvtneps_pbh(sum));
  }
};

// -- Sums of columns, and rounding -------------------------------------------

// Sums 32 rows at a time in float, and adds these sums in double precision.
inline void column_sums_bfloat16(double* sums, Matrix<const uint16_t> m) {
  constexpr int64_t most_rows = 32;
  for (int64_t col = 0; col < m.cols; col += 32) {
    const __mmask32 columns = first_of_32(m.cols - col);
    for (int64_t first = 0; first < m.rows; first += most_rows) {
      const int64_t end = first + min(m.rows - first, most_rows);
      __m512 even = _mm512_setzero_ps(), odd = even;
      for (int64_t i = first; i < end; ++i) {
        const __m512i v = _mm512_maskz_loadu_epi16(columns, m.row(i) + col);
        even = _mm512_add_ps(even, (__m512)((__v16su)v << 16));
        odd = _mm512_add_ps(
            odd,
            (__m512)_mm512_and_si512(v, _mm512_set1_epi32(int(0xffff0000))));
      }
      for (int64_t j = 0; j < 32 && col + j < m.cols; ++j) {
        sums[col + j] += double(j % 2 ? odd[j / 2] : even[j / 2]);
      }
    }
  }
}

inline void round_to_bfloat16(uint16_t* to, const float* from, int64_t count) {
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 some = first_of_16(count - i);
    _mm256_mask_storeu_epi16(
        to + i, some,
        (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(some, from + i)));
  }
}

} // namespace
} // namespace relu_mlp::cpu::RELU_MLP_ISA
