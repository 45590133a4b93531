#include "training.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <string>

#include "../arithmetic.h"
#include "../parallel.h"
#include "buffer.h"
#include "convert.h"
#include "elementwise.h"
#include "passes.h"

namespace relu_mlp::cpu {
namespace {

// base^exponent for a base in [0, 1) and a count of steps, which is a whole
// number unless somebody has changed it. (pow needs a newer C library than the
// rest of this package, and so would the wheel.)
double power(double base, double exponent) {
  constexpr double most = 9e18; // a whole number of 64 bits
  const double whole = std::min(std::floor(exponent), most);
  // 1 - result magnifies a rounding error.
  long double result = 1, factor = base;
  for (auto left = static_cast<uint64_t>(std::max(whole, 0.0)); left > 0;
       left /= 2) {
    result *= left % 2 == 1 ? factor : 1;
    factor *= factor;
  }
  const double fraction = exponent - whole;
  return double(
      fraction == 0
          ? result
          : result * (1 + std::expm1(fraction * std::log1p(base - 1))));
}

// One of the networks in training. It owns the memory of its gradients and of
// the rows of a batch.
template <typename T>
class Trainee {
 public:
  explicit Trainee(const Training<T>& training)
      : training_(training), network_(training.network), flags_("0") {
    const Target<T>& target = training.target;
    if (training.order) {
      gathered_x_ = memory(training.batch * network_.x.cols);
      if (target.classes.data) {
        gathered_classes_.resize(training.batch);
      } else {
        gathered_target_ = memory(training.batch * target.values.cols);
      }
    }
    add_gradients(training.weights, pass_.grad_weights);
    add_gradients(training.biases, pass_.grad_biases);
    pass_.needs = {flags_};
    pass_.recompute = true;
  }

  // Trains with a batch. Returns whether its gradients are finite.
  bool run(int64_t batch, int64_t batches_before, T* loss) {
    take_rows(batch % training_.batches_per_epoch());
    set_loss(pass_, training_.loss, pass_.target, loss);
    if (!plan_ || planned_rows_ != network_.x.rows) {
      plan_ = plan_of(network_);
      planned_rows_ = network_.x.rows;
    }
    run_backward(network_, *plan_, pass_);
    const double clipping = clipping_factor();
    bool is_finite = true;
    for (const auto& [parameter, gradient] : trained_) {
      is_finite &= update(*parameter, gradient, clipping, batches_before);
    }
    return is_finite;
  }

 private:
  void add_gradients(
      const std::vector<Trained<T>>& parameters,
      std::vector<T*>& gradients) {
    for (const Trained<T>& p : parameters) {
      T* const gradient = p.group ? memory(p.count) : nullptr;
      if (p.group) {
        trained_.push_back({&p, gradient});
      }
      gradients.push_back(gradient);
      flags_ += p.group ? '1' : '0';
    }
  }

  // Memory that lasts longer than a batch. It does not come from a thread's
  // scratch, which the passes need.
  T* memory(int64_t count) {
    memory_.push_back(
        aligned_memory(std::max<int64_t>(1, count) * int64_t(sizeof(T))));
    return static_cast<T*>(memory_.back().get());
  }

  // Points to the rows of a batch of an epoch, in place or copied.
  void take_rows(int64_t batch) {
    const int64_t begin = batch * training_.batch;
    const int64_t rows =
        std::min(training_.batch, training_.order_size - begin);
    const Matrix<const T>& x = training_.network.x;
    const Target<T>& target = training_.target;
    if (!training_.order) {
      network_.x = rows_of(x, begin, rows);
      pass_.target = rows_of(target, begin, rows);
      return;
    }
    network_.x = gathered(x, begin, rows, gathered_x_);
    if (target.classes.data) {
      pass_.target.classes =
          gathered(target.classes, begin, rows, gathered_classes_.data());
    } else {
      pass_.target.values =
          gathered(target.values, begin, rows, gathered_target_);
    }
  }

  template <typename E>
  Matrix<const E> gathered(
      Matrix<const E> from,
      int64_t begin,
      int64_t rows,
      E* to) const {
    const int64_t* const order = training_.order + begin;
    const int64_t grain = std::max<int64_t>(
        1,
        processor_tuning().elements_per_task / std::max<int64_t>(1, from.cols));
    parallel_for(rows, grain, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        std::copy_n(from.row(order[i]), from.cols, to + i * from.cols);
      }
    });
    return contiguous<const E>(to, rows, from.cols);
  }

  // The factor of torch.nn.utils.clip_grad_norm_.
  double clipping_factor() const {
    if (training_.max_norm == std::numeric_limits<double>::infinity()) {
      return 1;
    }
    double sum = 0;
    for (const auto& [parameter, gradient] : trained_) {
      sum += sum_of_squares(gradient, parameter->count);
    }
    const double factor = training_.max_norm / (std::sqrt(sum) + 1e-6);
    return factor < 1 || std::isnan(factor) ? factor : 1;
  }

  // Calls kernel(begin, end) for ranges of [0, count), on several threads if
  // there are many elements. Returns whether all calls returned true.
  template <typename F>
  static bool all_of_ranges(int64_t count, const F& kernel) {
    std::atomic<bool> all = true;
    parallel_for(
        count, processor_tuning().elements_per_task,
        [&](int64_t begin, int64_t end) {
          if (!kernel(begin, end)) {
            all = false;
          }
        });
    return all;
  }

  bool update(
      const Trained<T>& p,
      const T* gradient,
      double clipping,
      int64_t batches_before) {
    const Group& group = *p.group;
    return group.sgd ? update(p, gradient, clipping, *group.sgd)
                     : update(
                           p, gradient, clipping, *group.adam,
                           p.steps + double(batches_before) + 1);
  }

  bool update(
      const Trained<T>& p,
      const T* gradient,
      double clipping,
      const Sgd& sgd) const {
    SgdArgs<T> args{};
    args.gradient_factor = T(sgd.maximize ? -clipping : clipping);
    args.weight_decay = T(sgd.weight_decay);
    args.momentum = T(sgd.momentum);
    args.undampened = T(1 - sgd.dampening);
    args.lr = T(sgd.lr);
    args.nesterov = sgd.nesterov;
    return all_of_ranges(p.count, [&](int64_t begin, int64_t end) {
      SgdArgs<T> range = args;
      range.count = end - begin;
      range.parameter = p.data + begin;
      range.gradient = gradient + begin;
      range.buffer = p.buffer ? p.buffer + begin : nullptr;
      return chosen_kernels<T>().sgd(range);
    });
  }

  bool update(
      const Trained<T>& p,
      const T* gradient,
      double clipping,
      const Adam& adam,
      double step) {
    correction_.set(adam, step);
    AdamArgs<T> args{};
    args.gradient_factor = T(adam.maximize ? -clipping : clipping);
    args.weight_decay = T(adam.decoupled_weight_decay ? 0 : adam.weight_decay);
    args.parameter_factor =
        T(adam.decoupled_weight_decay ? 1 - adam.lr * adam.weight_decay : 1);
    args.weight = T(1 - adam.beta1);
    args.beta2 = T(adam.beta2);
    args.weight_of_square = T(1 - adam.beta2);
    args.step_size = T(adam.lr / correction_.of_mean);
    args.root_factor = T(1 / std::sqrt(correction_.of_square));
    args.eps = T(adam.eps);
    return all_of_ranges(p.count, [&](int64_t begin, int64_t end) {
      AdamArgs<T> range = args;
      range.count = end - begin;
      range.parameter = p.data + begin;
      range.gradient = gradient + begin;
      range.mean = p.mean + begin;
      range.square = p.square + begin;
      range.max_square = p.max_square ? p.max_square + begin : nullptr;
      return chosen_kernels<T>().adam(range);
    });
  }

  // 1 - beta1^step and 1 - beta2^step. All parameters of a group usually have
  // the same, and computing powers takes longer than updating a small bias.
  struct BiasCorrection {
    const Adam* adam = nullptr;
    double step = 0, of_mean = 0, of_square = 0;

    void set(const Adam& of, double at) {
      if (adam != &of || step != at) {
        adam = &of;
        step = at;
        of_mean = 1 - power(of.beta1, at);
        of_square = 1 - power(of.beta2, at);
      }
    }
  };

  struct Gradient {
    const Trained<T>* parameter;
    T* data;
  };

  const Training<T>& training_;
  Network<T> network_; // with the x of a batch
  std::string flags_;
  BackwardPass<T> pass_{Needs{}};
  std::optional<Plan> plan_; // for this many rows
  int64_t planned_rows_ = 0;
  std::vector<Gradient> trained_;
  std::vector<AlignedMemory> memory_;
  T *gathered_x_ = nullptr, *gathered_target_ = nullptr;
  std::vector<int64_t> gathered_classes_;
  BiasCorrection correction_;
};

// Whether PyTorch computes the products of a batch.
template <typename T>
bool needs_library(const Training<T>& training) {
  const int64_t rows = std::min(training.batch, training.order_size),
                rest = training.order_size % training.batch;
  Network<T> network = training.network;
  for (const int64_t of_batch : {rows, rest}) {
    network.x.rows = of_batch;
    if (of_batch > 0 && plan_of(network).layers == LayersKind::library) {
      return true;
    }
  }
  return false;
}

} // namespace

template <typename T>
int64_t Training<T>::batches_per_epoch() const {
  return std::max<int64_t>(1, ceil_div(order_size, batch));
}

template <typename T>
int64_t train(
    const std::vector<Training<T>>& trainings,
    int64_t first,
    int64_t last,
    T* losses,
    int64_t losses_step) {
  const int64_t networks = std::ssize(trainings);
  std::vector<int64_t> not_finite(networks, -1);
  // The bits of PyTorch's products depend on the number of threads, and inside
  // of a parallel loop they have one. So with them, networks take turns.
  const bool take_turns = networks > 1 &&
      std::any_of(trainings.begin(), trainings.end(), needs_library<T>);
  parallel_for(
      networks, take_turns ? networks : 1, [&](int64_t begin, int64_t end) {
        for (int64_t e = begin; e < end; ++e) {
          Trainee<T> trainee(trainings[e]);
          for (int64_t b = first; b < last; ++b) {
            T* const loss = losses + e * losses_step + b - first;
            if (!trainee.run(b, b - first, loss) && not_finite[e] < 0) {
              not_finite[e] = b;
            }
          }
        }
      });
  int64_t earliest = -1;
  for (const int64_t b : not_finite) {
    earliest = earliest < 0 || (b >= 0 && b < earliest) ? b : earliest;
  }
  return earliest;
}

template int64_t train(
    const std::vector<Training<float>>&,
    int64_t,
    int64_t,
    float*,
    int64_t);
template int64_t train(
    const std::vector<Training<double>>&,
    int64_t,
    int64_t,
    double*,
    int64_t);

} // namespace relu_mlp::cpu
