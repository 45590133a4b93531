// torch.ops.relu_mlp_testing: operators with which tests query the library and
// change its settings. Nothing in the package calls them.

#include <algorithm>

#include "checks.h"
#include "cpu/isa/isa.h"
#include "cpu/plan_probe.h"
#include "cuda/plan.h"
#include "registration.h"
#include "stack.h"

namespace relu_mlp {
namespace {

std::string supported_instruction_sets() {
  std::string text;
  for (const std::string& name : cpu::supported_instruction_sets()) {
    text += (text.empty() ? "" : " ") + name;
  }
  return text;
}

void choose_instruction_set(std::string name) {
  if (!cpu::choose_instruction_set(name)) {
    fail(
        "name must be one of '", supported_instruction_sets(), "', got '", name,
        "'");
  }
}

// CUDA's plan of a pass on a device with these properties: the number of
// multiprocessors, and bytes of shared memory per block and per multiprocessor.
std::string cuda_plan(
    int64_t rows,
    std::vector<int64_t> widths,
    int64_t element_size,
    bool is_backward,
    bool recomputes,
    std::vector<int64_t> device) {
  if (widths.size() < 2 || device.size() != 3) {
    fail("widths must have two entries or more, and device three");
  }
  const cuda::PassPlan plan = cuda::plan_pass(
      {rows,
       widths,
       int(element_size),
       is_backward,
       recomputes,
       {int(device[0]), int(device[1]), int(device[2])}});
  std::ostringstream text;
  switch (plan.method) {
    case cuda::Method::fused:
      text << "method: fused\ngrid: " << plan.fused.grid
           << "\nthreads: " << plan.fused.threads
           << "\ntile_rows: " << plan.fused.tile_rows
           << "\nshared_bytes: " << plan.fused.layout.bytes << "\nworkspace: "
           << (is_backward ? cuda::fused_workspace_bytes(plan.fused) : 0)
           << '\n';
      break;
    case cuda::Method::layered:
      text << "method: layered\n";
  }
  return text.str();
}

// The plans of layered passes: whether cuBLASLt computes a product, how columns
// are summed, and how many columns of the lowest delta are computed at a time.
bool is_for_cublaslt(
    int64_t rows,
    int64_t in,
    int64_t out,
    int64_t input_ld,
    int64_t output_ld,
    int64_t element_size,
    bool aligned) {
  return cuda::is_for_cublaslt(
      {rows, in, out, input_ld, output_ld, int(element_size), aligned});
}

std::vector<int64_t> cuda_reduction(
    int64_t rows,
    int64_t cols,
    int64_t element_size,
    std::vector<int64_t> device) {
  const cuda::ColumnReduction plan = cuda::plan_reduction(
      rows, cols, cuda::vector_length(cols, cols, int(element_size), true),
      {int(device.at(0)), 0, 0});
  return {plan.vector, plan.tiles, plan.chunks, plan.chunk_rows};
}

int64_t cuda_columns_at_once(
    int64_t rows,
    int64_t cols,
    bool recompute,
    std::vector<int64_t> device) {
  return cuda::columns_at_once(
      rows, cols, recompute, {int(device.at(0)), 0, 0});
}

const Registration registration(
    "relu_mlp_testing",
    "csrc/testing.cpp",
    [](Registration::Library& m) {
      m.def("supported_instruction_sets() -> str");
      m.def("choose_instruction_set(str name) -> ()");
      m.def(
          "plan(int rows, int[] widths, str dtype, str instruction_set, "
          "str family, bool has_half_arithmetic) -> str");
      m.def(
          "cuda_plan(int rows, int[] widths, int element_size, "
          "bool is_backward, bool recomputes, int[] device) -> str");
      m.def(
          "is_for_cublaslt(int rows, int in_features, int out_features, "
          "int input_ld, int output_ld, int element_size, bool aligned) "
          "-> bool");
      m.def(
          "cuda_reduction(int rows, int cols, int element_size, int[] device) "
          "-> int[]");
      m.def(
          "cuda_columns_at_once(int rows, int cols, bool recompute, "
          "int[] device) -> int");
    },
    {{"CompositeExplicitAutograd", [](Registration::Library& m) {
        m.impl("supported_instruction_sets", boxed<supported_instruction_sets>);
        m.impl("choose_instruction_set", boxed<choose_instruction_set>);
        m.impl("plan", boxed<cpu::probe_plan>);
        m.impl("cuda_plan", boxed<cuda_plan>);
        m.impl("is_for_cublaslt", boxed<is_for_cublaslt>);
        m.impl("cuda_reduction", boxed<cuda_reduction>);
        m.impl("cuda_columns_at_once", boxed<cuda_columns_at_once>);
      }}});

} // namespace
} // namespace relu_mlp
