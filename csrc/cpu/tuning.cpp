#include "tuning.h"

namespace relu_mlp::cpu {
namespace {

// Measured on a Sapphire Rapids. Serves every processor without its own row.
constexpr Tuning generic;

// Measured on Zen 4.
constexpr Tuning amd = [] {
  Tuning row;
  row.family = "amd";
  row.prefers_dpbf16 = true;
  row.own_gemm_vector_bytes = 64;
  return row;
}();

constexpr const Tuning* rows[] = {&generic, &amd};

} // namespace

const Tuning& processor_tuning() {
#if defined(__x86_64__) && defined(__GNUC__)
  return __builtin_cpu_is("amd") ? amd : generic;
#else
  return generic;
#endif
}

const Tuning* find_tuning(std::string_view family) {
  for (const Tuning* row : rows) {
    if (family == row->family) {
      return row;
    }
  }
  return nullptr;
}

} // namespace relu_mlp::cpu
