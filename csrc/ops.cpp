// The operators: their schemas, and what serves them on each device.

#include <optional>

#include "boxed.h"
#include "cpu/isa/isa.h"
#include "cpu/mlp.h"
#include "cpu/plan_probe.h"
#include "cuda/plan.h"
#ifdef RELU_MLP_WITH_CUDA
#include <cuda_runtime_api.h>

#include "cuda/mlp.h"
#endif

namespace relu_mlp {
namespace {

#define RELU_MLP_TEXT(names) RELU_MLP_TEXT_OF(names)
#define RELU_MLP_TEXT_OF(names) #names

// What the compiler was told, for relu_mlp.build_info(): lines of "key: value".
std::string build_info() {
  std::ostringstream text;
#if defined(__clang__)
  text << "compiler: Clang " << __clang_version__ << '\n';
#elif defined(__GNUC__)
  text << "compiler: GCC " << __VERSION__ << '\n';
#elif defined(_MSC_VER)
  text << "compiler: MSVC " << _MSC_VER << '\n';
#endif
  text << "oldest_torch: " << ((TORCH_TARGET_VERSION >> 56) & 0xff) << '.'
       << ((TORCH_TARGET_VERSION >> 48) & 0xff) << '\n';
  text << "instruction_sets:";
  for (const std::string& name : cpu::compiled_instruction_sets()) {
    text << ' ' << name;
  }
  text << '\n';
#ifdef RELU_MLP_WITH_CUDA
  text << "cuda: " << CUDART_VERSION / 1000 << '.'
       << CUDART_VERSION % 1000 / 10 << "\ncuda_architectures: "
       << RELU_MLP_TEXT(RELU_MLP_CUDA_ARCHITECTURES) << '\n';
#endif
  return text.str();
}

// Which of the compiled instruction sets is chosen, counted from 0. (No name: LibTorch
// leaks the strings that it takes over from an operator.)
int64_t instruction_set() {
  const std::vector<std::string> names = cpu::compiled_instruction_sets();
  const std::string chosen = cpu::chosen_instruction_set().name;
  return std::find(names.begin(), names.end(), chosen) - names.begin();
}

// For tests: which instruction sets there are to choose from, and the choice.
std::string supported_instruction_sets() {
  std::string text;
  for (const std::string& name : cpu::supported_instruction_sets()) {
    text += (text.empty() ? "" : " ") + name;
  }
  return text;
}

void choose_instruction_set(std::string name) {
  if (!cpu::choose_instruction_set(name)) {
    fail("name must be one of '", supported_instruction_sets(), "', got '",
         name, "'");
  }
}

// For tests: how a call would be served, as lines of "key: value", by a GPU that has
// these properties: how many multiprocessors, and bytes of shared memory per block and
// per multiprocessor.
std::string cuda_plan(
    int64_t rows,
    std::vector<int64_t> widths,
    int64_t element_size,
    bool is_backward,
    bool recompute,
    std::vector<int64_t> device) {
  if (widths.size() < 2 || device.size() != 3) {
    fail("widths must have two entries or more, and device three");
  }
  const cuda::Question question{
      rows, widths, int(element_size), is_backward, recompute,
      {int(device[0]), int(device[1]), int(device[2])}};
  std::ostringstream text;
  switch (cuda::choose_regime(question)) {
    case cuda::Regime::narrow: {
      const cuda::NarrowPlan plan =
          cuda::narrow_plan(cuda::as_narrow(question));
      text << "regime: narrow\ngrid: " << plan.grid << "\nthreads: "
           << plan.threads << "\ntile_rows: " << plan.tile_rows
           << "\nshared_bytes: " << plan.layout.bytes << "\nworkspace: "
           << (is_backward ? cuda::narrow_workspace_bytes(plan) : 0) << '\n';
      break;
    }
    case cuda::Regime::wide:
      text << "regime: wide\n";
      break;
    case cuda::Regime::library:
      text << "regime: library\n";
  }
  return text.str();
}

// The same for one product, for a walk down the columns of a matrix, and for the
// columns of the lowest delta.
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

std::vector<int64_t> cuda_columns(
    int64_t rows,
    int64_t cols,
    int64_t element_size,
    std::vector<int64_t> device) {
  const cuda::Columns plan = cuda::plan_columns(
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

using torch::stable::detail::StableLibrary;

// relu_mlp/ops.py has the same schemas, for the case that this library is not
// there.
void define(StableLibrary& m) {
  define_passes(m);
  m.def("_build_info() -> str");
  m.def("_instruction_set() -> int");
  m.def("_supported_instruction_sets() -> str");
  m.def("_choose_instruction_set(str name) -> ()");
  m.def(
      "_plan(int rows, int[] widths, str dtype, str instruction_set, str family, "
      "bool has_half_arithmetic) -> str");
  m.def(
      "_cuda_plan(int rows, int[] widths, int element_size, bool is_backward, "
      "bool recompute, int[] device) -> str");
  m.def(
      "_is_for_cublaslt(int rows, int in_features, int out_features, "
      "int input_ld, int output_ld, int element_size, bool aligned) -> bool");
  m.def(
      "_cuda_columns(int rows, int cols, int element_size, int[] device) "
      "-> int[]");
  m.def(
      "_cuda_columns_at_once(int rows, int cols, bool recompute, int[] device) "
      "-> int");
}

void register_questions(StableLibrary& m) {
  m.impl("_build_info", boxed<build_info>);
  m.impl("_instruction_set", boxed<instruction_set>);
  m.impl("_supported_instruction_sets", boxed<supported_instruction_sets>);
  m.impl("_choose_instruction_set", boxed<choose_instruction_set>);
  m.impl("_plan", boxed<cpu::probe_plan>);
  m.impl("_cuda_plan", boxed<cuda_plan>);
  m.impl("_is_for_cublaslt", boxed<is_for_cublaslt>);
  m.impl("_cuda_columns", boxed<cuda_columns>);
  m.impl("_cuda_columns_at_once", boxed<cuda_columns_at_once>);
}

// Registers the operators, unless they are there: from another copy of this library,
// or from Python. Then this copy serves nothing. (STABLE_TORCH_LIBRARY asks for no
// error code and would go on with a handle that nobody has set.)
class Registration {
 public:
  Registration() {
    if (aoti_torch_library_init_def("relu_mlp", file, 0, &name_space_) !=
        TORCH_SUCCESS) {
      name_space_ = nullptr;
      return;
    }
    try {
      define(open(definitions_, StableLibrary::Kind::FRAGMENT, nullptr));
      register_questions(
          open(questions_, StableLibrary::Kind::IMPL,
               "CompositeExplicitAutograd"));
      register_passes<cpu::passes>(
          open(cpu_, StableLibrary::Kind::IMPL, "CPU"));
#ifdef RELU_MLP_WITH_CUDA
      register_passes<cuda::passes>(
          open(cuda_, StableLibrary::Kind::IMPL, "CUDA"));
#endif
    } catch (const std::exception&) {
      close();
    }
  }
  ~Registration() {
    close();
  }
  Registration(const Registration&) = delete;
  Registration& operator=(const Registration&) = delete;

 private:
  static constexpr const char* file = "csrc/ops.cpp";

  StableLibrary& open(
      std::optional<StableLibrary>& library,
      StableLibrary::Kind kind,
      const char* key) {
    return library.emplace(kind, "relu_mlp", key, file, 0);
  }
  void close() {
    cuda_.reset();
    cpu_.reset();
    questions_.reset();
    definitions_.reset();
    if (name_space_) {
      aoti_torch_delete_library_object(std::exchange(name_space_, nullptr));
    }
  }

  TorchLibraryHandle name_space_ = nullptr;
  std::optional<StableLibrary> definitions_, questions_, cpu_, cuda_;
};

const Registration registration;

} // namespace
} // namespace relu_mlp
