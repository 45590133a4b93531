#include "train_operator.h"

#include <algorithm>

#include "../checks.h"
#include "../operands.h"
#include "passes.h"
#include "training.h"

namespace relu_mlp::cpu {
namespace {

struct Arguments {
  Tensor x, target;
  std::vector<Tensor> weights, biases, state;
  std::string loss, output_activation, optimizer;
  std::vector<double> hyperparameters;
  std::vector<int64_t> groups;
  std::vector<double> lrs;
  double max_norm;
  Tensor order;
  int64_t batch, first, last;
  Tensor losses;
};

// The networks are stacked if there is a dimension before those of a weight.
// Returns 0 for a network that is not stacked.
int64_t count_networks(const Arguments& a) {
  if (a.weights.empty()) {
    fail("weights must have at least one entry, got none");
  }
  const Tensor& first = a.weights[0];
  if (first.dim() == 3 && first.size(0) == 0) {
    fail("weights[0] must have at least one network, got ", shape(first));
  }
  return first.dim() == 3 ? first.size(0) : 0;
}

// Checks x or the target: (rows, features), or one such matrix per network.
void check_rows(const Tensor& tensor, int64_t networks, const char* name) {
  const int64_t dim = tensor.dim();
  if (dim != 2 && (dim != 3 || tensor.size(0) != networks)) {
    fail(
        name, " must have shape (rows, features) or (", networks,
        ", rows, features), got ", shape(tensor));
  }
}

// The first of stacked tensors, as a view. `dim` is the number of dimensions of
// one of them.
Tensor first_of(const Tensor& stacked, int64_t dim) {
  const int64_t extra = stacked.dim() - dim;
  std::vector<int64_t> sizes, strides;
  for (int64_t d = extra; d < stacked.dim(); ++d) {
    sizes.push_back(stacked.size(d));
    strides.push_back(stacked.strides()[d]);
  }
  return reinterpret(stacked, sizes, strides);
}

// Checks that a parameter or a state is contiguous, and of as many networks.
void check_stack(
    const Tensor& tensor,
    int64_t dim,
    int64_t networks,
    const char* name,
    std::size_t n) {
  if (!tensor.is_contiguous()) {
    fail(name, "[", n, "] must be contiguous");
  }
  if (networks == 0 && tensor.dim() != dim) {
    fail(
        name, "[", n, "] must have ", dim, " dimensions, got shape ",
        shape(tensor));
  }
  if (networks > 0 && (tensor.dim() != dim + 1 || tensor.size(0) != networks)) {
    fail(
        name, "[", n, "] must have ", dim + 1, " dimensions and size ",
        networks, " in the first, got shape ", shape(tensor));
  }
}

std::vector<Tensor> first_of_all(
    const std::vector<Tensor>& stacked,
    int64_t dim,
    int64_t networks,
    const char* name) {
  std::vector<Tensor> firsts;
  firsts.reserve(stacked.size());
  for (std::size_t n = 0; n < stacked.size(); ++n) {
    const bool is_missing = stacked[n].numel() == 0 && dim == 1;
    if (!is_missing) {
      check_stack(stacked[n], dim, networks, name, n);
    }
    firsts.push_back(first_of(stacked[n], is_missing ? stacked[n].dim() : dim));
  }
  return firsts;
}

constexpr std::size_t numbers_of_a_group = 8;

std::vector<Group> parse_groups(const Arguments& a) {
  const bool is_sgd = a.optimizer == "sgd";
  if (!is_sgd && a.optimizer != "adam") {
    fail("optimizer must be 'sgd' or 'adam', got '", a.optimizer, "'");
  }
  if (a.hyperparameters.size() % numbers_of_a_group != 0) {
    fail(
        "hyperparameters must have ", numbers_of_a_group,
        " entries for each group, got ", a.hyperparameters.size());
  }
  std::vector<Group> groups;
  for (std::size_t n = 0; n < a.hyperparameters.size();
       n += numbers_of_a_group) {
    const double* const h = &a.hyperparameters[n];
    Group group;
    if (is_sgd) {
      group.sgd = Sgd{h[0], h[1], h[2], h[3], h[4] != 0, h[5] != 0};
    } else {
      group.adam =
          Adam{h[0], h[1], h[2], h[3], h[4], h[5] != 0, h[6] != 0, h[7] != 0};
    }
    groups.push_back(group);
  }
  return groups;
}

// Hands out the tensors of `state`, which has those of every trained parameter
// in order.
class States {
 public:
  explicit States(const std::vector<Tensor>& state) : state_(state) {}

  const Tensor& next() {
    if (n_ == state_.size()) {
      fail("state must have more than ", n_, " entries");
    }
    return state_[n_++];
  }
  // An array like a parameter.
  template <typename T>
  T* next_like(const Tensor& parameter, const Tensor& x) {
    const Tensor& tensor = next();
    check_like_x(tensor, x, "state[", n_ - 1, "]");
    if (tensor.numel() != parameter.numel() || !tensor.is_contiguous()) {
      fail(
          "state[", n_ - 1, "] must be contiguous and of shape ",
          shape(parameter), ", got shape ", shape(tensor));
    }
    check_storage(tensor, "state[", n_ - 1, "]");
    return tensor.template data<T>();
  }
  void check_end() const {
    if (n_ != state_.size()) {
      fail("state must have ", n_, " entries, got ", state_.size());
    }
  }

 private:
  const std::vector<Tensor>& state_;
  std::size_t n_ = 0;
};

// Adam's count of steps, a tensor of one element.
double read_steps(const Tensor& tensor) {
  check_storage(tensor, "a count of steps");
  if (tensor.numel() == 1 && tensor.dtype() == aoti_torch_dtype_float32()) {
    return *tensor.data<const float>();
  }
  if (tensor.numel() == 1 && tensor.dtype() == aoti_torch_dtype_float64()) {
    return *tensor.data<const double>();
  }
  fail(
      "a count of steps must be one float32 or float64, got ",
      dtype_name(tensor), " of shape ", shape(tensor));
}
void write_steps(const Tensor& tensor, double steps) {
  if (tensor.dtype() == aoti_torch_dtype_float32()) {
    *tensor.data<float>() = float(steps);
  } else {
    *tensor.data<double>() = steps;
  }
}

void check_order(const Arguments& a, int64_t networks, int64_t rows) {
  if (a.order.numel() == 0) {
    return;
  }
  const int64_t dim = a.order.dim();
  if (a.order.dtype() != aoti_torch_dtype_int64() || !a.order.is_contiguous() ||
      dim < 1 || dim > 2 ||
      (dim == 2 && a.order.size(0) != std::max<int64_t>(1, networks))) {
    fail(
        "order must be contiguous int64 of shape (n,) or (networks, n), got ",
        dtype_name(a.order), " of shape ", shape(a.order));
  }
  check_storage(a.order, "order");
  const int64_t* const order = a.order.data<const int64_t>();
  for (int64_t n = 0; n < a.order.numel(); ++n) {
    if (order[n] < 0 || order[n] >= rows) {
      fail(
          "order must have numbers of rows in [0, ", rows, "), got ", order[n]);
    }
  }
}

template <typename T>
int64_t checked_train(const Arguments& a) {
  const int64_t stacked = count_networks(a),
                networks = std::max<int64_t>(1, stacked);
  const std::vector<Tensor> weights =
      first_of_all(a.weights, 2, stacked, "weights");
  const std::vector<Tensor> biases =
      first_of_all(a.biases, 1, stacked, "biases");
  check_rows(a.x, networks, "x");
  check_rows(a.target, networks, "target");
  const Tensor x = first_of(a.x, 2), target = first_of(a.target, 2);
  check_layers(x, weights, biases);
  check_storage(a.x, "x");
  check_output_like("target", target, x, weights);
  check_storage(a.target, "target");
  if (matrix<const T>(x).col_stride != 1 || !target.is_contiguous()) {
    fail("the rows of x and the target must be contiguous");
  }
  check_order(a, stacked, x.size(0));
  const std::vector<Group> groups = parse_groups(a);
  const std::size_t layers = weights.size();
  if (a.groups.size() != 2 * layers) {
    fail("groups must have ", 2 * layers, " entries, got ", a.groups.size());
  }
  if (!a.lrs.empty() && int64_t(a.lrs.size()) != networks) {
    fail("lrs must have ", networks, " entries, got ", a.lrs.size());
  }
  if (a.batch < 1 || a.first < 0 || a.last < a.first) {
    fail(
        "batch must be at least 1 and 0 <= first <= last, got ", a.batch, ", ",
        a.first, " and ", a.last);
  }
  const int64_t batches = a.last - a.first;
  check_like_x(a.losses, x, "losses");
  // The product of the two numbers could overflow.
  if (!a.losses.is_contiguous() || a.losses.numel() % networks != 0 ||
      a.losses.numel() / networks != batches) {
    fail(
        "losses must be contiguous with one element for each of ", batches,
        " batches and ", networks, " networks, got shape ", shape(a.losses));
  }
  check_storage(a.losses, "losses");

  Operands<T> operands(3 + 2 * layers, false);
  Training<T> training{
      whole_network<T>(
          x, weights, biases, parse_activation(a.output_activation),
          activate<T>, operands),
      networks,
      a.x.dim() == 3 ? a.x.strides()[0] : 0,
      a.target.dim() == 3 ? a.target.strides()[0] : 0,
      0,
      matrix<const T>(target),
      parse_loss(a.loss),
      nullptr,
      x.size(0),
      a.batch,
      {},
      {},
      a.lrs,
      a.max_norm};
  if (a.order.numel() > 0) {
    training.order = a.order.data<const int64_t>();
    training.order_size = a.order.size(a.order.dim() - 1);
    training.order_step = a.order.dim() == 2 ? training.order_size : 0;
  }
  // A batch has memory of its own.
  training.batch = std::min(a.batch, std::max<int64_t>(1, training.order_size));

  States states(a.state);
  std::vector<std::pair<const Tensor*, double>> steps;
  for (std::size_t n = 0; n < 2 * layers; ++n) {
    const bool is_weight = n < layers;
    const std::size_t l = is_weight ? n : n - layers;
    Trained<T> p{};
    const int64_t group = a.groups[n];
    // A bias without elements may have a state nevertheless.
    const bool exists = is_weight || training.network.layers[l].bias;
    if (exists || (group >= 0 && !a.biases.empty())) {
      const Tensor& tensor = is_weight ? a.weights[l] : a.biases[l];
      check_storage(tensor, is_weight ? "weights[" : "biases[", l, "]");
      p.data = tensor.template data<T>();
      p.count = tensor.numel() / networks;
      if (group >= int64_t(groups.size())) {
        fail("groups[", n, "] must be below ", groups.size(), ", got ", group);
      }
      if (group >= 0) {
        p.group = &groups[group];
        if (p.group->adam) {
          p.mean = states.next_like<T>(tensor, x);
          p.square = states.next_like<T>(tensor, x);
          const Tensor& count = states.next();
          p.steps = read_steps(count);
          steps.push_back({&count, p.steps + double(batches)});
          if (p.group->adam->amsgrad) {
            p.max_square = states.next_like<T>(tensor, x);
          }
        } else if (p.group->sgd->momentum != 0) {
          p.buffer = states.next_like<T>(tensor, x);
        }
      }
    }
    if (!exists) {
      p = {};
    }
    (is_weight ? training.weights : training.biases).push_back(p);
  }
  states.check_end();
  const int64_t not_finite =
      train(training, a.first, a.last, a.losses.template data<T>());
  for (const auto& [tensor, count] : steps) {
    write_steps(*tensor, count);
  }
  return not_finite;
}

} // namespace

void train_operator(StableIValue* stack) {
  Arguments a;
  a.x = take<Tensor>(stack[0]);
  a.target = take<Tensor>(stack[1]);
  a.weights = take<std::vector<Tensor>>(stack[2]);
  a.biases = take<std::vector<Tensor>>(stack[3]);
  a.state = take<std::vector<Tensor>>(stack[4]);
  a.losses = take<Tensor>(stack[5]);
  a.order = take<Tensor>(stack[6]);
  a.loss = take<std::string>(stack[7]);
  a.output_activation = take<std::string>(stack[8]);
  a.optimizer = take<std::string>(stack[9]);
  a.hyperparameters = take<std::vector<double>>(stack[10]);
  a.groups = take<std::vector<int64_t>>(stack[11]);
  a.lrs = take<std::vector<double>>(stack[12]);
  a.max_norm = take<double>(stack[13]);
  a.batch = take<int64_t>(stack[14]);
  a.first = take<int64_t>(stack[15]);
  a.last = take<int64_t>(stack[16]);
  const int32_t dtype = a.x.dtype();
  int64_t not_finite = 0;
  if (dtype == aoti_torch_dtype_float32()) {
    not_finite = checked_train<float>(a);
  } else if (dtype == aoti_torch_dtype_float64()) {
    not_finite = checked_train<double>(a);
  } else {
    fail("x must be float64 or float32, got ", dtype_name(a.x));
  }
  stack[0] = give(not_finite);
}

} // namespace relu_mlp::cpu
