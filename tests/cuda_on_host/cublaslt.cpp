// A stand-in for cuBLASLt on the host: the functions and epilogues that
// csrc/cuda/layered/cublaslt.cpp uses, over host memory, one element after the
// other. It checks its arguments as the real one does, or more strictly, and
// fails where the real one may fail.

#include <cmath>
#include <cstring>
#include <memory>
#include <set>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "../../csrc/cuda/layered/cublaslt_api.h"

using namespace relu_mlp::cuda::cublaslt;

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr Status invalid_value = 7;

struct Desc {
  int32_t transposes[2] = {not_transposed, not_transposed};
  Epilogue epilogue = Epilogue::none;
  const void* bias = nullptr;
  int32_t bias_type = -1;
};

struct Layout {
  int type;
  uint64_t rows, cols;
  int64_t ld;
};

struct Wishes {
  std::size_t workspace = 0;
  uint32_t schemes = 7;
  uint32_t alignments[4] = {256, 256, 256, 256};
};

// Settings and counts for tests.
struct Settings {
  bool relu_passes_nan = true, has_gradient_of_b = true;
  int fails = 0; // the status of every product
  int64_t products[1024]; // by epilogue
  int64_t heuristics, objects;
} settings;

// An algorithm holds the problem for which it was chosen.
struct Choice {
  uint32_t alignments[4];
  uint64_t workspace;
};
static_assert(sizeof(Choice) <= sizeof(Algorithm));

float load(int type, const void* data, int64_t i) {
  return type == bfloat16
      ? float(static_cast<const torch::headeronly::BFloat16*>(data)[i])
      : float(static_cast<const torch::headeronly::Half*>(data)[i]);
}
void store(int type, void* data, int64_t i, float value) {
  if (type == bfloat16) {
    static_cast<torch::headeronly::BFloat16*>(data)[i] = value;
  } else {
    static_cast<torch::headeronly::Half*>(data)[i] = value;
  }
}

bool is_aligned(const void* data, uint32_t bytes) {
  return reinterpret_cast<uintptr_t>(data) % bytes == 0;
}

bool has_bias(Epilogue e) {
  return e == Epilogue::bias || e == Epilogue::relu_bias ||
      e == Epilogue::gradient_of_b;
}

// m, n, k; or invalid_value if the shapes of the matrices do not match.
Status sizes(
    const Desc& desc,
    const Layout& a,
    const Layout& b,
    const Layout& d,
    int64_t (&mnk)[3]) {
  const bool ta = desc.transposes[0], tb = desc.transposes[1];
  const uint64_t m = ta ? a.cols : a.rows, k = ta ? a.rows : a.cols;
  const uint64_t k_of_b = tb ? b.cols : b.rows, n = tb ? b.rows : b.cols;
  mnk[0] = m, mnk[1] = n, mnk[2] = k;
  const bool fits = k == k_of_b && d.rows == m && d.cols == n && m && n && k;
  const bool one_type = a.type == b.type && a.type == d.type;
  bool leads = true;
  for (const Layout* layout : {&a, &b, &d}) {
    // The second is a rule of ours: rows begin at addresses divisible by 16.
    leads = leads && layout->ld >= int64_t(layout->rows) && layout->ld % 8 == 0;
  }
  return fits && one_type && leads ? success : invalid_value;
}

// The library's objects. Each has to be destroyed exactly once.
std::set<void*> objects;

template <typename T>
Status create(void** to, const T& value) {
  objects.insert(*to = new T(value));
  ++settings.objects;
  return success;
}
template <typename T>
Status destroy(void* object) {
  if (!objects.erase(object)) {
    return invalid_value;
  }
  delete static_cast<T*>(object);
  --settings.objects;
  return success;
}

template <typename T>
Status set(T& to, const void* value, std::size_t size) {
  if (size != sizeof(T)) {
    return invalid_value;
  }
  std::memcpy(&to, value, size);
  return success;
}

} // namespace

EXPORT Settings* relu_mlp_stand_in() {
  return &settings;
}

EXPORT const char* cublasLtGetStatusName(Status status) {
  return status == invalid_value ? "CUBLAS_STATUS_INVALID_VALUE"
      : status == not_supported  ? "CUBLAS_STATUS_NOT_SUPPORTED"
                                 : "CUBLAS_STATUS_OTHER";
}

EXPORT Status cublasLtCreate(Handle* handle) {
  *handle = &settings;
  return success;
}

EXPORT Status cublasLtMatmulDescCreate(MatmulDesc* desc, int sums, int scale) {
  return sums == compute_float32 && scale == float32 ? create(desc, Desc{})
                                                     : invalid_value;
}
EXPORT Status cublasLtMatmulDescDestroy(MatmulDesc desc) {
  return destroy<Desc>(desc);
}
EXPORT Status cublasLtMatmulDescSetAttribute(
    MatmulDesc to,
    int attribute,
    const void* value,
    std::size_t size) {
  Desc& desc = *static_cast<Desc*>(to);
  switch (attribute) {
    case transpose_a:
    case transpose_b:
      return set(desc.transposes[attribute - transpose_a], value, size);
    case epilogue:
      return set(desc.epilogue, value, size);
    case bias_pointer:
      return set(desc.bias, value, size);
    case bias_type:
      return set(desc.bias_type, value, size);
  }
  return invalid_value;
}

EXPORT Status cublasLtMatrixLayoutCreate(
    MatrixLayout* layout,
    int type,
    uint64_t rows,
    uint64_t cols,
    int64_t ld) {
  return create(layout, Layout{type, rows, cols, ld});
}
EXPORT Status cublasLtMatrixLayoutDestroy(MatrixLayout layout) {
  return destroy<Layout>(layout);
}

EXPORT Status cublasLtMatmulPreferenceCreate(Preference* preference) {
  return create(preference, Wishes{});
}
EXPORT Status cublasLtMatmulPreferenceDestroy(Preference preference) {
  return destroy<Wishes>(preference);
}
EXPORT Status cublasLtMatmulPreferenceSetAttribute(
    Preference to,
    int attribute,
    const void* value,
    std::size_t size) {
  Wishes& wishes = *static_cast<Wishes*>(to);
  if (attribute == most_workspace) {
    return set(wishes.workspace, value, size);
  }
  if (attribute == reduction_schemes) {
    return set(wishes.schemes, value, size);
  }
  if (attribute >= alignment_a && attribute <= alignment_d) {
    return set(wishes.alignments[attribute - alignment_a], value, size);
  }
  return invalid_value;
}

// One algorithm: it takes 16 bytes at a time, and a workspace for long sums.
EXPORT Status cublasLtMatmulAlgoGetHeuristic(
    Handle handle,
    MatmulDesc about,
    MatrixLayout a,
    MatrixLayout b,
    MatrixLayout c,
    MatrixLayout d,
    Preference preference,
    int wanted,
    HeuristicResult* results,
    int* found) {
  const Desc& desc = *static_cast<Desc*>(about);
  const Wishes& wishes = *static_cast<Wishes*>(preference);
  const Layout* of[] = {
      static_cast<Layout*>(a), static_cast<Layout*>(b), static_cast<Layout*>(c),
      static_cast<Layout*>(d)};
  ++settings.heuristics;
  *found = 0;
  int64_t mnk[3];
  if (handle != &settings || wanted < 1 ||
      sizes(desc, *of[0], *of[1], *of[3], mnk) != success) {
    return invalid_value;
  }
  if (desc.epilogue == Epilogue::gradient_of_b && !settings.has_gradient_of_b) {
    return not_supported;
  }
  for (int i = 0; i < 4; ++i) {
    if (of[i]->ld % 8 != 0 || wishes.alignments[i] % 16 != 0) {
      return not_supported;
    }
  }
  // Partial sums must not be added in 16 bits or in an arbitrary order.
  if (wishes.schemes & ~reduction_in_compute_type) {
    return not_supported;
  }
  Choice choice;
  std::memcpy(choice.alignments, wishes.alignments, sizeof(choice.alignments));
  choice.workspace = mnk[2] >= 64 ? 4096 : 0;
  std::memcpy(&results[0].algorithm, &choice, sizeof(choice));
  results[0].workspace = choice.workspace;
  results[0].state = success;
  *found = 1;
  return success;
}

EXPORT Status cublasLtMatmul(
    Handle handle,
    MatmulDesc about,
    const void* alpha,
    const void* a,
    MatrixLayout layout_a,
    const void* b,
    MatrixLayout layout_b,
    const void* beta,
    const void*,
    MatrixLayout,
    void* d,
    MatrixLayout layout_d,
    const Algorithm* algorithm,
    void* workspace,
    std::size_t workspace_bytes,
    void*) {
  const Desc& desc = *static_cast<Desc*>(about);
  const Layout &of_a = *static_cast<Layout*>(layout_a),
               &of_b = *static_cast<Layout*>(layout_b),
               &of_d = *static_cast<Layout*>(layout_d);
  int64_t mnk[3];
  Choice choice;
  std::memcpy(&choice, algorithm, sizeof(choice));
  const bool is_aligned_as_promised = is_aligned(a, choice.alignments[0]) &&
      is_aligned(b, choice.alignments[1]) &&
      is_aligned(d, choice.alignments[3]);
  if (handle != &settings || *static_cast<const float*>(alpha) != 1 ||
      *static_cast<const float*>(beta) != 0 ||
      sizes(desc, of_a, of_b, of_d, mnk) != success ||
      !is_aligned_as_promised || workspace_bytes < choice.workspace ||
      (choice.workspace && !is_aligned(workspace, 16)) ||
      (has_bias(desc.epilogue) &&
       (!desc.bias || desc.bias_type != of_d.type))) {
    return invalid_value;
  }
  if (settings.fails) {
    return settings.fails;
  }
  ++settings.products[int(desc.epilogue)];
  if (workspace) {
    std::memset(workspace, 0xff, choice.workspace);
  }
  const int type = of_d.type;
  const auto [m, n, k] = mnk;
  const auto b_at = [&](int64_t p, int64_t j) {
    return load(
        type, b, desc.transposes[1] ? j + p * of_b.ld : p + j * of_b.ld);
  };
  for (int64_t j = 0; j < n; ++j) {
    for (int64_t i = 0; i < m; ++i) {
      float sum = 0;
      for (int64_t p = 0; p < k; ++p) {
        const int64_t at =
            desc.transposes[0] ? p + i * of_a.ld : i + p * of_a.ld;
        sum += load(type, a, at) * b_at(p, j);
      }
      const Epilogue e = desc.epilogue;
      if (e == Epilogue::bias || e == Epilogue::relu_bias) {
        sum += load(type, desc.bias, i);
      }
      if (e == Epilogue::relu || e == Epilogue::relu_bias) {
        const bool is_nan = std::isnan(sum);
        sum = sum > 0 || (is_nan && settings.relu_passes_nan) ? sum : 0;
      }
      store(type, d, i + j * of_d.ld, sum);
    }
    if (desc.epilogue == Epilogue::gradient_of_b) {
      float sum = 0;
      for (int64_t p = 0; p < k; ++p) {
        sum += b_at(p, j);
      }
      store(type, const_cast<void*>(desc.bias), j, sum);
    }
  }
  return success;
}
