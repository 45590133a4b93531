#include "plan.h"

#include <algorithm>

namespace relu_mlp::cuda {

NarrowPlanQuestion as_narrow(const Question& question) {
  const std::size_t layers = question.widths.size() - 1;
  NarrowPlanQuestion narrow{};
  if (question.rows < 1 || layers > std::size_t(max_layers)) {
    return narrow; // no layers: not served
  }
  narrow.layers = int(layers);
  for (std::size_t l = 0; l <= layers; ++l) {
    // one more than the largest stands for all that are too large
    narrow.widths[l] =
        int(std::min<int64_t>(question.widths[l], max_width + 1));
  }
  narrow.element_size = question.element_size;
  narrow.rows = question.rows;
  narrow.is_backward = question.is_backward;
  narrow.recompute = question.recompute;
  narrow.device = question.device;
  return narrow;
}

Regime choose_regime(const Question& question) {
  if (narrow_serves(as_narrow(question))) {
    return Regime::narrow;
  }
  for (std::size_t l = 0; l + 1 < question.widths.size(); ++l) {
    const int64_t in = question.widths[l], out = question.widths[l + 1];
    if (is_for_cublaslt(
            {question.rows, in, out, in, out, question.element_size, true})) {
      return Regime::wide;
    }
  }
  return Regime::library;
}

bool is_for_cublaslt(const Product& p) {
  constexpr int64_t limit = int64_t(1) << 31; // its kernels count in 32 bits
  const int64_t step = 16 / p.element_size;
  const auto fits = [&](int64_t width, int64_t ld) {
    return width > 0 && width < limit && width % step == 0 && ld >= width &&
        ld < limit && ld % step == 0;
  };
  return p.element_size == 2 && p.aligned && p.rows > 0 && p.rows < limit &&
      fits(p.in, p.input_ld) && fits(p.out, p.output_ld);
}

int vector_length(int64_t cols, int64_t ld, int element_size, bool aligned) {
  const int vector = 16 / element_size;
  return aligned && cols % vector == 0 && ld % vector == 0 ? vector : 1;
}

int64_t columns_at_once(
    int64_t rows,
    int64_t cols,
    bool recompute,
    const Device& device) {
  constexpr int64_t tile = 128; // rows and columns that a multiprocessor takes
  const int64_t most_parts = recompute ? 16 : 4;
  const int64_t least_tiles = device.multiprocessors / (recompute ? 2 : 1);
  const int64_t tiles_down = std::max<int64_t>(1, ceil_div(rows, tile));
  const int64_t tiles = std::max<int64_t>(1, ceil_div(cols, tile));
  const int64_t wanted = std::max(
      ceil_div(tiles, most_parts), ceil_div(least_tiles, tiles_down));
  const int64_t parts = ceil_div(tiles, wanted);
  return std::min(cols, tile * ceil_div(tiles, parts)); // in equal parts
}

Columns plan_columns(
    int64_t rows,
    int64_t cols,
    int vector,
    const Device& device) {
  // As many blocks as a multiprocessor has registers for, so that all run at
  // once; a chunk with several rows for each thread; and a second kernel of at
  // most 256 rows.
  constexpr int64_t blocks_each = 5, least_rows = 8 * columns_rows, most = 256;
  Columns plan{vector, ceil_div(cols, columns_lanes * vector), 1, rows};
  if (rows > 0 && cols > 0) {
    const int64_t wanted = std::max<int64_t>(
        1, blocks_each * device.multiprocessors / plan.tiles);
    const int64_t chunks =
        std::min({wanted, ceil_div(rows, least_rows), most});
    plan.chunk_rows = ceil_div(rows, chunks);
    plan.chunks = ceil_div(rows, plan.chunk_rows);
  }
  return plan;
}

} // namespace relu_mlp::cuda
