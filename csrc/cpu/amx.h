// The matrix product for operands in bfloat16 with the tiles of AMX, which sums in
// float. The interface is that of gemm.h, with floats that bfloat16 can represent,
// or that are rounded to it as the native path would round them: delta.
//
// A panel holds pairs of rows: slot (s, j) has the elements (2 s, j) and
// (2 s + 1, j). It is filled up with zeros to a multiple of 32 rows, the height
// of a tile. Strips of 16 rows of a are converted to bfloat16 just before their
// use, several at once, so that none waits for what was just written.
//
// What limits it: AMX does 16 times the multiply-adds of the float kernel, so the
// time goes into converting a and into what comes before and after. Subnormal
// numbers count as 0, as they do in PyTorch's products on the same processor.
#pragma once

#include "gemm.h"
#include "pack.h"

namespace relu_mlp::cpu::RELU_MLP_ISA {
namespace {

constexpr int64_t k_step = 32; // elements of k in a tile
constexpr int64_t columns = 64; // of a panel

constexpr int64_t round_up_to(int64_t count, int64_t step) {
  return (count + step - 1) / step * step;
}

// (lower[0], upper[0], lower[1], upper[1], ...) in bfloat16.
RELU_MLP_INLINE __m512i pairs(Vec<float> lower, Vec<float> upper) {
  const __m512i order = _mm512_set_epi16(
      31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
      6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(
      order, (__m512i)_mm512_cvtne2ps_pbh((__m512)upper, (__m512)lower));
}

// Rows of contiguous floats as rows of pairs; rows beyond `rows` count as 0.
inline void pack_rows(
    float* to,
    int64_t to_row,
    const float* from,
    int64_t from_row,
    int64_t rows,
    int64_t cols) {
  const Vec<float> zero = {};
  for (int64_t s = 0; 2 * s < round_up_to(rows, k_step); ++s) {
    const float* const lower = from + 2 * s * from_row;
    const float* const upper = lower + from_row;
    for (int64_t j = 0; j < cols; j += 16) {
      const auto part = [&](const float* row, bool exists) {
        return !exists             ? zero
            : j + 16 <= cols ? load(row + j)
                             : load_some(row + j, cols - j);
      };
      _mm512_storeu_si512(
          to + s * to_row + j,
          pairs(part(lower, 2 * s < rows), part(upper, 2 * s + 1 < rows)));
    }
  }
}

inline void pack_pairs(float* to, int64_t to_row, Matrix<const float> b) {
  if (b.col_stride == 1) {
    pack_rows(to, to_row, b.data, b.row_stride, b.rows, b.cols);
    return;
  }
  // Other strides go through float, 32 rows at a time.
  alignas(64) float strip[k_step * columns];
  for (int64_t s = 0; s < b.rows; s += k_step) {
    Matrix<const float> part = b;
    part.data += s * b.row_stride;
    part.rows = b.rows - s < k_step ? b.rows - s : k_step;
    pack(strip, columns, part);
    pack_rows(to + s / 2 * to_row, to_row, strip, columns, part.rows, b.cols);
  }
}

// to (16, k rounded up to k_step) = rows [row, row + rows) of a in bfloat16, with
// zeros around them.
inline void convert_strip(
    uint16_t* to,
    int64_t to_row,
    const Product<float>& p,
    int64_t row,
    int64_t rows,
    int64_t first_k,
    int64_t count_k) {
  const auto put = [&](int64_t i, int64_t k, Vec<float> v) {
    _mm256_storeu_si256(
        reinterpret_cast<__m256i*>(to + i * to_row + k),
        (__m256i)_mm512_cvtneps_pbh((__m512)v));
  };
  for (int64_t k = 0; k < round_up_to(count_k, k_step); k += 16) {
    const int64_t left = count_k - k;
    const float* const from =
        p.a + row * p.a_row + (first_k + k) * p.a_col;
    if (p.a_col == 1) {
      for (int64_t i = 0; i < 16; ++i) {
        const float* const a = from + i * p.a_row;
        put(i, k,
            i >= rows || left <= 0 ? Vec<float>{}
                : left >= 16       ? load(a)
                                   : load_some(a, left));
      }
      continue;
    }
    alignas(64) float square[16 * 16];
    if (p.a_row == 1 && rows == 16 && left >= 16) {
      transpose_square<true>(square, 16, from, p.a_col, 16, 16);
    } else if (p.a_row == 1 && left > 0) {
      transpose_square<false>(square, 16, from, p.a_col, rows, left);
    } else {
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t s = 0; s < 16; ++s) {
          square[i * 16 + s] =
              s < left ? from[i * p.a_row + s * p.a_col] : 0;
        }
      }
    }
    for (int64_t i = 0; i < 16; ++i) {
      put(i, k, i < rows ? load(square + i * 16) : Vec<float>{});
    }
  }
}

// The configuration of the tile registers, given back at the end.
struct Tiles {
  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes_of_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } configuration;
    _tile_loadconfig(&configuration);
  }
  ~Tiles() {
    _tile_release();
  }
};

// sums (16, columns) = a (16, count_k) b, or += that.
inline void multiply_strip(
    float* sums,
    const uint16_t* a,
    int64_t a_row,
    const float* b,
    int64_t b_row,
    int64_t count_k,
    int64_t vectors,
    bool add) {
  constexpr int64_t to_row = columns * sizeof(float);
  if (add) {
    _tile_loadd(0, sums, to_row);
    _tile_loadd(1, sums + 16, to_row);
    _tile_loadd(2, sums + 32, to_row);
    _tile_loadd(3, sums + 48, to_row);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < count_k; k += k_step) {
    const float* const from = b + k / 2 * b_row;
    _tile_loadd(4, a + k, a_row * sizeof(uint16_t));
    _tile_loadd(5, from, b_row * sizeof(float));
    _tile_dpbf16ps(0, 4, 5);
    if (vectors > 1) {
      _tile_loadd(6, from + 16, b_row * sizeof(float));
      _tile_dpbf16ps(1, 4, 6);
    }
    if (vectors > 2) {
      _tile_loadd(7, from + 32, b_row * sizeof(float));
      _tile_dpbf16ps(2, 4, 7);
    }
    if (vectors > 3) {
      _tile_loadd(5, from + 48, b_row * sizeof(float));
      _tile_dpbf16ps(3, 4, 5);
    }
  }
  _tile_stored(0, sums, to_row);
  _tile_stored(1, sums + 16, to_row);
  _tile_stored(2, sums + 32, to_row);
  _tile_stored(3, sums + 48, to_row);
}


template <int vectors>
void finish_strip(
    const Product<float>& p,
    int64_t row,
    int64_t rows,
    const float* sums) {
  for (int64_t i = 0; i < rows; ++i) {
    Vec<float> v[1][vectors];
    RELU_MLP_UNROLL
    for (int j = 0; j < vectors; ++j) {
      v[0][j] = load(sums + i * columns + j * 16);
    }
    finish<1, vectors>(p, row + i, v);
  }
}

inline void product_of_pairs(const Product<float>& p) {
  // As many elements of a as stay in the first-level cache.
  constexpr int64_t strips = 4, most_k = 256;
  alignas(64) uint16_t converted[strips][16 * most_k];
  alignas(64) float sums[strips][16 * columns];
  const int64_t vectors = (p.n + 15) / 16;
  const auto finish_any = vectors == 1 ? finish_strip<1>
      : vectors == 2                   ? finish_strip<2>
      : vectors == 3                   ? finish_strip<3>
                                       : finish_strip<4>;
  const Tiles tiles;
  for (int64_t first = 0; first < p.m; first += 16 * strips) {
    const auto each_strip = [&](const auto& f) {
      for (int64_t s = 0; s < strips && first + 16 * s < p.m; ++s) {
        const int64_t row = first + 16 * s, left = p.m - row;
        f(s, row, left < 16 ? left : 16);
      }
    };
    int64_t k = 0;
    do { // once for k = 0 too
      const int64_t count = p.k - k < most_k ? p.k - k : most_k;
      const int64_t padded = round_up_to(count, k_step);
      each_strip([&](int64_t s, int64_t row, int64_t rows) {
        convert_strip(converted[s], padded, p, row, rows, k, count);
      });
      each_strip([&](int64_t s, int64_t, int64_t) {
        multiply_strip(
            sums[s], converted[s], padded, p.b + k / 2 * p.b_row, p.b_row,
            padded, vectors, k > 0);
      });
      k += count;
    } while (k < p.k);
    each_strip([&](int64_t s, int64_t row, int64_t rows) {
      finish_any(p, row, rows, sums[s]);
    });
  }
}

inline void narrow_bfloat16(uint16_t* to, const float* from, int64_t count) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    _mm256_storeu_si256(
        reinterpret_cast<__m256i*>(to + i),
        (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(from + i)));
  }
  if (const int64_t rest = count - i) {
    _mm256_mask_storeu_epi16(
        to + i, __mmask16((1u << rest) - 1),
        (__m256i)_mm512_cvtneps_pbh((__m512)load_some(from + i, rest)));
  }
}

} // namespace
} // namespace relu_mlp::cpu::RELU_MLP_ISA
