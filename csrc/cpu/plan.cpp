// The rules of planning. `candidates` lists them in order. The first that
// serves a call makes its plan.
#include "plan.h"

#include <algorithm>

#include "../arithmetic.h"

namespace relu_mlp::cpu {
namespace {

// The size of equal parts of `total` that have at most about `most` each.
int64_t equal_parts(int64_t total, int64_t most) {
  return ceil_div(total, ceil_div(total, most));
}
// An empty batch is one empty block.
int64_t rows_of(const Call& call) {
  return std::max<int64_t>(1, call.rows);
}

// -- Conditions --------------------------------------------------------------

bool makes_one_chunk(const Call& call) {
  return rows_of(call) < call.tuning->one_chunk_rows();
}

bool multiplies_bf16(const Call& call) {
  return call.capabilities.bf16 != Bf16Kind::none &&
      rows_of(call) >= call.tuning->min_rows_to_pack;
}

// Whether the rows fill one panel. Then they are worth packing instead of the
// weights.
bool fills_one_panel(const Call& call) {
  const int64_t rows = rows_of(call), panel = call.capabilities.panel;
  return panel >= call.tuning->wide_panel &&
      rows >= call.tuning->min_rows_for_panel && rows <= panel;
}

// Whether this package's products are faster because the network is small.
bool is_small_network(const Call& call) {
  const Tuning& t = *call.tuning;
  const int64_t rows = rows_of(call);
  const bool converts = call.capabilities.is_16bit();
  int64_t most = t.small_network;
  if (!converts && fills_one_panel(call)) {
    most = t.small_network_one_panel;
  } else if (!converts && rows >= t.few_rows && makes_one_chunk(call)) {
    most = t.small_network_few_rows;
  }
  return rows == 1 || call.parameters() <= most;
}

// Whether this package's products are faster than PyTorch's at any size.
bool prefers_own_gemm(const Call& call) {
  const Capabilities& has = call.capabilities;
  switch (has.dtype) {
    case Dtype::float32:
    case Dtype::float64:
      return has.vector_bytes >= call.tuning->own_gemm_vector_bytes;
    case Dtype::float16:
      return !has.has_half_arithmetic &&
          has.vector_bytes >= call.tuning->own_half_gemm_vector_bytes;
    case Dtype::bfloat16:
      return false;
  }
  return false;
}

// -- The rules ---------------------------------------------------------------

Plan one_chunk(const Call& call, LayersKind layers, int64_t block) {
  return {{}, layers, block, rows_of(call), 1, {}, call.tuning};
}

// The rows of a block of a single chunk, of which there are at most `most`.
int64_t large_block(const Call& call, int64_t most) {
  const Tuning& t = *call.tuning;
  const int64_t fitting =
      std::max(t.min_block_rows, t.large_block_elements / call.widest());
  return equal_parts(rows_of(call), std::min(most, fitting));
}

// A power of 2 of chunks, which many numbers of threads divide. A block has
// about `block_elements` elements in the widest layer.
Plan many_chunks(const Call& call, LayersKind layers, int64_t block_elements) {
  const Tuning& t = *call.tuning;
  const int64_t rows = rows_of(call);
  const bool may_halve =
      rows >= t.chunk_rows && rows * call.parameters() >= t.min_work_to_halve;
  int64_t chunks = may_halve ? 2 : 1;
  while (2 * chunks <= t.max_chunks && 2 * chunks * t.chunk_rows <= rows) {
    chunks *= 2;
  }
  const int64_t chunk = ceil_div(rows, chunks);
  const int64_t block = std::clamp(
      block_elements / call.widest(), t.min_block_rows, t.max_block_rows());
  return {
      {}, layers,     equal_parts(chunk, block), chunk, ceil_div(rows, chunk),
      {}, call.tuning};
}

// Threads share every product of bfloat16 if the rows make only one chunk, or
// if the weights are too many to be kept packed. Above a certain size PyTorch's
// products are better.
bool serves_bf16_shared(const Call& call) {
  const Tuning& t = *call.tuning;
  const int64_t parameters = call.parameters();
  if (!multiplies_bf16(call) ||
      (!makes_one_chunk(call) && parameters <= t.small_network)) {
    return false;
  }
  return call.capabilities.bf16 == Bf16Kind::dpbf16
      ? parameters <= t.dpbf16_max_network
      : parameters <= t.amx_max_network &&
          (makes_one_chunk(call) || t.amx_shares_many_rows);
}
bool serves_bf16_one_block(const Call& call) {
  return serves_bf16_shared(call) &&
      rows_of(call) <= call.tuning->large_block_rows;
}
Plan bf16_one_block(const Call& call) {
  return one_chunk(call, LayersKind::bf16_one_block, rows_of(call));
}
Plan bf16_shared(const Call& call) {
  return one_chunk(
      call, LayersKind::bf16, large_block(call, call.tuning->large_block_rows));
}

bool serves_bf16_chunks(const Call& call) {
  return multiplies_bf16(call) && is_small_network(call);
}
Plan bf16_chunks(const Call& call) {
  return many_chunks(call, LayersKind::bf16, call.tuning->bf16_block_elements);
}

Plan gemm_chunks(const Call& call) {
  return many_chunks(call, LayersKind::packed, call.tuning->block_elements);
}

Plan gemm_shared(const Call& call) {
  return one_chunk(
      call, LayersKind::packed,
      large_block(call, call.tuning->gemm_large_block_rows));
}

// PyTorch's products would round sums over several blocks to 16 bits, so 16-bit
// formats make a single block.
Plan library(const Call& call) {
  const int64_t rows = rows_of(call);
  return one_chunk(
      call, LayersKind::library,
      call.capabilities.is_16bit()
          ? rows
          : large_block(call, call.tuning->large_block_rows));
}
bool always(const Call&) {
  return true;
}

struct Candidate {
  const char* name;
  bool (*serves)(const Call&);
  Plan (*plan)(const Call&); // without its name and packing
};

constexpr Candidate candidates[] = {
    {"bf16_one_block", serves_bf16_one_block, bf16_one_block},
    {"bf16_shared", serves_bf16_shared, bf16_shared},
    {"bf16_chunks", serves_bf16_chunks, bf16_chunks},
    {"gemm_chunks", is_small_network, gemm_chunks},
    {"gemm_shared", prefers_own_gemm, gemm_shared},
    {"library", always, library},
};

} // namespace

int64_t Call::parameters() const {
  int64_t sum = 0;
  for (const LayerShape& layer : layers) {
    sum += layer.in * layer.out;
  }
  return sum;
}

int64_t Call::widest() const {
  int64_t widest = 1;
  for (const LayerShape& layer : layers) {
    widest = std::max({widest, layer.in, layer.out});
  }
  return widest;
}

Plan make_plan(const Call& call) {
  const Candidate* candidate = candidates;
  while (!candidate->serves(call)) {
    ++candidate;
  }
  Plan plan = candidate->plan(call);
  plan.candidate = candidate->name;
  plan.packing = plan_packing(call, plan);
  return plan;
}

} // namespace relu_mlp::cpu
