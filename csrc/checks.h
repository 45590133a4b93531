// Checks of the operators' arguments. Where this library is not used,
// relu_mlp/checks.py makes the same checks with the same messages.
#pragma once

#include <algorithm>
#include <iterator>

#include "tensor.h"

namespace relu_mlp {

// A shape as Python prints it.
inline std::string shape(const std::vector<int64_t>& sizes) {
  std::ostringstream text;
  text << '(';
  for (std::size_t d = 0; d < sizes.size(); ++d) {
    text << (d ? ", " : "") << sizes[d];
  }
  text << (sizes.size() == 1 ? ",)" : ")");
  return text.str();
}

inline std::string shape(const Tensor& tensor) {
  return shape({tensor.sizes(), tensor.sizes() + tensor.dim()});
}

// A dtype's name in Python.
inline std::string dtype_name(const Tensor& tensor) {
  const std::pair<int32_t, const char*> names[] = {
      {aoti_torch_dtype_float64(), "float64"},
      {aoti_torch_dtype_float32(), "float32"},
      {aoti_torch_dtype_bfloat16(), "bfloat16"},
      {aoti_torch_dtype_float16(), "float16"},
      {aoti_torch_dtype_int64(), "int64"},
      {aoti_torch_dtype_int32(), "int32"},
      {aoti_torch_dtype_int16(), "int16"},
      {aoti_torch_dtype_int8(), "int8"},
      {aoti_torch_dtype_uint8(), "uint8"},
      {aoti_torch_dtype_uint16(), "uint16"},
      {aoti_torch_dtype_uint32(), "uint32"},
      {aoti_torch_dtype_uint64(), "uint64"},
      {aoti_torch_dtype_bool(), "bool"},
      {aoti_torch_dtype_complex32(), "complex32"},
      {aoti_torch_dtype_complex64(), "complex64"},
      {aoti_torch_dtype_complex128(), "complex128"},
      {aoti_torch_dtype_float8_e5m2(), "float8_e5m2"},
      {aoti_torch_dtype_float8_e4m3fn(), "float8_e4m3fn"},
      {aoti_torch_dtype_float8_e5m2fnuz(), "float8_e5m2fnuz"},
      {aoti_torch_dtype_float8_e4m3fnuz(), "float8_e4m3fnuz"}};
  for (const auto& [number, name] : names) {
    if (number == tensor.dtype()) {
      return name;
    }
  }
  return "another dtype";
}

template <typename... Name>
void check_like_x(const Tensor& tensor, const Tensor& x, const Name&... name) {
  if (tensor.dtype() != x.dtype()) {
    fail(
        name..., " must be ", dtype_name(x), " like x, got ",
        dtype_name(tensor));
  }
}

// A device's name in Python.
inline std::string device_name(const Tensor& tensor) {
  const int32_t type = tensor.device_type();
  if (type == aoti_torch_device_type_cuda()) {
    return "cuda:" + std::to_string(tensor.device_index());
  }
  return type == aoti_torch_device_type_cpu() ? "cpu"
      : type == aoti_torch_device_type_meta() ? "meta"
                                              : "another device";
}

inline bool are_on_same_device(const Tensor& a, const Tensor& b) {
  return a.device_type() == b.device_type() &&
      a.device_index() == b.device_index();
}

template <typename... Name>
void check_device(const Tensor& tensor, const Tensor& x, const Name&... name) {
  if (!are_on_same_device(tensor, x)) {
    fail(
        name..., " must be on ", device_name(x), " like x, got ",
        device_name(tensor));
  }
}

// A missing bias may be on the device of x or on the CPU. A missing bias on
// another device may have sent the call to that device although x is elsewhere.
inline void check_devices(
    const Tensor& x,
    const std::vector<Tensor>& weights,
    const std::vector<Tensor>& biases) {
  for (std::size_t l = 0; l < weights.size(); ++l) {
    check_device(weights[l], x, "weights[", l, "]");
    if (!biases.empty() &&
        (biases[l].numel() > 0 ||
         biases[l].device_type() != aoti_torch_device_type_cpu())) {
      check_device(biases[l], x, "biases[", l, "]");
    }
  }
}

template <typename... Name>
void check_storage(const Tensor& tensor, const Name&... name) {
  if (!storage_covers(tensor)) {
    fail(
        name..., " must have a storage with all its elements: shape ",
        shape(tensor), ", strides ",
        shape({tensor.strides(), tensor.strides() + tensor.dim()}),
        " and storage offset ", tensor.storage_offset(),
        " are out of bounds for storage of ", tensor.storage_size(),
        " bytes, which resize_ may have freed");
  }
}

inline void check_layers(
    const Tensor& x,
    const std::vector<Tensor>& weights,
    const std::vector<Tensor>& biases) {
  if (x.dim() < 1) {
    fail("x must have at least one dimension, got shape ()");
  }
  const int32_t dtype = x.dtype();
  if (dtype != aoti_torch_dtype_float32() &&
      dtype != aoti_torch_dtype_float64() &&
      dtype != aoti_torch_dtype_bfloat16() &&
      dtype != aoti_torch_dtype_float16()) {
    fail(
        "x must be float64, float32, bfloat16 or float16, got ", dtype_name(x));
  }
  check_storage(x, "x");
  if (weights.empty()) {
    fail("weights must have at least one entry, got none");
  }
  if (!biases.empty() && biases.size() != weights.size()) {
    fail(
        "biases must have one entry for each of the ", weights.size(),
        " weights, got ", biases.size());
  }
  int64_t features = x.size(x.dim() - 1);
  for (std::size_t l = 0; l < weights.size(); ++l) {
    const Tensor& weight = weights[l];
    if (weight.dim() != 2 || weight.size(1) != features) {
      fail(
          "weights[", l, "] must have shape (out_features, ", features,
          ") to follow ", l ? "weights[" + std::to_string(l - 1) + "]" : "x",
          ", got ", shape(weight));
    }
    check_like_x(weight, x, "weights[", l, "]");
    check_storage(weight, "weights[", l, "]");
    features = weight.size(0);
    if (!biases.empty() && biases[l].numel() > 0) {
      const Tensor& bias = biases[l];
      if (bias.dim() != 1 || bias.size(0) != features) {
        fail(
            "biases[", l, "] must have shape (", features, ",), got ",
            shape(bias));
      }
      check_like_x(bias, x, "biases[", l, "]");
      check_storage(bias, "biases[", l, "]");
    }
  }
}

// Formats names as 'a', 'b' or 'c'.
template <std::size_t N>
std::string alternatives(const std::string_view (&names)[N]) {
  std::string text;
  for (std::size_t n = 0; n < N; ++n) {
    text += n == 0 ? "" : n + 1 < N ? ", " : " or ";
    text += "'" + std::string(names[n]) + "'";
  }
  return text;
}

// The enumerator with this name. `names` has the names of all enumerators, in
// order.
template <typename Enum, std::size_t N>
Enum parse_name(
    const char* argument,
    const std::string& name,
    const std::string_view (&names)[N]) {
  const auto found = std::find(std::begin(names), std::end(names), name);
  if (found == std::end(names)) {
    fail(argument, " must be ", alternatives(names), ", got '", name, "'");
  }
  return static_cast<Enum>(found - std::begin(names));
}

inline Activation parse_activation(const std::string& name) {
  return parse_name<Activation>("output_activation", name, activation_names);
}

inline Loss parse_loss(const std::string& name) {
  return parse_name<Loss>("loss", name, loss_names);
}

inline void check_output_like(
    const char* name,
    const Tensor& tensor,
    const Tensor& x,
    const std::vector<Tensor>& weights) {
  std::vector<int64_t> expected(x.sizes(), x.sizes() + x.dim());
  expected.back() = weights.back().size(0);
  if (!std::equal(
          expected.begin(), expected.end(), tensor.sizes(),
          tensor.sizes() + tensor.dim())) {
    fail(
        name, " must have the output's shape ", shape(expected), ", got ",
        shape(tensor));
  }
  check_like_x(tensor, x, name);
  check_storage(tensor, name);
}

// Whether the target of a loss has a class for each row, and not values.
inline bool has_classes(Loss loss, const Tensor& target) {
  return loss == Loss::cross_entropy &&
      target.dtype() == aoti_torch_dtype_int64();
}

inline void check_target(
    const Tensor& target,
    const Tensor& x,
    const std::vector<Tensor>& weights,
    Loss loss) {
  if (loss == Loss::cross_entropy && x.dim() > 2) {
    fail(
        "x must have the shape (rows, in_features) or (in_features,) for cross "
        "entropy, got ",
        shape(x), ": flatten its leading dimensions, and those of target");
  }
  if (!has_classes(loss, target)) {
    if (loss == Loss::cross_entropy && target.dtype() != x.dtype()) {
      fail(
          "target must be int64 for classes, or ", dtype_name(x),
          " like x for probabilities, got ", dtype_name(target));
    }
    check_output_like("target", target, x, weights);
    return;
  }
  const std::vector<int64_t> rows(x.sizes(), x.sizes() + x.dim() - 1);
  if (target.dim() != x.dim() - 1 ||
      !std::equal(rows.begin(), rows.end(), target.sizes())) {
    fail(
        "target must have the shape ", shape(rows),
        " of x without its last dimension to hold classes, got ",
        shape(target));
  }
  check_storage(target, "target");
}

// Rejects classes that are not columns of y. relu_mlp/ops/backend.py raises the
// IndexError that PyTorch raises. The tensor is on the CPU.
inline void check_classes(
    const Tensor& target,
    const Tensor& x,
    const std::vector<Tensor>& weights) {
  const int64_t rows = target.numel(), classes = weights.back().size(0);
  const int64_t stride = target.dim() > 0 ? target.strides()[0] : 1;
  const int64_t* const data = target.data<const int64_t>();
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t found = data[i * stride];
    if ((found < 0 || found >= classes) && found != ignored_class) {
      fail(
          "target is out of bounds: a class must be at least 0 and less than ",
          classes, ", or ", ignored_class, " to be ignored, got ", found,
          x.dim() > 1 ? " in row " + std::to_string(i) : "");
    }
  }
}

// Checks an argument of backward_vjp that has a '0' or '1' for each of `count`
// tensors.
inline void check_flags(
    const char* argument,
    const std::string& flags,
    std::ptrdiff_t count) {
  if (std::ssize(flags) != count ||
      flags.find_first_not_of("01") != std::string::npos) {
    fail(
        "relu_mlp::backward_vjp: ", argument, " must be ", count,
        " characters '0' or '1', got '", flags, "'");
  }
}

// The checks of needs and grad_output that the backward operators make.
inline void check_backward(
    const char* name,
    const std::string& flags,
    const Tensor& grad_output) {
  if (flags.size() < 3 || flags.size() % 2 == 0 ||
      flags.find_first_not_of("01") != std::string::npos) {
    fail(
        "relu_mlp::", name,
        ": needs must be 1 + 2 L characters '0' or '1', "
        "got '",
        flags, "'");
  }
  if (grad_output.dim() < 1) {
    fail(
        "relu_mlp::", name,
        ": grad_output must have at least one dimension, "
        "got shape ()");
  }
}

} // namespace relu_mlp
