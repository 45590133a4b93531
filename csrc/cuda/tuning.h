// Every number that decides how CUDA serves a call. NONE OF THEM HAS BEEN
// MEASURED: they follow from the predictions at the heads of the kernels. Sizes
// that the kernels' index arithmetic depends on are not here but beside it.
#pragma once

#include <cstdint>

namespace relu_mlp::cuda::tuning {

// -- Fused: a whole pass in one kernel ---------------------------------------

// The largest network that the fused kernels take.
constexpr int max_layers = 16, max_width = 128;

// Threads of a block; a plan may take half of them.
constexpr int fused_threads = 256;

// 16-bit elements: tiles of 16 rows that a warp takes through the layers
// together. In the forward pass two of them share each read of the weights.
constexpr int forward_row_tiles = 2, backward_row_tiles = 1;

// How many blocks of fused_threads the registers of a multiprocessor suffice
// for; with two, one computes while the other waits. `widest` is the widest
// layer.
constexpr int fused_residents_16_bit(bool is_backward, int widest) {
  return widest <= (is_backward ? 32 : 64) ? 2 : 1;
}
constexpr int fused_residents_32_bit = 2;

// -- Layered: a product for each layer ---------------------------------------

// The rows and columns of a product that a multiprocessor takes at a time.
constexpr int64_t product_tile = 128;

// The lowest delta is computed a few columns at a time: in at most this many
// parts, each with enough tiles for this share of the multiprocessors. A pass
// that recomputes saves more memory by it, so it makes more and smaller parts.
constexpr int64_t max_parts = 4, max_parts_recomputing = 16;
constexpr int busy_share = 1, busy_share_recomputing = 2; // 1 / n

// Sums over rows: blocks that the registers of a multiprocessor suffice for, so
// that all run at once; the fewest rows of a chunk for each row of threads; and
// the most chunks, which a second kernel adds up.
constexpr int64_t reduction_residents = 5;
constexpr int64_t min_rows_per_thread = 8;
constexpr int64_t max_chunks = 256;

} // namespace relu_mlp::cuda::tuning
