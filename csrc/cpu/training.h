// Training on plain data: for one batch of rows after the other, the gradients
// of a loss (walk.h) and a step of an optimizer (kernels/update.h). Several
// networks are trained side by side.
#pragma once

#include <optional>
#include <vector>

#include "../network.h"

namespace relu_mlp::cpu {

// The hyperparameters of a parameter group, as in torch.optim.SGD.
struct Sgd {
  double lr, momentum, dampening, weight_decay;
  bool nesterov, maximize;
};

// As in torch.optim.Adam, and in AdamW if the weight decay is decoupled.
struct Adam {
  double lr, beta1, beta2, eps, weight_decay;
  bool decoupled_weight_decay, amsgrad, maximize;
};

// A parameter group has one of the two.
struct Group {
  std::optional<Sgd> sgd;
  std::optional<Adam> adam;
};

// A weight or bias: `count` contiguous elements.
template <typename T>
struct Trained {
  T* data;
  int64_t count;
  const Group* group; // null for a parameter that is not trained
  // The optimizer's state, arrays like `data`. SGD has `buffer` with momentum.
  T *buffer = nullptr, *mean = nullptr, *square = nullptr,
    *max_square = nullptr;
  double steps = 0; // of Adam before the first batch
};

// What a network is trained with.
template <typename T>
struct Training {
  Network<T> network; // with the x of all rows
  Target<T> target; // of all rows
  Loss loss;

  // The rows in the order of training, (order_size); null for all rows in
  // place. A batch takes `batch` of them; the last one of an epoch has the
  // rest.
  const int64_t* order;
  int64_t order_size, batch;

  // Gradients are scaled down to this norm. Infinity leaves them as they are.
  double max_norm;

  std::vector<Group> groups;
  // By layer. A missing bias has no data.
  std::vector<Trained<T>> weights, biases;

  int64_t batches_per_epoch() const;
};

// Trains every network with the batches [first, last), counted over all epochs.
// Writes the loss of network e with batch b to
// losses[e * losses_step + b - first]. Returns the first batch with a gradient
// that is not finite, or -1.
template <typename T>
int64_t train(
    const std::vector<Training<T>>& trainings,
    int64_t first,
    int64_t last,
    T* losses,
    int64_t losses_step);

extern template int64_t train(
    const std::vector<Training<float>>&,
    int64_t,
    int64_t,
    float*,
    int64_t);
extern template int64_t train(
    const std::vector<Training<double>>&,
    int64_t,
    int64_t,
    double*,
    int64_t);

} // namespace relu_mlp::cpu
