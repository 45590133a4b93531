// The products of layers in bfloat16 with the tiles of AMX, which multiply
// bfloat16 and sum in float. Operands and results are bfloat16 in memory, and
// go from there into the tiles and back without a copy in float.
//
// A tile is 16 rows of 64 bytes. One product of tiles takes 16 rows of a with 32
// elements of k each, and 16 columns of b as rows of pairs: (2 s, j) and
// (2 s + 1, j) lie side by side in slot (s, j). A matrix that is used as b is
// packed into such tiles, 256 slots each; one column of tiles lies after the
// other. Missing elements are 0. a is read where it lies, but for the last columns
// if they do not fill a tile.
//
// What limits it: AMX does 16 times the multiply-adds of AVX-512, so the time goes
// into what happens to the sums after a product, and into packing. Subnormal
// numbers count as 0, as they do in PyTorch's products on the same processor.
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

// -- Packing ------------------------------------------------------------------

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

// -- Products -----------------------------------------------------------------

// The tile registers: 0 to 3 hold the sums, 4 and 5 `rows` rows of a, and 6 and 7
// those of b.
struct Tiles {
  explicit Tiles(int64_t rows) {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes_of_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {};
    } configuration;
    for (int t = 0; t < 8; ++t) {
      configuration.rows[t] = uint8_t(t < 6 ? rows : 16);
    }
    _tile_loadconfig(&configuration);
  }
  ~Tiles() {
    _tile_release();
  }
};

// Strips of 16 rows of a, as tiles.
struct Strips {
  const uint16_t* data; // tile (strip, k) at data + strip * step + k * k_step
  int64_t step, k_step, row_bytes;
  int64_t whole_k; // tiles that lie there
  const uint16_t* last; // one more for each strip, 512 elements each; or null

  // Calls f(tile of strip 0, its distance to strip 1, from row to row) for every k.
  template <typename F>
  RELU_MLP_INLINE void each_k(const F& f) const {
    for (int64_t k = 0; k < whole_k; ++k) {
      f(data + k * k_step, step, row_bytes);
    }
    if (last) {
      f(last, 512, 64);
    }
  }
};

// Four tiles of sums do not wait for each other: 2 x 2, or where b has but one
// column of tiles left, 4 x 1.
constexpr int64_t sum_count = 4 * 256;
constexpr int64_t wide(int64_t tiles_n) {
  return tiles_n > 1 ? 2 : 1;
}
constexpr int64_t tall(int64_t tiles_n) {
  return tiles_n > 1 ? 2 : 4;
}

// sums (32, 32) = start + 1 or 2 strips of a times 2 columns of tiles of b, where
// all rows start with the same 32 numbers.
inline void multiply_square(
    float* sums,
    const float* start,
    const Strips& a,
    int64_t strips,
    const uint32_t* b,
    int64_t b_step) {
  _tile_loadd(0, start, 0);
  _tile_loadd(1, start + 16, 0);
  _tile_loadd(2, start, 0);
  _tile_loadd(3, start + 16, 0);
  a.each_k([&](const uint16_t* of_a, int64_t strip, int64_t row_bytes) {
    _tile_loadd(4, of_a, row_bytes);
    _tile_loadd(6, b, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b + b_step, 64);
    _tile_dpbf16ps(1, 4, 7);
    if (strips > 1) {
      _tile_loadd(5, of_a + strip, row_bytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    b += tile_slots;
  });
  _tile_stored(0, sums, 128);
  _tile_stored(1, sums + 16, 128);
  if (strips > 1) {
    _tile_stored(2, sums + 512, 128);
    _tile_stored(3, sums + 528, 128);
  }
}

// sums (64, 16) = start + 1 to 4 strips of a times one column of tiles of b.
inline void multiply_tall(
    float* sums,
    const float* start,
    const Strips& a,
    int64_t strips,
    const uint32_t* b) {
  _tile_loadd(0, start, 0);
  _tile_loadd(1, start, 0);
  _tile_loadd(2, start, 0);
  _tile_loadd(3, start, 0);
  a.each_k([&](const uint16_t* of_a, int64_t strip, int64_t row_bytes) {
    _tile_loadd(6, b, 64);
    _tile_loadd(4, of_a, row_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if (strips > 1) {
      _tile_loadd(5, of_a + strip, row_bytes);
      _tile_dpbf16ps(1, 5, 6);
    }
    if (strips > 2) {
      _tile_loadd(4, of_a + 2 * strip, row_bytes);
      _tile_dpbf16ps(2, 4, 6);
    }
    if (strips > 3) {
      _tile_loadd(5, of_a + 3 * strip, row_bytes);
      _tile_dpbf16ps(3, 5, 6);
    }
    b += tile_slots;
  });
  _tile_stored(0, sums, 64);
  if (strips > 1) {
    _tile_stored(1, sums + 256, 64);
  }
  if (strips > 2) {
    _tile_stored(2, sums + 512, 64);
  }
  if (strips > 3) {
    _tile_stored(3, sums + 768, 64);
  }
}

// Writes sums (rows, 16 vectors) to out from (row, col) on, by the epilogue, which
// has its bias behind it.
template <int vectors>
void finish_tiles(
    const TileProduct& p,
    int64_t row,
    int64_t rows,
    int64_t col,
    const float* sums) {
  const __m512 zero = _mm512_setzero_ps();
  const __mmask32 columns = first_of_32(least(p.n - col, 16 * vectors));
  for (int64_t i = 0; i < rows; ++i) {
    __m512 v[2] = {zero, zero};
    RELU_MLP_UNROLL
    for (int j = 0; j < vectors; ++j) {
      v[j] = _mm512_loadu_ps(sums + 16 * (i * vectors + j));
      if (p.epilogue == Epilogue::bias_relu) { // NaN passes
        v[j] = _mm512_maskz_mov_ps(
            _mm512_cmp_ps_mask(v[j], zero, _CMP_NLE_UQ), v[j]);
      }
    }
    __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh(v[1], v[0]);
    if (p.epilogue == Epilogue::mask) {
      const __m512i of_mask = _mm512_maskz_loadu_epi16(
          columns, p.mask + (row + i) * p.mask_row + col);
      // Positive, or a NaN whose sign is set.
      const __mmask32 is_on =
          _mm512_cmpgt_epi16_mask(of_mask, _mm512_setzero_si512()) |
          _mm512_cmpgt_epu16_mask(of_mask, _mm512_set1_epi16(int16_t(0xff80)));
      rounded = _mm512_maskz_mov_epi16(is_on, rounded);
    }
    _mm512_mask_storeu_epi16(
        p.out + (row + i) * p.out_row + col, columns, rounded);
  }
}

// The rows [first, end) of a product, in strips of `height` rows.
inline void multiply_rows(
    const TileProduct& p,
    int64_t first,
    int64_t end,
    int64_t height) {
  const int64_t tiles_k = steps(p.k, tile_k), rest = p.k % tile_k;
  const int64_t tiles_n = steps(p.n, 16), b_step = tiles_k * tile_slots;
  // Two of each: one product is written while the next one is computed.
  alignas(64) float sums[2][sum_count];
  alignas(64) uint16_t last[2][4 * 16 * tile_k];
  const Tiles tiles(height);
  for (int64_t n = 0; n < tiles_n; n += 2) {
    const bool is_tall = wide(tiles_n - n) == 1;
    const int64_t col = 16 * n, step = tall(tiles_n - n) * height;
    const uint32_t* const b = p.b + n * b_step;
    alignas(64) float start[32];
    for (int64_t j = 0; j < 32; j += 16) {
      _mm512_store_ps(
          start + j,
          p.bias && p.n > col + j
              ? _mm512_maskz_loadu_ps(
                    first_of_16(p.n - col - j), p.bias + col + j)
              : _mm512_setzero_ps());
    }
    const auto multiply = [&](int64_t row, int64_t turn) {
      const int64_t rows = least(end - row, step);
      const uint16_t* const a = p.a + row * p.a_row;
      for (int64_t i = 0; rest != 0 && i < rows; ++i) {
        _mm512_store_si512(
            last[turn] + i * tile_k,
            _mm512_maskz_loadu_epi16(
                first_of_32(rest), a + i * p.a_row + p.k - rest));
      }
      const Strips of_a{a, 16 * p.a_row, tile_k, 2 * p.a_row, p.k / tile_k,
                        rest ? last[turn] : nullptr};
      if (is_tall) {
        multiply_tall(sums[turn], start, of_a, rows / height, b);
      } else {
        multiply_square(sums[turn], start, of_a, rows / height, b, b_step);
      }
    };
    multiply(first, 0);
    for (int64_t row = first, turn = 0; row < end; row += step, turn ^= 1) {
      if (row + step < end) {
        multiply(row + step, turn ^ 1);
      }
      (is_tall ? finish_tiles<1> : finish_tiles<2>)(
          p, row, least(end - row, step), col, sums[turn]);
    }
  }
}

inline void product_of_tiles(const TileProduct& p) {
  const int64_t whole = p.m / 16 * 16;
  if (whole > 0) {
    multiply_rows(p, 0, whole, 16);
  }
  if (whole < p.m) {
    multiply_rows(p, whole, p.m, p.m - whole);
  }
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

// to (m, n) = delta^T a, or += that if the sums stay float. Both operands are
// packed first, `scratch` is for that.
template <typename S>
void grad_weight_of_tiles(
    Matrix<S> to,
    Matrix<const uint16_t> delta,
    Matrix<const uint16_t> a,
    bool add,
    uint32_t* scratch) {
  const int64_t tiles_k = steps(a.rows, tile_k), b_step = tiles_k * tile_slots;
  const int64_t tiles_m = steps(to.rows, 16), tiles_n = steps(to.cols, 16);
  uint32_t* const right = scratch;
  uint32_t* const left = right + tiles_n * b_step;
  pack_rows<false>(right, a);
  pack_rows<true>(left, delta);
  alignas(64) float sums[sum_count];
  alignas(64) const float zeros[32] = {};
  const Tiles tiles(16);
  for (int64_t n = 0; n < tiles_n; n += 2) {
    const int64_t columns = wide(tiles_n - n), step = tall(tiles_n - n);
    const uint32_t* const b = right + n * b_step;
    for (int64_t m = 0; m < tiles_m; m += step) {
      const int64_t strips = least(tiles_m - m, step);
      const Strips of_delta{
          reinterpret_cast<const uint16_t*>(left + m * b_step), 2 * b_step, 512,
          64, tiles_k, nullptr};
      if (columns == 1) {
        multiply_tall(sums, zeros, of_delta, strips, b);
      } else {
        multiply_square(sums, zeros, of_delta, strips, b, b_step);
      }
      for (int64_t i = 0; i < least(16 * strips, to.rows - 16 * m); ++i) {
        for (int64_t j = 0; j < columns; ++j) {
          const int64_t col = 16 * (n + j);
          put(to.row(16 * m + i) + col, first_of_16(to.cols - col),
              _mm512_load_ps(sums + 16 * (i * columns + j)), add);
        }
      }
    }
  }
}

inline void add_grad_weight(
    Matrix<float> to,
    Matrix<const uint16_t> delta,
    Matrix<const uint16_t> a,
    bool add,
    uint32_t* scratch) {
  grad_weight_of_tiles(to, delta, a, add, scratch);
}
inline void whole_grad_weight(
    Matrix<uint16_t> to,
    Matrix<const uint16_t> delta,
    Matrix<const uint16_t> a,
    uint32_t* scratch) {
  grad_weight_of_tiles(to, delta, a, false, scratch);
}

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
