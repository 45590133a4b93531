// Every number that decides how CUDA serves a pass. NONE OF THEM HAS BEEN
// MEASURED: they follow from the predictions in the header comments of the
// kernels. Sizes that the index arithmetic of a kernel depends on are defined
// next to that arithmetic.
#pragma once

#include <cstdint>

namespace relu_mlp::cuda::tuning {

// -- Fused: a whole pass in one kernel ---------------------------------------

// The largest network that the fused kernels take.
constexpr int max_layers = 16, max_width = 128;

// Threads of a block; a plan may take half of them.
constexpr int fused_threads = 256;

// 16-bit elements: the number of 16-row tiles that a warp takes through the
// layers together. In the forward pass two tiles share each read of the
// weights.
constexpr int forward_row_tiles = 2, backward_row_tiles = 1;

// How many blocks of fused_threads fit into the registers of a multiprocessor.
// With two, one block computes while the other waits. `widest` is the width of
// the widest layer.
constexpr int fused_residents_16_bit(bool is_backward, int widest) {
  return widest <= (is_backward ? 32 : 64) ? 2 : 1;
}
constexpr int fused_residents_32_bit = 2;

// -- Layered: a product for each layer ---------------------------------------

// The rows and columns of the part of a product that a multiprocessor computes
// at a time.
constexpr int64_t product_tile = 128;

// The lowest delta is computed a few columns at a time: in at most this many
// parts, each with enough tiles for this share of the multiprocessors. In a
// pass that recomputes, the split saves more memory, so there are more and
// smaller parts.
constexpr int64_t max_parts = 4, max_parts_recomputing = 16;
constexpr int busy_share = 1, busy_share_recomputing = 2; // 1 / n

// Sums over rows. How many blocks fit into the registers of a multiprocessor,
// which lets all of them run at once; the minimum rows of a chunk for each row
// of threads; and the maximum number of chunks, which a second kernel adds up.
constexpr int64_t reduction_residents = 5;
constexpr int64_t min_rows_per_thread = 8;
constexpr int64_t max_chunks = 256;

} // namespace relu_mlp::cuda::tuning
