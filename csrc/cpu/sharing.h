// How threads share one product.
#pragma once

#include "../parallel.h"
#include "plan.h"

namespace relu_mlp::cpu {

class Sharing {
 public:
  explicit Sharing(const Plan& plan)
      : tuning_(*plan.tuning), is_shared_(plan.shares_products()) {}

  bool is_shared() const {
    return is_shared_;
  }

  // The work of a product (m, n) = (m, k) (k, n), in multiply-adds.
  int64_t work_of_product(int64_t m, int64_t n, int64_t k) const {
    return tuning_.work_of_product(m, n, k);
  }
  // The work of packing a matrix, or of summing its columns.
  int64_t work_to_pack(int64_t rows, int64_t cols) const {
    return tuning_.work_per_element_packed * rows * cols;
  }

  // Calls f(begin, end) for ranges of [0, count). There are several ranges, on
  // several threads, if the plan lets threads share a product and `work` is
  // enough to pay for waking them. Otherwise there is one range.
  template <typename F>
  void for_each_range(int64_t count, int64_t work, const F& f) const {
    const bool is_worth_it = is_shared_ && work >= tuning_.min_work_to_share;
    parallel_for(count, is_worth_it ? 1 : count, f);
  }

 private:
  const Tuning& tuning_;
  const bool is_shared_;
};

} // namespace relu_mlp::cpu
