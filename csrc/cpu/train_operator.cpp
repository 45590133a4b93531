#include "train_operator.h"

#include <algorithm>
#include <memory>
#include <mutex>
#include <unordered_map>

#include "../checks.h"
#include "../operands.h"
#include "../stack.h"
#include "passes.h"
#include "training.h"

namespace relu_mlp::cpu {
namespace {

// What the networks of a trainer are, and how they are trained. The tensors are
// those of the caller, not copies.
struct Trainer {
  std::vector<Tensor> weights, biases, state;
  Loss loss;
  Activation output_activation;
  std::string optimizer;
  std::vector<int64_t> groups;

  // The number of stacked networks, or 0 if a weight is a matrix.
  int64_t stacked() const {
    return weights[0].dim() == 3 ? weights[0].size(0) : 0;
  }
};

// The arguments of one call.
struct Arguments {
  Tensor x, target, losses, order;
  std::vector<double> hyperparameters, lrs;
  double max_norm;
  int64_t batch, first, last;
};

// The trainers of this process by number. Python has the numbers, because the
// stable ABI has no way to hand out an object.
class Trainers {
 public:
  static Trainers& all() {
    // Never deleted: at exit, tensors may outlive the interpreter that they need.
    static Trainers& trainers = *new Trainers;
    return trainers;
  }
  int64_t add(Trainer trainer) {
    const std::lock_guard lock(mutex_);
    trainers_.emplace(
        ++last_, std::make_shared<const Trainer>(std::move(trainer)));
    return last_;
  }
  // It stays alive while the caller has it, even if it is removed.
  std::shared_ptr<const Trainer> find(int64_t number) {
    const std::lock_guard lock(mutex_);
    const auto found = trainers_.find(number);
    if (found == trainers_.end()) {
      fail("there is no trainer ", number);
    }
    return found->second;
  }
  void remove(int64_t number) {
    const std::lock_guard lock(mutex_);
    trainers_.erase(number);
  }

 private:
  std::mutex mutex_;
  std::unordered_map<int64_t, std::shared_ptr<const Trainer>> trainers_;
  int64_t last_ = 0;
};

// The first of stacked tensors, as a view that `holder` owns. `dim` is the number
// of dimensions of one of them.
const Tensor& first_of(const Tensor& stacked, int64_t dim, Tensor& holder) {
  const int64_t extra = stacked.dim() - dim;
  if (extra <= 0) {
    return stacked;
  }
  std::vector<int64_t> sizes, strides;
  for (int64_t d = extra; d < stacked.dim(); ++d) {
    sizes.push_back(stacked.size(d));
    strides.push_back(stacked.strides()[d]);
  }
  holder = reinterpret(stacked, sizes, strides);
  return holder;
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

const std::vector<Tensor>& first_of_all(
    const std::vector<Tensor>& tensors,
    int64_t dim,
    int64_t networks,
    const char* name,
    std::vector<Tensor>& holder) {
  for (std::size_t n = 0; n < tensors.size(); ++n) {
    if (dim == 2 || tensors[n].numel() > 0) {
      check_stack(tensors[n], dim, networks, name, n);
    }
  }
  if (networks == 0) {
    return tensors;
  }
  for (const Tensor& tensor : tensors) {
    Tensor first;
    if (&first_of(tensor, dim, first) == &tensor) { // a missing bias
      first = reinterpret(
          tensor, std::array<int64_t, 1>{0}, std::array<int64_t, 1>{1});
    }
    holder.push_back(std::move(first));
  }
  return holder;
}

constexpr std::size_t numbers_of_a_group = 8;

std::vector<Group> parse_groups(const Trainer& trainer, const Arguments& a) {
  const bool is_sgd = trainer.optimizer == "sgd";
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

// Checks that x or the target is contiguous, and has `dim` dimensions, or one
// more for the networks.
void check_rows(
    const Tensor& tensor,
    int64_t dim,
    int64_t networks,
    const char* name) {
  const bool has_own =
      networks > 0 && tensor.dim() == dim + 1 && tensor.size(0) == networks;
  if (tensor.dim() != dim && !has_own) {
    fail(
        name, " must have ", dim, " dimensions",
        networks ? ", or one more for the networks" : "", ", got shape ",
        shape(tensor));
  }
  if (!tensor.is_contiguous()) {
    fail(name, " must be contiguous");
  }
  check_storage(tensor, name);
}

// A contiguous tensor as one of one dimension, which `holder` owns.
const Tensor& flat(const Tensor& tensor, Tensor& holder) {
  holder = reinterpret(
      tensor, std::array<int64_t, 1>{tensor.numel()},
      std::array<int64_t, 1>{1});
  return holder;
}

// The operands of the first network, as views that the object owns.
class FirstNetwork {
 public:
  FirstNetwork(const Trainer& trainer, const Arguments& a)
      : by_class(has_classes(trainer.loss, a.target)),
        x(first_of(a.x, 2, x_)),
        target(first_of(a.target, target_dim(), target_)),
        weights(first_of_all(
            trainer.weights,
            2,
            trainer.stacked(),
            "weights",
            weights_)),
        biases(first_of_all(
            trainer.biases,
            1,
            trainer.stacked(),
            "biases",
            biases_)) {}

  int64_t target_dim() const {
    return by_class ? 1 : 2;
  }

 private:
  Tensor x_, target_;
  std::vector<Tensor> weights_, biases_;

 public:
  const bool by_class;
  const Tensor &x, &target;
  const std::vector<Tensor>&weights, &biases;
};

void check_arguments(
    const Trainer& trainer,
    const Arguments& a,
    const FirstNetwork& first,
    int64_t networks) {
  check_layers(first.x, first.weights, first.biases);
  check_target(first.target, first.x, first.weights, trainer.loss);
  if (first.by_class) {
    Tensor holder;
    check_classes(flat(a.target, holder), first.x, first.weights);
  }
  check_order(a, networks, first.x.size(0));
  const std::size_t parameters = 2 * first.weights.size();
  if (trainer.groups.size() != parameters) {
    fail(
        "groups must have ", parameters, " entries, got ",
        trainer.groups.size());
  }
  if (!a.lrs.empty() && int64_t(a.lrs.size()) != networks) {
    fail("lrs must have ", networks, " entries, got ", a.lrs.size());
  }
  if (a.batch < 1 || a.first < 0 || a.last < a.first) {
    fail(
        "batch must be at least 1 and 0 <= first <= last, got ", a.batch, ", ",
        a.first, " and ", a.last);
  }
  check_like_x(a.losses, first.x, "losses");
  // The product of the two numbers could overflow.
  const int64_t batches = a.last - a.first, losses = a.losses.numel();
  if (!a.losses.is_contiguous() || losses % networks != 0 ||
      losses / networks != batches) {
    fail(
        "losses must be contiguous with one element for each of ", batches,
        " batches and ", networks, " networks, got shape ", shape(a.losses));
  }
  check_storage(a.losses, "losses");
}

// A count of steps, and its value after the call.
using Count = std::pair<const Tensor*, double>;

// Sets the group and the state of a parameter.
template <typename T>
void read_state(
    Trained<T>& p,
    const Group& group,
    const Tensor& tensor,
    const Tensor& x,
    int64_t batches,
    States& states,
    std::vector<Count>& counts) {
  p.group = &group;
  if (group.adam) {
    p.mean = states.next_like<T>(tensor, x);
    p.square = states.next_like<T>(tensor, x);
    const Tensor& count = states.next();
    p.steps = read_steps(count);
    counts.push_back({&count, p.steps + double(batches)});
    if (group.adam->amsgrad) {
      p.max_square = states.next_like<T>(tensor, x);
    }
  } else if (group.sgd->momentum != 0) {
    p.buffer = states.next_like<T>(tensor, x);
  }
}

// Adds the parameters to `training`, and returns what becomes of the counts.
template <typename T>
std::vector<Count> read_parameters(
    const Trainer& trainer,
    const Arguments& a,
    const Tensor& x,
    const std::vector<Group>& groups,
    Training<T>& training) {
  const std::size_t layers = trainer.weights.size();
  States states(trainer.state);
  std::vector<Count> counts;
  for (std::size_t n = 0; n < 2 * layers; ++n) {
    const bool is_weight = n < layers;
    const std::size_t l = is_weight ? n : n - layers;
    const int64_t group = trainer.groups[n];
    // A bias without elements may have a state nevertheless.
    const bool exists = is_weight || training.network.layers[l].bias;
    Trained<T> p{};
    if (exists || (group >= 0 && !trainer.biases.empty())) {
      const Tensor& tensor = is_weight ? trainer.weights[l] : trainer.biases[l];
      check_storage(tensor, is_weight ? "weights[" : "biases[", l, "]");
      p.data = tensor.template data<T>();
      p.count = tensor.numel() / training.networks;
      if (group >= int64_t(groups.size())) {
        fail("groups[", n, "] must be below ", groups.size(), ", got ", group);
      }
      if (group >= 0) {
        read_state(
            p, groups[group], tensor, x, a.last - a.first, states, counts);
      }
    }
    (is_weight ? training.weights : training.biases)
        .push_back(exists ? p : Trained<T>{});
  }
  states.check_end();
  return counts;
}

template <typename T>
int64_t checked_train(const Trainer& trainer, const Arguments& a) {
  const int64_t stacked = trainer.stacked(),
                networks = std::max<int64_t>(1, stacked);
  const int64_t target_dim = has_classes(trainer.loss, a.target) ? 1 : 2;
  check_rows(a.x, 2, stacked, "x");
  check_rows(a.target, target_dim, stacked, "target");
  const FirstNetwork first(trainer, a);
  check_arguments(trainer, a, first, networks);
  const std::vector<Group> groups = parse_groups(trainer, a);

  Operands<T> operands(3 + trainer.groups.size(), false);
  Training<T> training{
      whole_network<T>(
          first.x, first.weights, first.biases, trainer.output_activation,
          activate<T>, operands),
      networks,
      a.x.dim() == 3 ? a.x.strides()[0] : 0,
      a.target.dim() > target_dim ? a.target.strides()[0] : 0,
      0,
      operands.target(first.target),
      trainer.loss,
      nullptr,
      first.x.size(0),
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
  const std::vector<Count> counts =
      read_parameters(trainer, a, first.x, groups, training);
  const int64_t not_finite =
      train(training, a.first, a.last, a.losses.template data<T>());
  for (const auto& [tensor, count] : counts) {
    write_steps(*tensor, count);
  }
  return not_finite;
}

int64_t new_trainer(
    std::vector<Tensor> weights,
    std::vector<Tensor> biases,
    std::vector<Tensor> state,
    std::string loss,
    std::string output_activation,
    std::string optimizer,
    std::vector<int64_t> groups) {
  if (weights.empty()) {
    fail("weights must have at least one entry, got none");
  }
  if (weights[0].dim() == 3 && weights[0].size(0) == 0) {
    fail("weights[0] must have a network or more, got ", shape(weights[0]));
  }
  if (optimizer != "sgd" && optimizer != "adam") {
    fail("optimizer must be 'sgd' or 'adam', got '", optimizer, "'");
  }
  return Trainers::all().add(
      {std::move(weights), std::move(biases), std::move(state),
       parse_loss(loss), parse_activation(output_activation),
       std::move(optimizer), std::move(groups)});
}

void delete_trainer(int64_t trainer) {
  Trainers::all().remove(trainer);
}

int64_t run_trainer(
    int64_t trainer,
    Tensor x,
    Tensor target,
    Tensor losses,
    Tensor order,
    std::vector<double> hyperparameters,
    std::vector<double> lrs,
    double max_norm,
    int64_t batch,
    int64_t first,
    int64_t last) {
  const std::shared_ptr<const Trainer> found = Trainers::all().find(trainer);
  const Arguments arguments{
      std::move(x),
      std::move(target),
      std::move(losses),
      std::move(order),
      std::move(hyperparameters),
      std::move(lrs),
      max_norm,
      batch,
      first,
      last};
  const int32_t dtype = arguments.x.dtype();
  if (dtype == aoti_torch_dtype_float32()) {
    return checked_train<float>(*found, arguments);
  }
  if (dtype == aoti_torch_dtype_float64()) {
    return checked_train<double>(*found, arguments);
  }
  fail("x must be float64 or float32, got ", dtype_name(arguments.x));
}

} // namespace

void train_once(
    int64_t trainer,
    AtenTensorHandle x,
    AtenTensorHandle target,
    AtenTensorHandle loss,
    AtenTensorHandle order,
    const std::vector<double>& hyperparameters,
    double max_norm,
    int64_t batch) {
  run_trainer(
      trainer, Tensor(x), Tensor(target), Tensor(loss), Tensor(order),
      hyperparameters, {}, max_norm, batch, 0, 1);
}

void define_training(torch::stable::detail::StableLibrary& m) {
  m.def(
      "_new_trainer(Tensor[] weights, Tensor[] biases, Tensor[] state, "
      "str loss, str output_activation, str optimizer, int[] groups) -> int");
  m.def(
      "_train(int trainer, Tensor x, Tensor target, Tensor(a!) losses, "
      "Tensor order, float[] hyperparameters, float[] lrs, float max_norm, "
      "int batch, int first, int last) -> int");
  m.def("_delete_trainer(int trainer) -> ()");
}

void register_training(torch::stable::detail::StableLibrary& m) {
  m.impl("_new_trainer", boxed<new_trainer>);
  m.impl("_train", boxed<run_trainer>);
}

void register_delete_trainer(torch::stable::detail::StableLibrary& m) {
  m.impl("_delete_trainer", boxed<delete_trainer>);
}

} // namespace relu_mlp::cpu
