#include "training.h"

#include <atomic>
#include <cmath>
#include <string>

#include "../arithmetic.h"
#include "../parallel.h"
#include "buffer.h"
#include "convert.h"
#include "elementwise.h"
#include "passes.h"

namespace relu_mlp::cpu {
namespace {

// One of the networks in training. It owns the memory of its gradients and of
// the rows of a batch.
template <typename T>
class Trainee {
 public:
  Trainee(const Training<T>& training, int64_t e)
      : training_(training),
        e_(e),
        network_(training.network),
        target_(training.target),
        flags_("0") {
    const std::size_t layers = network_.layers.size();
    network_.x.data += e * training.x_step;
    move(target_.values, e * training.target_step);
    move(target_.classes, e * training.target_step);
    if (training.order) {
      order_ = training.order + e * training.order_step;
      gathered_x_ = memory(training.batch * network_.x.cols);
      if (target_.classes.data) {
        gathered_classes_.resize(training.batch);
      } else {
        gathered_target_ = memory(training.batch * target_.values.cols);
      }
    }
    std::vector<T*>* const gradients[] = {
        &pass_.grad_weights, &pass_.grad_biases};
    const std::vector<Trained<T>>* const parameters[] = {
        &training.weights, &training.biases};
    for (int kind = 0; kind < 2; ++kind) {
      for (std::size_t l = 0; l < layers; ++l) {
        Trained<T> p = (*parameters[kind])[l];
        const int64_t begin = e * p.count;
        T* gradient = nullptr;
        if (p.group) {
          gradient = memory(p.count);
          for (T** array :
               {&p.data, &p.buffer, &p.mean, &p.square, &p.max_square}) {
            *array = *array ? *array + begin : nullptr;
          }
          trained_.push_back({p, gradient});
        }
        gradients[kind]->push_back(gradient);
        flags_ += p.group ? '1' : '0';
      }
    }
    for (std::size_t l = 0; l < layers; ++l) {
      Layer<T>& layer = network_.layers[l];
      layer.weight.data += e * training.weights[l].count;
      layer.bias += layer.bias ? e * training.biases[l].count : 0;
    }
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
      is_finite &= update(parameter, gradient, clipping, batches_before);
    }
    return is_finite;
  }

 private:
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
    if (!order_) {
      network_.x = rows_of(x_of_all(), begin, rows);
      pass_.target = rows_of(target_, begin, rows);
      return;
    }
    network_.x = gathered(x_of_all(), begin, rows, gathered_x_);
    pass_.target = target_.classes.data
        ? Target<
              T>{{}, gathered(target_.classes, begin, rows, gathered_classes_.data())}
        : Target<T>{
              gathered(target_.values, begin, rows, gathered_target_), {}};
  }

  template <typename E>
  static void move(Matrix<const E>& m, int64_t elements) {
    m.data += m.data ? elements : 0;
  }

  Matrix<const T> x_of_all() const {
    Matrix<const T> x = training_.network.x;
    x.data += e_ * training_.x_step;
    return x;
  }

  template <typename E>
  Matrix<const E> gathered(
      Matrix<const E> from,
      int64_t begin,
      int64_t rows,
      E* to) const {
    const int64_t* const order = order_ + begin;
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
      sum += sum_of_squares(gradient, parameter.count);
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

  double lr_of(double lr_of_group) const {
    return training_.lrs.empty() ? lr_of_group : training_.lrs[e_];
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
    args.lr = T(lr_of(sgd.lr));
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
    const double lr = lr_of(adam.lr);
    AdamArgs<T> args{};
    args.gradient_factor = T(adam.maximize ? -clipping : clipping);
    args.weight_decay = T(adam.decoupled_weight_decay ? 0 : adam.weight_decay);
    args.parameter_factor =
        T(adam.decoupled_weight_decay ? 1 - lr * adam.weight_decay : 1);
    args.weight = T(1 - adam.beta1);
    args.beta2 = T(adam.beta2);
    args.weight_of_square = T(1 - adam.beta2);
    args.step_size = T(lr / correction_.of_mean);
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
        of_mean = 1 - std::pow(of.beta1, at);
        of_square = 1 - std::pow(of.beta2, at);
      }
    }
  };

  struct Gradient {
    Trained<T> parameter;
    T* data;
  };

  const Training<T>& training_;
  const int64_t e_; // which network it is
  Network<T> network_; // with the x of a batch
  Target<T> target_; // of all rows
  const int64_t* order_ = nullptr;
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
    const Training<T>& training,
    int64_t first,
    int64_t last,
    T* losses) {
  const int64_t networks = training.networks;
  std::vector<int64_t> not_finite(networks, -1);
  // The bits of PyTorch's products depend on the number of threads, and inside
  // of a parallel loop they have one. So with them, networks take turns.
  const int64_t at_once =
      networks > 1 && needs_library(training) ? networks : 1;
  parallel_for(networks, at_once, [&](int64_t begin, int64_t end) {
    for (int64_t e = begin; e < end; ++e) {
      Trainee<T> trainee(training, e);
      for (int64_t b = first; b < last; ++b) {
        const int64_t done = b - first;
        const bool is_finite =
            trainee.run(b, done, losses + done * networks + e);
        if (!is_finite && not_finite[e] < 0) {
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

template int64_t train(const Training<float>&, int64_t, int64_t, float*);
template int64_t train(const Training<double>&, int64_t, int64_t, double*);

} // namespace relu_mlp::cpu
