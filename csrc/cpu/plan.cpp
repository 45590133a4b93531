#include "plan.h"

namespace relu_mlp::cpu {
namespace {

int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}
// The size of equal parts of `total` that have at most about `most`.
int64_t part(int64_t total, int64_t most) {
  return ceil_div(total, ceil_div(total, most));
}

} // namespace

Strategy choose_strategy(
    int64_t rows,
    const std::vector<int64_t>& widths,
    const Means& means) {
  const auto& [is_narrow, pairs, panel, outruns_library] = means;
  rows = std::max<int64_t>(1, rows); // an empty batch is one empty block
  int64_t widest = 1, parameters = 0;
  for (std::size_t l = 0; l + 1 < widths.size(); ++l) {
    parameters += widths[l] * widths[l + 1];
  }
  for (const int64_t width : widths) {
    widest = std::max(widest, width);
  }
  // A chunk has rows enough to pay for sums of its own. A block of PyTorch's products,
  // and of large ones of pairs, has rows enough for their full rate.
  constexpr int64_t chunk_rows = 240, large_block = 2048;
  // Weights that stay in the second-level cache while rows go by.
  constexpr int64_t few_parameters = 1 << 17;

  // Pairs of bfloat16. Where rows make one chunk only, or weights are many, threads share
  // the products. With fewer rows, to pack a weight takes longer than to multiply by it.
  constexpr int64_t fewest_rows_for_pairs = 6;
  const bool is_in_pairs = pairs != Pairs::none && rows >= fewest_rows_for_pairs;
  if (is_in_pairs && (rows < 2 * chunk_rows || parameters > few_parameters)) {
    // Beyond this PyTorch's products are as fast, or by AMX faster.
    const bool is_served = pairs == Pairs::dots
        ? parameters <= 1 << 22
        : parameters <= 1 << 20 && rows < 2 * chunk_rows;
    if (is_served) {
      return {WhoseProducts::pairs, rows, part(rows, large_block), 1};
    }
  }

  // Where too few rows go by to pay for packing weights, fewer of them; but more, where the
  // rows make one wide panel, which is packed instead. 16-bit formats are packed anyway.
  int64_t most_parameters = few_parameters;
  if (!is_narrow && panel >= 64 && rows >= 16 && rows <= panel) {
    most_parameters = 3 << 17;
  } else if (!is_narrow && rows >= 32 && rows < 480) {
    most_parameters = 1 << 16;
  }
  if (parameters > most_parameters && rows > 1) {
    if (outruns_library) {
      constexpr int64_t own_block = 512; // larger ones leave the cache: 2048 is slower
      return {WhoseProducts::own, rows, part(rows, own_block), 1};
    }
    // The library has no sums over several blocks that are more precise than its
    // operands, so 16-bit formats make one block.
    return {
        WhoseProducts::library, rows, is_narrow ? rows : part(rows, large_block),
        1};
  }

  // Chunks in a number that many numbers of threads divide. The first two may be
  // smaller if there is something to do: they cost less than to deal out one product
  // after the other.
  constexpr int64_t most_chunks = 32, much_work = 1 << 20;
  const bool may_halve = rows >= chunk_rows && rows * parameters >= much_work;
  int64_t chunks = may_halve ? 2 : 1;
  while (2 * chunks <= most_chunks && 2 * chunks * chunk_rows <= rows) {
    chunks *= 2;
  }
  // A block of the widest layer fills an eighth of the second-level cache. Pairs are
  // multiplied fast enough to wait for the weight gradients, which each block adds to:
  // their blocks are larger.
  constexpr int64_t smallest = 96, largest = 480;
  const int64_t block_elements = is_in_pairs ? 1 << 16 : 1 << 14;
  const int64_t chunk = ceil_div(rows, chunks);
  const int64_t block = std::clamp(block_elements / widest, smallest, largest);
  return {
      is_in_pairs ? WhoseProducts::pairs : WhoseProducts::own, chunk,
      part(chunk, block), ceil_div(rows, chunk)};
}

} // namespace relu_mlp::cpu
