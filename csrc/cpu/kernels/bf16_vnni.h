// What the kernels that multiply bfloat16 in pairs have in common: the layout of
// packed matrices, what happens to sums after a product, and sums over rows.
//
// A packed matrix (k, n) is used as b of a product. Its elements (2 s, j) and
// (2 s + 1, j) lie side by side in slot (s, j), the even one first; 16 columns by 16
// rows of slots make a tile. One column of tiles lies after the other, and missing
// elements are 0. Other matrices are read and written where they lie.
//
// Packing is limited by shuffles, the rest by memory.
#pragma once

#include "kernels.h"
#include "pack.h"

namespace relu_mlp::cpu::RELU_MLP_ISA {
namespace {

constexpr int64_t tile_k = 32, tile_slots = 256;

// How many steps of `step` it takes to cover `count`.
constexpr int64_t steps(int64_t count, int64_t step) {
  return (count + step - 1) / step;
}
constexpr int64_t least(int64_t a, int64_t b) {
  return a < b ? a : b;
}
constexpr __mmask16 first_of_16(int64_t count) {
  return __mmask16((1u << least(count, 16)) - 1);
}
constexpr __mmask32 first_of_32(int64_t count) {
  return __mmask32((uint64_t(1) << least(count, 32)) - 1);
}

// -- Packing -----------------------------------------------------------------------

// 16 slots from either half of two rows of 32 elements.
RELU_MLP_INLINE void interleave(
    __m512i (&slots)[2],
    __m512i even,
    __m512i odd) {
  const __m512i lower = _mm512_set_epi16(
      47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38,
      6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i upper = _mm512_add_epi16(lower, _mm512_set1_epi16(16));
  slots[0] = _mm512_permutex2var_epi16(even, lower, odd);
  slots[1] = _mm512_permutex2var_epi16(even, upper, odd);
}

// to (j, i) = from (i, j) for 16 x 16 slots.
RELU_MLP_INLINE void transpose_slots(uint32_t* to, const void* from) {
  transpose_square<true>(
      reinterpret_cast<float*>(to), 16, static_cast<const float*>(from), 16, 16,
      16);
}

// b (k, n), whose rows are contiguous. `transposes` turns every tile about its
// diagonal: then they are tiles of a = b^T.
template <bool transposes>
void pack_rows(uint32_t* to, Matrix<const uint16_t> b) {
  const int64_t tiles_k = steps(b.rows, tile_k), tiles_n = steps(b.cols, 16);
  for (int64_t k = 0; k < tiles_k; ++k) {
    for (int64_t n = 0; n < tiles_n; n += 2) {
      const __mmask32 columns = first_of_32(b.cols - 16 * n);
      uint32_t* const first = to + (n * tiles_k + k) * tile_slots;
      uint32_t* const second = first + tiles_k * tile_slots;
      alignas(64) uint32_t squares[2][tile_slots];
      uint32_t* const lower = transposes ? squares[0] : first;
      uint32_t* const upper = transposes ? squares[1] : second;
      for (int64_t s = 0; s < 16; ++s) {
        const int64_t row = k * tile_k + 2 * s;
        const auto load_row = [&](int64_t i) {
          return i < b.rows ? _mm512_maskz_loadu_epi16(
                                  columns, b.row(i) + 16 * n)
                            : _mm512_setzero_si512();
        };
        __m512i slots[2];
        interleave(slots, load_row(row), load_row(row + 1));
        _mm512_storeu_si512(lower + 16 * s, slots[0]);
        if (transposes || n + 1 < tiles_n) {
          _mm512_storeu_si512(upper + 16 * s, slots[1]);
        }
      }
      if (transposes) {
        transpose_slots(first, lower);
        if (n + 1 < tiles_n) {
          transpose_slots(second, upper);
        }
      }
    }
  }
}

// b (k, n), whose columns are contiguous: a slot is two neighbours.
inline void pack_columns(uint32_t* to, Matrix<const uint16_t> b) {
  const int64_t tiles_k = steps(b.rows, tile_k), tiles_n = steps(b.cols, 16);
  for (int64_t n = 0; n < tiles_n; ++n) {
    for (int64_t k = 0; k < tiles_k; ++k) {
      const uint16_t* const from = &b.at(k * tile_k, 16 * n);
      const int64_t rows = b.rows - k * tile_k, cols = b.cols - 16 * n;
      uint32_t* const tile = to + (n * tiles_k + k) * tile_slots;
      alignas(64) uint16_t square[16 * tile_k];
      for (int64_t j = 0; j < 16; ++j) {
        _mm512_store_si512(
            square + j * tile_k,
            j < cols ? _mm512_maskz_loadu_epi16(
                           first_of_32(rows), from + j * b.col_stride)
                     : _mm512_setzero_si512());
      }
      transpose_slots(tile, square);
    }
  }
}

inline void pack_tiles(uint32_t* to, Matrix<const uint16_t> b) {
  if (b.col_stride == 1) {
    pack_rows<false>(to, b);
  } else {
    pack_columns(to, b);
  }
}

// -- After a product ---------------------------------------------------------------

// Which of 32 numbers are positive or NaN.
RELU_MLP_INLINE __mmask32 is_on(__m512i numbers) {
  return _mm512_cmpgt_epi16_mask(numbers, _mm512_setzero_si512()) |
      _mm512_cmpgt_epu16_mask(numbers, _mm512_set1_epi16(int16_t(0xff80)));
}

// The bias of 16 columns, from `col` on: what sums begin with.
RELU_MLP_INLINE __m512 load_bias(const PairProduct& p, int64_t col) {
  return p.bias && p.n > col
      ? _mm512_maskz_loadu_ps(first_of_16(p.n - col), p.bias + col)
      : _mm512_setzero_ps();
}

// Writes two vectors of sums, which have their bias, to (row, col) and on.
RELU_MLP_INLINE void finish(
    const PairProduct& p,
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

// The first `columns` of 16 sums go to, or are added to, where they belong.
RELU_MLP_INLINE void put(
    float* to,
    __mmask16 columns,
    __m512 sum,
    bool add) {
  _mm512_mask_storeu_ps(
      to, columns,
      add ? _mm512_add_ps(sum, _mm512_maskz_loadu_ps(columns, to)) : sum);
}
RELU_MLP_INLINE void put(uint16_t* to, __mmask16 columns, __m512 sum, bool) {
  _mm256_mask_storeu_epi16(to, columns, (__m256i)_mm512_cvtneps_pbh(sum));
}

// -- Beside products ---------------------------------------------------------------

// Sums of 32 numbers in float, whose sum is taken in double precision.
inline void column_sums_bfloat16(double* sums, Matrix<const uint16_t> m) {
  constexpr int64_t most_rows = 32;
  for (int64_t col = 0; col < m.cols; col += 32) {
    const __mmask32 columns = first_of_32(m.cols - col);
    for (int64_t first = 0; first < m.rows; first += most_rows) {
      const int64_t end = first + least(m.rows - first, most_rows);
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

inline void narrow_bfloat16(uint16_t* to, const float* from, int64_t count) {
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 some = first_of_16(count - i);
    _mm256_mask_storeu_epi16(
        to + i, some,
        (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(some, from + i)));
  }
}

} // namespace
} // namespace relu_mlp::cpu::RELU_MLP_ISA
