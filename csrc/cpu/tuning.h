// Every measured number of the CPU, by processor family. Plans use these
// numbers. No other file holds a tuned number.
//
// "Work" counts multiply-adds. Sizes count elements unless a comment says
// bytes. The numbers of chunks and blocks decide in which order rows are
// summed, so changing them changes the bits of weight gradients. Numbers that
// define what a kernel computes, such as the 128 terms that gemm.h sums without
// a break, are defined in the kernel. So is the height of its tile, which the
// table of kernels provides (Kernels::tile_rows).
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <string_view>

namespace relu_mlp::cpu {

struct Tuning {
  static constexpr int64_t never = std::numeric_limits<int64_t>::max();

  const char* family = "generic";

  // -- Which instructions ----------------------------------------------------

  // Whether dot products of bfloat16 (AVX512-BF16) take less time than widening
  // and multiplying in float. They took twice the time on a Sapphire Rapids,
  // and half of it on Zen 4.
  bool prefers_dpbf16 = false;

  // -- This package's products or PyTorch's ----------------------------------

  // From this vector width (bytes) on, this package's float and double products
  // are faster than PyTorch's at any size. MKL keeps its fastest kernels for
  // Intel's processors.
  int64_t own_gemm_vector_bytes = never;
  // The same for float16, on processors without float16 arithmetic. On the
  // others PyTorch calls oneDNN. Here it multiplies element by element, so AVX2
  // is enough.
  int64_t own_half_gemm_vector_bytes = 32;

  // The number of weights of a network that stay in the L2 cache while rows go
  // by. Up to this size, PyTorch's products are never faster.
  int64_t small_network = 1 << 17;
  // From few_rows up to one_chunk_rows(), packing the weights does not pay, so
  // PyTorch's products already win above a smaller limit. 16-bit weights are
  // converted in any case, so their limit stays the same.
  int64_t few_rows = 32;
  int64_t small_network_few_rows = 1 << 16;
  // The width of a panel of AVX-512. If the rows fill such a panel well, and no
  // more than one, the rows are packed instead of the weights. This pays for
  // larger networks.
  int64_t wide_panel = 64;
  int64_t small_network_one_panel = 3 << 17;

  // With fewer rows, packing a weight takes longer than it saves.
  int64_t min_rows_to_pack = 6;

  // If every thread packs weights for itself, products of bfloat16 serve
  // networks up to these sizes. For larger ones PyTorch's products are as fast
  // (dpbf16) or faster (AMX).
  int64_t dpbf16_max_network = 1 << 22;
  int64_t amx_max_network = 1 << 20;
  // Whether AMX serves a large network whose rows make more than a single
  // chunk.
  bool amx_shares_many_rows = false;

  // -- Chunks and blocks of rows ---------------------------------------------

  // A chunk has its own sums of weight gradients. This many rows pay for them.
  int64_t chunk_rows = 240;
  int64_t max_chunks = 32; // a power of 2, which many numbers of threads divide
  // With this much work, rows are split into two chunks even if a chunk has
  // only half of chunk_rows. That costs less than sharing one product after
  // another.
  int64_t min_work_to_halve = 1 << 20;
  // Fewer rows make a single chunk, whose products threads share.
  int64_t one_chunk_rows() const {
    return 2 * chunk_rows;
  }

  // A block of rows goes through all layers at once. In the widest layer it has
  // this many elements, an eighth of the L2 cache in float. Products of
  // bfloat16 are so fast that they wait for the weight gradients, to which
  // every block adds. Their blocks are therefore larger.
  int64_t block_elements = 1 << 14;
  int64_t bf16_block_elements = 1 << 16;
  int64_t min_block_rows = 96;
  int64_t max_block_rows() const {
    return 2 * chunk_rows;
  }
  // The rows of a block whose products threads share. PyTorch's products, and
  // large ones of bfloat16, reach their full rate with this many rows.
  int64_t large_block_rows = 2048;
  // But no more rows than have this many elements in the widest layer, so that
  // the outputs of 4096 rows for 100 000 classes never exist at once. A weight
  // that wide is read, and its gradient read and written, for every block.
  int64_t large_block_elements = 1 << 23;
  // The most rows for this package's products in float and double. Larger
  // blocks leave the cache: 2048 rows are slower.
  int64_t gemm_large_block_rows = 512;

  // -- Packing (packing.cpp) -------------------------------------------------

  // A weight up to this size is packed as a whole even if only one block of
  // rows uses it. A larger one is packed panel by panel.
  int64_t small_weight = 1 << 15;
  // With fewer rows than this, products use dot products with unpacked weights,
  // because the rows would not fill a panel. For a weight beyond large_weight,
  // which does not fit into the L2 cache, this pays for a few more rows.
  int64_t min_rows_for_panel = 16;
  int64_t min_rows_for_panel_large_weight = 24;
  int64_t large_weight = 1 << 18;
  // If the distance between a matrix's rows is a multiple of this many bytes,
  // the rows compete for the same cache sets, so the matrix is copied. With few
  // rows the copy does not pay.
  int64_t conflict_bytes = 1024;
  int64_t conflict_panels = 2; // only if a row is longer than this
  int64_t max_rows_to_ignore_conflicts = 12;

  // -- Threads ---------------------------------------------------------------

  // With less work, waking a thread takes longer than the work it takes over.
  int64_t min_work_to_share = 1 << 21;
  // The time to move an element to or from memory, as work: for a product, and
  // for packing a matrix or summing its columns.
  int64_t work_per_element_moved = 64;
  int64_t work_per_element_packed = 16;
  // The elements of one task if threads share the rows or columns of a matrix.
  int64_t elements_per_task = 1 << 15;

  // -- The order within one product ------------------------------------------

  // The tiles, one below the other, in a group of rows of a result. A group
  // goes through all panels before the next one starts, so writes stay close
  // together.
  int64_t tiles_per_group = 8;
  // The rows of an unpacked weight that serve all rows of a before the next
  // ones are read.
  int64_t unpacked_rows_per_group = 32;

  // -- Memory (bytes) --------------------------------------------------------

  // The memory that a thread keeps between calls. Pages that are never touched
  // cost nothing.
  static constexpr int64_t scratch_bytes = 1 << 20;
  // Results of this size or more request huge pages, as in NumPy.
  static constexpr int64_t min_huge_bytes = 4 << 20;

  // The work of a product (m, k) (k, n), or the work of moving its largest
  // matrix if that takes longer.
  int64_t work_of_product(int64_t m, int64_t n, int64_t k) const {
    return std::max(
        m * n * k, work_per_element_moved * std::max({m * n, m * k, n * k}));
  }
};

// The row of this processor.
const Tuning& processor_tuning();
// The row of a family, for tests; null if there is none of this name.
const Tuning* find_tuning(std::string_view family);

} // namespace relu_mlp::cpu
