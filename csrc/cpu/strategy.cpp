#include "strategy.h"

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
    bool is_narrow,
    bool has_amx,
    int64_t panel) {
  rows = std::max<int64_t>(1, rows); // an empty batch is one empty block
  int64_t widest = 1, parameters = 0;
  for (std::size_t l = 0; l + 1 < widths.size(); ++l) {
    parameters += widths[l] * widths[l + 1];
  }
  for (const int64_t width : widths) {
    widest = std::max(widest, width);
  }
  // A chunk has rows enough to pay for sums of its own. With AMX, rows for one chunk
  // make one block; with fewer rows than this, to pack a weight takes longer than to
  // multiply by it.
  constexpr int64_t chunk_rows = 240, fewest_rows_for_tiles = 6;
  const bool is_for_amx = has_amx && rows >= fewest_rows_for_tiles;
  const bool is_amx_block = is_for_amx && rows < 2 * chunk_rows;
  // Weights that stay in the second-level cache while rows go by. Where too few rows go
  // by to pay for packing them, fewer; but more, where the rows make one wide panel, which
  // is packed instead. 16-bit formats are packed anyway, and in one block of AMX each
  // thread packs its part of them.
  int64_t most_parameters = 1 << 17;
  if (is_amx_block) {
    most_parameters = 1 << 20;
  } else if (!is_narrow && panel >= 64 && rows >= 16 && rows <= panel) {
    most_parameters = 3 << 17;
  } else if (!is_narrow && rows >= 32 && rows < 480) {
    most_parameters = 1 << 16;
  }
  if (parameters > most_parameters && rows > 1) {
    // Blocks with rows enough for the library's full rate. It has no sums over
    // several blocks that are more precise than its operands, so 16-bit formats
    // make one block.
    constexpr int64_t library_block = 2048;
    return {
        WhoseProducts::library, rows,
        is_narrow ? rows : part(rows, library_block), 1};
  }

  // Chunks in a number that many numbers of threads divide. The first two may be
  // smaller if there is something to do: they cost less than to deal out one product
  // after the other.
  constexpr int64_t most_chunks = 32, much_work = 1 << 21;
  const bool may_halve =
      rows >= chunk_rows && rows * parameters >= much_work && !has_amx;
  int64_t chunks = may_halve ? 2 : 1;
  while (2 * chunks <= most_chunks && 2 * chunks * chunk_rows <= rows) {
    chunks *= 2;
  }
  // A block of the widest layer fills an eighth of the second-level cache. AMX is
  // fast enough to wait for the weight gradients, which each block adds to: its
  // blocks are larger.
  constexpr int64_t smallest = 96, largest = 480;
  const int64_t block_elements = has_amx ? 1 << 16 : 1 << 14;
  const int64_t chunk = ceil_div(rows, chunks);
  const int64_t block = is_amx_block
      ? chunk
      : std::clamp(block_elements / widest, smallest, largest);
  return {
      is_for_amx ? WhoseProducts::amx : WhoseProducts::own, chunk,
      part(chunk, block), ceil_div(rows, chunk)};
}

} // namespace relu_mlp::cpu
