// The rules of packing: how each product of a layer gets its right operand.
#include "plan.h"

namespace relu_mlp::cpu {
namespace {

// Whether a matrix with this row stride must be copied for a product with
// `rows` rows, because its rows compete for the same cache sets.
bool has_set_conflicts(const Call& call, int64_t row_stride, int64_t rows) {
  const Tuning& t = *call.tuning;
  const Capabilities& has = call.capabilities;
  const int64_t element_size = has.dtype == Dtype::float64 ? 8 : 4;
  return row_stride * element_size % t.conflict_bytes == 0 &&
      row_stride > t.conflict_panels * has.panel &&
      rows > t.max_rows_to_ignore_conflicts;
}

// a W^T. A weight that several blocks use is packed once, and so is a small
// weight. Otherwise:
//   few rows                                   no packing, dot products
//   rows that fit into one panel,
//   and at most as many as the weight's rows   the rows are packed
//   more rows                                  the weight, panel by panel
Pack pack_forward(
    const Call& call,
    const LayerShape& layer,
    bool is_one_block) {
  const Tuning& t = *call.tuning;
  const int64_t size = layer.in * layer.out;
  if (size > 0 && call.rows >= t.min_rows_to_pack &&
      (!is_one_block || size <= t.small_weight)) {
    return Pack::once;
  }
  if (call.rows < (size > t.large_weight ? t.min_rows_for_panel_large_weight
                                         : t.min_rows_for_panel)) {
    return Pack::none;
  }
  return call.rows <= t.wide_panel && call.rows <= layer.out ? Pack::left
                                                             : Pack::per_use;
}

// delta W. The rows of W are read in place unless they have set conflicts.
Pack pack_grad_input(
    const Call& call,
    const LayerShape& layer,
    bool is_one_block) {
  if (layer.in * layer.out == 0) {
    return Pack::per_use;
  }
  if (!has_set_conflicts(call, layer.weight_row_stride, call.rows)) {
    return Pack::view;
  }
  return is_one_block ? Pack::per_use : Pack::once;
}

// delta^T a, with `out` rows.
Pack pack_grad_weight(const Call& call, const LayerShape& layer) {
  return has_set_conflicts(call, layer.input_row_stride, layer.out)
      ? Pack::per_use
      : Pack::view;
}

LayerPacking pack_gemm(
    const Call& call,
    const Plan& plan,
    const LayerShape& layer) {
  const bool is_one_block = call.rows <= plan.block;
  return {
      pack_forward(call, layer, is_one_block),
      pack_grad_input(call, layer, is_one_block),
      pack_grad_weight(call, layer)};
}

// A core reads data slowly that another core has just written. So if threads
// share a product, each thread packs its own part of the weight.
LayerPacking pack_bf16(const Plan& plan) {
  const Pack weight = plan.shares_products() ? Pack::per_use : Pack::once;
  return {weight, weight, Pack::per_use};
}

} // namespace

std::vector<LayerPacking> plan_packing(const Call& call, const Plan& plan) {
  std::vector<LayerPacking> packing;
  packing.reserve(call.layers.size());
  for (const LayerShape& layer : call.layers) {
    switch (plan.layers) {
      case LayersKind::packed:
        packing.push_back(pack_gemm(call, plan, layer));
        break;
      case LayersKind::bf16:
      case LayersKind::bf16_one_block:
        packing.push_back(pack_bf16(plan));
        break;
      case LayersKind::library:
        packing.push_back({Pack::none, Pack::none, Pack::none});
    }
  }
  return packing;
}

} // namespace relu_mlp::cpu
