// Every measured number of the CPU, by processor family. Plans are made with
// them; nothing else holds a tuned number.
//
// "Work" counts multiply-adds. Sizes count elements unless a comment says
// bytes. The numbers of chunks and blocks decide in which order rows are
// summed, so changing them changes the bits of weight gradients. Numbers that
// are part of what a kernel computes, such as the 128 terms that gemm.h sums
// without a break, stand with the kernel. So does the height of its tile, which
// the table of kernels tells (Kernels::tile_rows).
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
  bool dpbf16_outruns_float = false;

  // -- This package's products or PyTorch's ----------------------------------

  // From this vector width on (bytes), this package's products are faster than
  // PyTorch's at any size: of float and double, and of float16. MKL keeps its
  // fastest kernels for Intel's processors.
  int64_t own_gemm_vector_bytes = never;
  // PyTorch hands float16 to oneDNN only where the processor computes with it,
  // and elsewhere multiplies it element by element. There AVX2 is enough.
  int64_t own_half_gemm_vector_bytes = 32;

  // Weights of the whole network that stay in the second-level cache while rows
  // go by. Up to this many, PyTorch's products are never faster.
  int64_t small_network = 1 << 17;
  // With these rows (from, and below one_chunk_rows()) packing the weights does
  // not pay for itself, so PyTorch's products already win above a smaller
  // limit. 16-bit weights are converted in any case, which leaves their limit
  // where it is.
  int64_t few_rows = 32;
  int64_t small_network_few_rows = 1 << 16;
  // Rows that fill a panel of AVX-512 well, but no more than one: then the rows
  // are packed instead of the weights, which pays for larger networks.
  int64_t wide_panel = 64;
  int64_t small_network_one_panel = 3 << 17;

  // With fewer rows, packing a weight takes longer than it saves.
  int64_t min_rows_to_pack = 6;

  // Products of bfloat16 serve networks up to these sizes if weights are packed
  // by every thread for itself. Beyond, PyTorch's are as fast (dpbf16), or
  // faster (AMX).
  int64_t dpbf16_max_network = 1 << 22;
  int64_t amx_max_network = 1 << 20;
  // The same for rows: AMX serves a large network only if the rows make a
  // single chunk.
  bool amx_shares_many_rows = false;

  // -- Chunks and blocks of rows ---------------------------------------------

  // A chunk has sums of weight gradients of its own. This many rows pay for
  // them.
  int64_t chunk_rows = 240;
  int64_t max_chunks = 32; // a power of 2, which many numbers of threads divide
  // The first two chunks may have half as many rows if there is this much work:
  // that costs less than dealing out one product after another.
  int64_t min_work_to_halve = 1 << 20;
  // Fewer rows make a single chunk, whose products threads share.
  int64_t one_chunk_rows() const {
    return 2 * chunk_rows;
  }

  // A block of rows goes through all layers at once. Of its widest layer it has
  // this many elements, an eighth of the second-level cache in float. Products
  // of bfloat16 are fast enough to wait for the weight gradients, which every
  // block adds to, so their blocks are larger.
  int64_t block_elements = 1 << 14;
  int64_t bf16_block_elements = 1 << 16;
  int64_t min_block_rows = 96;
  int64_t max_block_rows() const {
    return 2 * chunk_rows;
  }
  // Blocks whose products threads share: PyTorch's products, and large ones of
  // bfloat16, reach their full rate with so many rows.
  int64_t large_block_rows = 2048;
  // This package's own: larger blocks leave the cache, 2048 rows are slower.
  int64_t gemm_large_block_rows = 512;

  // -- Packing: packing.cpp decides it for each product ----------------------

  // A weight up to this size is packed as a whole even if only one block of
  // rows uses it. A larger one is packed panel by panel.
  int64_t small_weight = 1 << 15;
  // With fewer rows than this, dot products serve unpacked weights: the rows
  // would not fill a panel. For a weight beyond large_weight, which does not
  // fit into the second-level cache, that pays a little longer.
  int64_t min_rows_for_panel = 16;
  int64_t min_rows_for_panel_large_weight = 24;
  int64_t large_weight = 1 << 18;
  // Rows of a matrix that lie a multiple of so many bytes apart compete for the
  // same lines of the cache, so the matrix is copied; with few rows the copy
  // does not pay.
  int64_t conflict_bytes = 1024;
  int64_t conflict_panels = 2; // only if a row is longer than so many panels
  int64_t max_rows_to_ignore_conflicts = 12;

  // -- Threads ---------------------------------------------------------------

  // With less work, waking a thread takes longer than the work it takes over.
  int64_t min_work_to_share = 1 << 21;
  // The time of moving an element to or from memory, as work: for a product,
  // and for packing a matrix or summing its columns.
  int64_t work_per_element_moved = 64;
  int64_t work_per_element_packed = 16;
  // Elements that one task handles where rows or columns of memory are dealt
  // out.
  int64_t elements_per_task = 1 << 15;

  // -- The walk over one product ---------------------------------------------

  // Tiles of a result, one below the other, for which all panels are gone
  // through before the next: so what is written lies close together.
  int64_t tiles_per_group = 8;
  // Rows of an unpacked weight that are read for all rows before the next.
  int64_t unpacked_rows_per_group = 32;

  // -- Memory (bytes) --------------------------------------------------------

  // What a thread keeps from call to call. Memory that is not used costs
  // nothing.
  static constexpr int64_t scratch_bytes = 1 << 20;
  // Results from this size on ask for large pages, as NumPy's do.
  static constexpr int64_t min_huge_bytes = 4 << 20;

  // The work of a product (m, k) (k, n), or that of moving its largest matrix
  // if that takes longer.
  int64_t work_of_product(int64_t m, int64_t n, int64_t k) const {
    return std::max(
        m * n * k, work_per_element_moved * std::max({m * n, m * k, n * k}));
  }
};

// The row of the processor that this runs on.
const Tuning& processor_tuning();
// The row of a family, for tests; null if there is none of that name.
const Tuning* find_tuning(std::string_view family);

} // namespace relu_mlp::cpu
