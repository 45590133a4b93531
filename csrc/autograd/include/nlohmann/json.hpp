// A stand-in for the library of this name. PyTorch's functorch headers use it
// to write their state as text, which the node never does, and PyTorch does not
// install it.
#pragma once

#include <string>

namespace nlohmann {

struct json {
  json() = default;
  template <typename T>
  explicit json(const T&);

  std::string dump() const;
  static json parse(const std::string&);
  template <typename T>
  T get() const;
};

} // namespace nlohmann
