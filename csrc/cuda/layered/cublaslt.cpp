#include "cublaslt.h"

#include <dlfcn.h>

#include <map>
#include <mutex>

#include "../memory.h"

namespace relu_mlp::cuda::cublaslt {
namespace {

struct Functions {
#define RELU_MLP_DECLARE(name, arguments) Status(*name) arguments;
  RELU_MLP_CUBLASLT_FUNCTIONS(RELU_MLP_DECLARE)
#undef RELU_MLP_DECLARE
  const char* (*GetStatusName)(Status);
};

// Opens PyTorch's own copy, which is already in the process, or else the one
// that the dynamic linker finds. Returns null if there is none.
void* open_library() {
#ifdef RELU_MLP_CUBLASLT // the tests' stand-in
  return dlopen(RELU_MLP_CUBLASLT, RTLD_NOW | RTLD_LOCAL);
#else
  constexpr const char* names[] = {"libcublasLt.so.13", "libcublasLt.so.12"};
  for (const int loaded : {RTLD_NOLOAD, 0}) {
    for (const char* name : names) {
      if (void* library = dlopen(name, RTLD_NOW | RTLD_LOCAL | loaded)) {
        return library;
      }
    }
  }
  return nullptr;
#endif
}

std::optional<Functions> find_functions() {
  void* const library = open_library();
  if (!library) {
    return {};
  }
  Functions found;
  bool has_all = true;
  const auto find = [&]<typename F>(F*& function, const char* name) {
    function = reinterpret_cast<F*>(dlsym(library, name));
    has_all = has_all && function;
  };
#define RELU_MLP_FIND(name, arguments) find(found.name, "cublasLt" #name);
  RELU_MLP_CUBLASLT_FUNCTIONS(RELU_MLP_FIND)
#undef RELU_MLP_FIND
  find(found.GetStatusName, "cublasLtGetStatusName");
  return has_all ? std::optional(found) : std::nullopt;
}

const std::optional<Functions>& library() {
  static const std::optional<Functions> functions = find_functions();
  return functions;
}

const Functions& functions() {
  return *library();
}

void check(Status status, const char* call) {
  if (status != success) {
    fail("relu_mlp: cublasLt", call, ": ", functions().GetStatusName(status));
  }
}

// Calls a function and checks its status. An error names the function.
#define RELU_MLP_CALL(name, ...) check(functions().name(__VA_ARGS__), #name)

// Owns an object of the library and the function that destroys it.
class Object {
 public:
  Object() = default;
  Object(Object&& other) noexcept
      : end_(other.end_), object_(std::exchange(other.object_, nullptr)) {}
  ~Object() {
    if (object_) {
      end_(object_);
    }
  }
  // The pointer to which a create function writes the object.
  void** create(Status (*end)(void*)) {
    end_ = end;
    return &object_;
  }
  void* get() const {
    return object_;
  }

 private:
  Status (*end_)(void*) = nullptr;
  void* object_ = nullptr;
};

Object layout(int type, int64_t rows, int64_t cols, int64_t ld) {
  Object result;
  RELU_MLP_CALL(
      MatrixLayoutCreate, result.create(functions().MatrixLayoutDestroy), type,
      rows, cols, ld);
  return result;
}

Object description(const Problem& p, const void* bias) {
  Object result;
  RELU_MLP_CALL(
      MatmulDescCreate, result.create(functions().MatmulDescDestroy),
      compute_float32, float32);
  const auto set = [&](int attribute, const auto& value) {
    RELU_MLP_CALL(
        MatmulDescSetAttribute, result.get(), attribute, &value, sizeof(value));
  };
  set(transpose_a, p.transposes_a ? transposed : not_transposed);
  set(transpose_b, p.transposes_b ? transposed : not_transposed);
  set(epilogue, p.epilogue);
  if (bias) {
    set(bias_pointer, bias);
    set(bias_type, int32_t(p.type));
  }
  return result;
}

// The cache entry of a problem: the layouts, and the algorithm if there is one.
struct CachedAlgorithm {
  Object a, b, d;
  bool has_algorithm;
  Algorithm algorithm;
  std::size_t workspace;
};

CachedAlgorithm choose(Handle handle, const Problem& p, const void* bias) {
  CachedAlgorithm chosen{
      p.transposes_a ? layout(p.type, p.k, p.m, p.lda)
                     : layout(p.type, p.m, p.k, p.lda),
      p.transposes_b ? layout(p.type, p.n, p.k, p.ldb)
                     : layout(p.type, p.k, p.n, p.ldb),
      layout(p.type, p.m, p.n, p.ldd),
      false,
      {},
      0};
  Object preference;
  RELU_MLP_CALL(
      MatmulPreferenceCreate,
      preference.create(functions().MatmulPreferenceDestroy));
  const auto set = [&](int attribute, const auto& value) {
    RELU_MLP_CALL(
        MatmulPreferenceSetAttribute, preference.get(), attribute, &value,
        sizeof(value));
  };
  // The workspace limit is PyTorch's limit on Hopper. If k is split, the parts
  // are added in float32, not in 16 bits, and in order, not in place.
  set(max_workspace, std::size_t(32) << 20);
  set(reduction_schemes, reduction_in_compute_type);
  for (const int attribute :
       {alignment_a, alignment_b, alignment_c, alignment_d}) {
    set(attribute, p.alignment);
  }

  const Object desc = description(p, bias);
  HeuristicResult found;
  int count = 0;
  const Status status = functions().MatmulAlgoGetHeuristic(
      handle, desc.get(), chosen.a.get(), chosen.b.get(), chosen.d.get(),
      chosen.d.get(), preference.get(), 1, &found, &count);
  if (status != not_supported) {
    check(status, "MatmulAlgoGetHeuristic");
    chosen.has_algorithm = count > 0 && found.state == success;
    chosen.algorithm = found.algorithm;
    chosen.workspace = found.workspace;
  }
  return chosen;
}

// The cache of a device. It is never destroyed, because the library may be
// unloaded first when the process ends.
struct DeviceCache {
  Handle handle;
  std::map<Problem, CachedAlgorithm> chosen; // entries never move
  std::map<int, bool> relu_passes_nan;
};

std::mutex mutex; // guards all caches

DeviceCache& device_cache() {
  static auto& devices = *new std::map<int, DeviceCache>;
  const int device = current_device();
  const auto [entry, is_new] = devices.try_emplace(device);
  if (is_new) {
    Handle handle;
    const Status status = functions().Create(&handle);
    if (status != success) {
      devices.erase(entry);
      check(status, "Create");
    }
    entry->second.handle = handle;
  }
  return entry->second;
}

std::pair<Handle, const CachedAlgorithm*> find(
    const Problem& p,
    const void* bias) {
  const std::lock_guard<std::mutex> lock(mutex);
  DeviceCache& cache = device_cache();
  auto entry = cache.chosen.find(p);
  if (entry == cache.chosen.end()) {
    entry = cache.chosen.emplace(p, choose(cache.handle, p, bias)).first;
  }
  return {cache.handle, &entry->second};
}

// The largest power of 2 that divides the addresses of all operands, but at
// most 256, which is the library's default.
uint32_t common_alignment(const Pointers& operands) {
  uintptr_t all = 256;
  for (const void* pointer :
       {operands.a, operands.b, static_cast<const void*>(operands.d),
        operands.bias}) {
    all |= reinterpret_cast<uintptr_t>(pointer);
  }
  return uint32_t(all & -all);
}

} // namespace

bool is_available() {
  return library().has_value();
}

bool multiply(
    Problem p,
    const Pointers& operands,
    const Tensor& like,
    Stream stream) {
  p.alignment = common_alignment(operands);
  const auto [handle, chosen] = find(p, operands.bias);
  if (!chosen->has_algorithm) {
    return false;
  }
  Tensor workspace; // freed to the allocator, which knows the stream
  if (chosen->workspace > 0) {
    // at least this many bytes, whatever the dtype
    workspace = empty<1>({int64_t(chosen->workspace)}, like);
  }
  const float one = 1, zero = 0;
  RELU_MLP_CALL(
      Matmul, handle, description(p, operands.bias).get(), &one, operands.a,
      chosen->a.get(), operands.b, chosen->b.get(), &zero, operands.d,
      chosen->d.get(), operands.d, chosen->d.get(), &chosen->algorithm,
      workspace.get() ? workspace.data<void>() : nullptr, chosen->workspace,
      stream);
  return true;
}

bool relu_passes_nan(int type, const Tensor& like, Stream stream) {
  {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto& cache = device_cache().relu_passes_nan;
    if (const auto entry = cache.find(type); entry != cache.end()) {
      return entry->second;
    }
  }
  if (is_capturing(stream)) {
    return false;
  }
  // NaN times NaN. In both formats, all bits set is a NaN.
  constexpr int64_t side = 64, bytes = side * side * 2;
  const Tensor operand = empty<2>({side, side}, like);
  const Tensor result = empty<2>({side, side}, like);
  set_bytes(operand.data<void>(), 0xff, bytes, stream);
  const bool has_algorithm = multiply(
      {type, false, false, side, side, side, side, side, side,
       LtEpilogue::relu},
      {operand.data<void>(), operand.data<void>(), result.data<void>(),
       nullptr},
      like, stream);
  uint16_t first = 0;
  if (has_algorithm) {
    copy_to_host(&first, result.data<void>(), sizeof(first), stream);
  }
  const uint16_t infinity = type == bfloat16 ? 0x7f80 : 0x7c00;
  const bool passes = (first & 0x7fff) > infinity;
  const std::lock_guard<std::mutex> lock(mutex);
  device_cache().relu_passes_nan[type] = passes;
  return passes;
}

} // namespace relu_mlp::cuda::cublaslt
