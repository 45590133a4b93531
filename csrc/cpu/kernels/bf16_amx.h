// Products of bfloat16 with the tiles of AMX, which multiply bfloat16 and sum
// in float. Operands and results are bfloat16 in memory. They are loaded into
// tiles and stored without a copy in float.
//
// A tile is 16 rows of 64 bytes. One product of tiles multiplies 16 rows of a,
// 32 elements of k each, by a packed tile of b. The rows of a are read in
// place, except for last columns that do not fill a tile.
//
// AMX does 16 times the multiply-adds of AVX-512. The speed is therefore
// limited by packing and by the work on the sums after a product. Subnormal
// numbers count as 0, as in PyTorch's products on the same processor.
#pragma once

#include "bf16_vnni.h"

namespace relu_mlp::cpu::RELU_MLP_ISA {
namespace {

// Configures the tile registers for the lifetime of the object: 0 to 3 hold the
// sums, 4 and 5 hold `rows` rows of a, 6 and 7 hold tiles of b.
struct TileConfig {
  explicit TileConfig(int64_t rows) {
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
  ~TileConfig() {
    _tile_release();
  }
};

// Strips of 16 rows of a, as tiles.
struct Strips {
  const uint16_t* data; // tile (strip, k) at data + strip * step + k * k_step
  int64_t step, k_step, row_bytes;
  int64_t whole_k; // whole tiles along k, read in place
  // One more tile for each strip, 512 elements apart; or null.
  const uint16_t* last;

  // Calls f(tile of strip 0, distance to strip 1, bytes from row to row) for
  // every k.
  template <typename F>
  RELU_MLP_INLINE void for_each_k(const F& f) const {
    for (int64_t k = 0; k < whole_k; ++k) {
      f(data + k * k_step, step, row_bytes);
    }
    if (last) {
      f(last, 512, 64);
    }
  }
};

// Four tiles of sums are independent of each other: 2 x 2, or 4 x 1 if b has
// only one column of tiles left.
constexpr int64_t sum_count = 4 * 256;
constexpr int64_t tile_columns(int64_t tiles_n) {
  return tiles_n > 1 ? 2 : 1;
}
constexpr int64_t tile_strips(int64_t tiles_n) {
  return tiles_n > 1 ? 2 : 4;
}

// sums (32, 32) = start + 1 or 2 strips of a times 2 columns of tiles of b. All
// rows start with the same 32 numbers.
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
  a.for_each_k([&](const uint16_t* a_tile, int64_t strip, int64_t row_bytes) {
    _tile_loadd(4, a_tile, row_bytes);
    _tile_loadd(6, b, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b + b_step, 64);
    _tile_dpbf16ps(1, 4, 7);
    if (strips > 1) {
      _tile_loadd(5, a_tile + strip, row_bytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    b += tile_words;
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
  a.for_each_k([&](const uint16_t* a_tile, int64_t strip, int64_t row_bytes) {
    _tile_loadd(6, b, 64);
    _tile_loadd(4, a_tile, row_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if (strips > 1) {
      _tile_loadd(5, a_tile + strip, row_bytes);
      _tile_dpbf16ps(1, 5, 6);
    }
    if (strips > 2) {
      _tile_loadd(4, a_tile + 2 * strip, row_bytes);
      _tile_dpbf16ps(2, 4, 6);
    }
    if (strips > 3) {
      _tile_loadd(5, a_tile + 3 * strip, row_bytes);
      _tile_dpbf16ps(3, 5, 6);
    }
    b += tile_words;
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

// Writes sums (rows, 16 vectors) to out, from (row, col) on.
template <int vectors>
void write_tiles(
    const Bf16ProductArgs& p,
    int64_t row,
    int64_t rows,
    int64_t col,
    const float* sums) {
  const __mmask32 columns = first_of_32(min(p.n - col, 16 * vectors));
  for (int64_t i = 0; i < rows; ++i) {
    const float* const from = sums + 16 * i * vectors;
    write_row(
        p, row + i, col, columns, _mm512_load_ps(from),
        vectors > 1 ? _mm512_load_ps(from + 16) : _mm512_setzero_ps());
  }
}

// Computes the rows [first, end) of a product in strips of `height` rows.
inline void multiply_rows(
    const Bf16ProductArgs& p,
    int64_t first,
    int64_t end,
    int64_t height) {
  const int64_t tiles_k = ceil_div(p.k, tile_k), rest = p.k % tile_k;
  const int64_t tiles_n = ceil_div(p.n, 16), b_step = tiles_k * tile_words;
  // Double buffers: one product is written while the next is computed.
  alignas(64) float sums[2][sum_count];
  alignas(64) uint16_t last[2][4 * 16 * tile_k];
  const TileConfig tiles(height);
  for (int64_t n = 0; n < tiles_n; n += 2) {
    const bool is_tall = tile_columns(tiles_n - n) == 1;
    const int64_t col = 16 * n, step = tile_strips(tiles_n - n) * height;
    const uint32_t* const b = p.b + n * b_step;
    alignas(64) float start[32];
    _mm512_store_ps(start, load_bias(p, col));
    _mm512_store_ps(start + 16, load_bias(p, col + 16));
    const auto multiply = [&](int64_t row, int64_t turn) {
      const int64_t rows = min(end - row, step);
      const uint16_t* const a = p.a + row * p.a_row;
      for (int64_t i = 0; rest != 0 && i < rows; ++i) {
        _mm512_store_si512(
            last[turn] + i * tile_k,
            _mm512_maskz_loadu_epi16(
                first_of_32(rest), a + i * p.a_row + p.k - rest));
      }
      const Strips a_strips{
          a,           16 * p.a_row, tile_k,
          2 * p.a_row, p.k / tile_k, rest ? last[turn] : nullptr};
      if (is_tall) {
        multiply_tall(sums[turn], start, a_strips, rows / height, b);
      } else {
        multiply_square(sums[turn], start, a_strips, rows / height, b, b_step);
      }
    };
    multiply(first, 0);
    for (int64_t row = first, turn = 0; row < end; row += step, turn ^= 1) {
      if (row + step < end) {
        multiply(row + step, turn ^ 1);
      }
      (is_tall ? write_tiles<1> : write_tiles<2>)(p, row, min(end - row, step),
                                                  col, sums[turn]);
    }
  }
}

inline void product_amx(const Bf16ProductArgs& p) {
  const int64_t whole = p.m / 16 * 16;
  if (whole > 0) {
    multiply_rows(p, 0, whole, 16);
  }
  if (whole < p.m) {
    multiply_rows(p, whole, p.m, p.m - whole);
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
  const int64_t tiles_k = ceil_div(a.rows, tile_k),
                b_step = tiles_k * tile_words;
  const int64_t tiles_m = ceil_div(to.rows, 16),
                tiles_n = ceil_div(to.cols, 16);
  uint32_t* const right = scratch;
  uint32_t* const left = right + tiles_n * b_step;
  pack_vnni_rows<false>(right, a);
  pack_vnni_rows<true>(left, delta);
  alignas(64) float sums[sum_count];
  alignas(64) const float zeros[32] = {};
  const TileConfig tiles(16);
  for (int64_t n = 0; n < tiles_n; n += 2) {
    const int64_t columns = tile_columns(tiles_n - n),
                  step = tile_strips(tiles_n - n);
    const uint32_t* const b = right + n * b_step;
    for (int64_t m = 0; m < tiles_m; m += step) {
      const int64_t strips = min(tiles_m - m, step);
      const Strips delta_strips{
          reinterpret_cast<const uint16_t*>(left + m * b_step),
          2 * b_step,
          512,
          64,
          tiles_k,
          nullptr};
      if (columns == 1) {
        multiply_tall(sums, zeros, delta_strips, strips, b);
      } else {
        multiply_square(sums, zeros, delta_strips, strips, b, b_step);
      }
      for (int64_t i = 0; i < min(16 * strips, to.rows - 16 * m); ++i) {
        for (int64_t j = 0; j < columns; ++j) {
          const int64_t col = 16 * (n + j);
          write(
              to.row(16 * m + i) + col, first_of_16(to.cols - col),
              _mm512_load_ps(sums + 16 * (i * columns + j)));
        }
      }
    }
  }
}

inline void grad_weight_amx(
    Matrix<float> to,
    Matrix<const uint16_t> delta,
    Matrix<const uint16_t> a,
    bool add,
    uint32_t* scratch) {
  grad_weight_with(to, delta, a, scratch, StoreOrAdd{add});
}
inline void grad_weight_rounded_amx(
    Matrix<uint16_t> to,
    Matrix<const uint16_t> delta,
    Matrix<const uint16_t> a,
    uint32_t* scratch) {
  grad_weight_with(to, delta, a, scratch, StoreRounded{});
}

} // namespace
} // namespace relu_mlp::cpu::RELU_MLP_ISA
