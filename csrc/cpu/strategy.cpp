#include "strategy.h"

namespace relu_mlp::cpu {
namespace {

constexpr int64_t tallest_tile = 48; // every tile of gemm.h divides it

int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}
// `total` cut into equal parts of at most about `most`, whole tiles each.
int64_t part(int64_t total, int64_t most) {
  const int64_t equal = ceil_div(std::max<int64_t>(1, total),
                                 std::max<int64_t>(1, ceil_div(total, most)));
  return ceil_div(equal, tallest_tile) * tallest_tile;
}

} // namespace

Strategy choose_strategy(
    int64_t rows,
    const std::vector<int64_t>& widths,
    bool is_narrow) {
  int64_t widest = 1, parameters = 0;
  for (std::size_t l = 0; l + 1 < widths.size(); ++l) {
    parameters += widths[l] * widths[l + 1];
  }
  for (const int64_t width : widths) {
    widest = std::max(widest, width);
  }
  // Weights that stay in the second-level cache while rows go by.
  constexpr int64_t few_parameters = 1 << 17;
  if (parameters > few_parameters && rows > 1) {
    // Blocks with rows enough for the library's full rate. It has no sums over
    // several blocks that are more precise than its operands, so 16-bit formats
    // make one block.
    constexpr int64_t library_block = 2048;
    const int64_t block = is_narrow ? rows : part(rows, library_block);
    return {true, rows, std::min(rows, block), 1};
  }

  // A block of the widest layer fills an eighth of that cache; a chunk has rows
  // enough to pay for sums of its own.
  constexpr int64_t block_elements = 1 << 14, smallest = 96, largest = 480;
  constexpr int64_t chunk_rows = 240, most_chunks = 32;
  int64_t chunk = std::max<int64_t>(1, rows);
  if (parameters <= few_parameters && rows >= 2 * chunk_rows) {
    chunk = part(rows, std::max(chunk_rows, ceil_div(rows, most_chunks)));
  }
  const int64_t block = std::clamp(block_elements / widest, smallest, largest);
  return {false, chunk, std::min(chunk, part(chunk, block)),
          std::max<int64_t>(1, ceil_div(rows, chunk))};
}

} // namespace relu_mlp::cpu
