// Training on plain data: for one batch of rows after the other, the gradients
// of a loss (walk.h) and a step of an optimizer (kernels/update.h). Several
// networks of one shape are trained side by side.
#pragma once

#include <limits>
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

// A weight or bias of all networks: `count` contiguous elements for each.
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

template <typename T>
struct Training {
  // The network of which all have the shape. Its x, weights and biases are
  // those of the first network.
  Network<T> network;
  int64_t networks;
  // By how many elements x, target and order are apart in two neighboring
  // networks; 0 if all networks share them.
  int64_t x_step, target_step, order_step;

  Target<T> target; // of all rows
  Loss loss;

  // The rows in the order of training, (order_size); null for all rows in
  // place. A batch takes `batch` of them; the last one of an epoch has the
  // rest.
  const int64_t* order;
  int64_t order_size, batch;

  // By layer. A missing bias has no data.
  std::vector<Trained<T>> weights, biases;
  // The learning rate of every network, or empty for that of the group.
  std::vector<double> lrs;
  // Gradients are scaled down to this norm. Infinity leaves them as they are.
  double max_norm = std::numeric_limits<double>::infinity();

  int64_t batches_per_epoch() const;
};

// Trains with the batches [first, last), counted over all epochs. Writes the
// loss of network e with batch b to losses[(b - first) * networks + e].
// Returns the first batch with a gradient that is not finite, or -1.
template <typename T>
int64_t train(
    const Training<T>& training,
    int64_t first,
    int64_t last,
    T* losses);

extern template int64_t train(const Training<float>&, int64_t, int64_t, float*);
extern template int64_t train(
    const Training<double>&,
    int64_t,
    int64_t,
    double*);

} // namespace relu_mlp::cpu
