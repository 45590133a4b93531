#include "plan.h"

#include <algorithm>
#include <optional>

namespace relu_mlp::cuda {
namespace {

std::optional<PassPlan> plan_fused(const PassSpec& pass) {
  PassPlan plan{Method::fused, {}};
  return fused_serves(pass, plan.fused) ? std::optional(plan) : std::nullopt;
}

std::optional<PassPlan> plan_layered(const PassSpec&) {
  return PassPlan{Method::layered, {}};
}

// The candidates in order of preference. The last one serves every pass.
constexpr std::optional<PassPlan> (*candidates[])(const PassSpec&) = {
    plan_fused, plan_layered};

} // namespace

PassPlan plan_pass(const PassSpec& pass) {
  for (const auto candidate : candidates) {
    if (const std::optional<PassPlan> plan = candidate(pass)) {
      return *plan;
    }
  }
  return {Method::layered, {}}; // not reached
}

bool is_for_cublaslt(const ProductShape& p) {
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
    const DeviceProperties& device) {
  using namespace tuning;
  const int64_t max_part_count = recompute ? max_parts_recomputing : max_parts;
  const int64_t min_tiles = device.multiprocessors /
      (recompute ? busy_share_recomputing : busy_share);
  const int64_t tiles_down = std::max<int64_t>(1, ceil_div(rows, product_tile));
  const int64_t tiles = std::max<int64_t>(1, ceil_div(cols, product_tile));
  const int64_t wanted = std::max(
      ceil_div(tiles, max_part_count), ceil_div(min_tiles, tiles_down));
  const int64_t parts = ceil_div(tiles, wanted);
  return std::min(cols, product_tile * ceil_div(tiles, parts)); // equal parts
}

ColumnReduction plan_reduction(
    int64_t rows,
    int64_t cols,
    int vector,
    const DeviceProperties& device) {
  using namespace tuning;
  ColumnReduction plan{
      vector, ceil_div(cols, reduction_lanes * vector), 1, rows};
  if (rows > 0 && cols > 0) {
    const int64_t wanted = std::max<int64_t>(
        1, reduction_residents * device.multiprocessors / plan.tiles);
    const int64_t min_chunk_rows = min_rows_per_thread * reduction_rows;
    const int64_t chunks =
        std::min({wanted, ceil_div(rows, min_chunk_rows), max_chunks});
    plan.chunk_rows = ceil_div(rows, chunks);
    plan.chunks = ceil_div(rows, plan.chunk_rows);
  }
  return plan;
}

} // namespace relu_mlp::cuda
