#include "train_operator.h"

#include <algorithm>
#include <mutex>
#include <unordered_map>

#include "../checks.h"
#include "../operands.h"
#include "../stack.h"
#include "passes.h"
#include "training.h"

namespace relu_mlp::cpu {
namespace {

// A network and how it is trained. The tensors are those of the caller, not
// copies.
struct Trainer {
  std::vector<Tensor> weights, biases, state;
  Loss loss;
  Activation output_activation;
  std::string optimizer;
  std::vector<int64_t> groups; // the group of every parameter
  int64_t group_count;
};
// The arguments of a call. x and target may have a dimension for the networks
// in front.
struct Arguments {
  Tensor x, target, losses, order;
  std::vector<double> hyperparameters;
  double max_norm;
  int64_t batch, first, last;
};

// The trainers of this process by number. Python has the numbers, because the
// stable ABI has no way to hand out an object. (std::shared_ptr would need a
// newer C library than the rest of this package, and so would the wheel.)
class Trainers {
  struct Entry {
    Trainer trainer;
    int64_t users = 0;
    bool is_deleted = false;
  };

 public:
  // A trainer in use. It stays alive even if it is deleted meanwhile.
  class Use {
   public:
    explicit Use(int64_t number) : number_(number), entry_(all().use(number)) {}
    Use(Use&& other) noexcept
        : number_(other.number_),
          entry_(std::exchange(other.entry_, nullptr)) {}
    ~Use() {
      if (entry_) {
        all().end_use(number_, *entry_);
      }
    }
    const Trainer& operator*() const {
      return entry_->trainer;
    }
    const Trainer* operator->() const {
      return &entry_->trainer;
    }

   private:
    int64_t number_;
    Entry* entry_;
  };

  static Trainers& all() {
    // Never deleted: at exit, tensors may outlive the interpreter that they need.
    static Trainers& trainers = *new Trainers;
    return trainers;
  }
  int64_t add(Trainer trainer) {
    const std::lock_guard lock(mutex_);
    entries_.emplace(++last_, Entry{std::move(trainer)});
    return last_;
  }
  void remove(int64_t number) {
    const std::lock_guard lock(mutex_);
    const auto found = entries_.find(number);
    if (found != entries_.end()) {
      found->second.is_deleted = true;
      erase_if_unused(number, found->second);
    }
  }

 private:
  Entry* use(int64_t number) {
    const std::lock_guard lock(mutex_);
    const auto found = entries_.find(number);
    if (found == entries_.end() || found->second.is_deleted) {
      fail("there is no trainer ", number);
    }
    ++found->second.users;
    return &found->second; // stays in place as others come and go
  }
  void end_use(int64_t number, Entry& entry) {
    const std::lock_guard lock(mutex_);
    --entry.users;
    erase_if_unused(number, entry);
  }
  void erase_if_unused(int64_t number, const Entry& entry) {
    if (entry.is_deleted && entry.users == 0) {
      entries_.erase(number);
    }
  }

  std::mutex mutex_;
  std::unordered_map<int64_t, Entry> entries_;
  int64_t last_ = 0;
};

constexpr int64_t numbers_of_a_group = 8;

std::vector<Group> read_groups(const Trainer& trainer, const double* h) {
  std::vector<Group> groups(trainer.group_count);
  for (Group& group : groups) {
    if (trainer.optimizer == "sgd") {
      group.sgd = Sgd{h[0], h[1], h[2], h[3], h[4] != 0, h[5] != 0};
    } else {
      group.adam =
          Adam{h[0], h[1], h[2], h[3], h[4], h[5] != 0, h[6] != 0, h[7] != 0};
    }
    h += numbers_of_a_group;
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

void check_order(const Tensor& order, int64_t networks, int64_t rows) {
  if (order.numel() == 0) {
    return;
  }
  const int64_t dim = order.dim();
  if (order.dtype() != aoti_torch_dtype_int64() || !order.is_contiguous() ||
      dim < 1 || dim > 2 || (dim == 2 && order.size(0) != networks)) {
    fail(
        "order must be contiguous int64 of shape (n,) or (", networks,
        ", n), got ", dtype_name(order), " of shape ", shape(order));
  }
  check_storage(order, "order");
  const int64_t* const numbers = order.data<const int64_t>();
  for (int64_t n = 0; n < order.numel(); ++n) {
    if (numbers[n] < 0 || numbers[n] >= rows) {
      fail(
          "order must have numbers of rows in [0, ", rows, "), got ",
          numbers[n]);
    }
  }
}

void check_losses(const Arguments& a, int64_t networks) {
  if (a.batch < 1 || a.first < 0 || a.last < a.first) {
    fail(
        "batch must be at least 1 and 0 <= first <= last, got ", a.batch, ", ",
        a.first, " and ", a.last);
  }
  const Tensor& losses = a.losses;
  check_like_x(losses, a.x, "losses");
  const int64_t steps = a.last - a.first;
  if (losses.dim() != 2 || losses.size(0) != networks ||
      losses.size(1) != steps || (steps > 1 && losses.strides()[1] != 1)) {
    fail(
        "losses must have shape (", networks, ", ", steps,
        ") and contiguous rows, got shape ", shape(losses));
  }
  check_storage(losses, "losses");
}

// x or target: a tensor for all networks, or one for each.
class Shared {
 public:
  // `dim` is the number of dimensions for one network.
  Shared(const Tensor& tensor, int64_t dim, int64_t networks, const char* name)
      : tensor_(tensor), is_one_for_each_(tensor.dim() == dim + 1) {
    if (is_one_for_each_ ? tensor.size(0) != networks : tensor.dim() != dim) {
      fail(
          name, " must have ", dim, " dimensions, or ", networks,
          " networks in front of them, got shape ", shape(tensor));
    }
    if (!tensor.is_contiguous()) {
      fail(name, " must be contiguous");
    }
    check_storage(tensor, name);
    if (is_one_for_each_) {
      const int64_t *sizes = tensor.sizes(), *strides = tensor.strides();
      first_ = reinterpret(
          tensor, std::vector(sizes + 1, sizes + 1 + dim),
          std::vector(strides + 1, strides + 1 + dim));
    }
  }
  // That of the first network. The others have the same shape.
  const Tensor& first() const {
    return is_one_for_each_ ? first_ : tensor_;
  }
  // By how many elements those of two neighboring networks are apart.
  int64_t step() const {
    return is_one_for_each_ ? tensor_.strides()[0] : 0;
  }

 private:
  const Tensor& tensor_;
  const bool is_one_for_each_;
  Tensor first_;
};

// A count of steps, and its value after the call.
using Count = std::pair<const Tensor*, double>;

// Sets the state of a parameter.
template <typename T>
void read_state(
    Trained<T>& p,
    const Tensor& tensor,
    const Tensor& x,
    int64_t steps,
    States& states,
    std::vector<Count>& counts) {
  if (const std::optional<Adam>& adam = p.group->adam) {
    p.mean = states.next_like<T>(tensor, x);
    p.square = states.next_like<T>(tensor, x);
    const Tensor& count = states.next();
    p.steps = read_steps(count);
    counts.push_back({&count, p.steps + double(steps)});
    if (adam->amsgrad) {
      p.max_square = states.next_like<T>(tensor, x);
    }
  } else if (p.group->sgd->momentum != 0) {
    p.buffer = states.next_like<T>(tensor, x);
  }
}

// Adds the parameters and their state to `training`.
template <typename T>
void read_parameters(
    const Trainer& trainer,
    const Tensor& x,
    int64_t steps,
    Training<T>& training,
    std::vector<Count>& counts) {
  const std::size_t layers = trainer.weights.size();
  if (trainer.groups.size() != 2 * layers) {
    fail(
        "groups must have ", 2 * layers, " entries, got ",
        trainer.groups.size());
  }
  States states(trainer.state);
  for (std::size_t n = 0; n < 2 * layers; ++n) {
    const bool is_weight = n < layers;
    const std::size_t l = is_weight ? n : n - layers;
    const int64_t group = trainer.groups[n];
    if (group >= trainer.group_count) {
      fail(
          "groups[", n, "] must be below ", trainer.group_count, ", got ",
          group);
    }
    // A bias without elements may have a state nevertheless.
    const bool exists = is_weight || training.network.layers[l].bias;
    Trained<T> p{};
    if (exists || (group >= 0 && !trainer.biases.empty())) {
      const char* const name = is_weight ? "weights[" : "biases[";
      const Tensor& tensor = is_weight ? trainer.weights[l] : trainer.biases[l];
      if (!tensor.is_contiguous()) {
        fail(name, l, "] must be contiguous");
      }
      check_storage(tensor, name, l, "]");
      p.data = tensor.template data<T>();
      p.count = tensor.numel();
      if (group >= 0) {
        p.group = &training.groups[group];
        read_state(p, tensor, x, steps, states, counts);
      }
    }
    (is_weight ? training.weights : training.biases)
        .push_back(exists ? p : Trained<T>{});
  }
  states.check_end();
}

// The training of one of the networks. `x` and `target` are its own.
template <typename T>
Training<T> training_of(
    const Trainer& trainer,
    const Arguments& a,
    const Shared& x,
    const Shared& target,
    int64_t e,
    const double* hyperparameters,
    Operands<T>& operands,
    std::vector<Count>& counts) {
  check_layers(x.first(), trainer.weights, trainer.biases);
  check_target(target.first(), x.first(), trainer.weights, trainer.loss);
  Training<T> training{
      whole_network<T>(
          x.first(), trainer.weights, trainer.biases, trainer.output_activation,
          activate<T>, operands),
      operands.target(target.first()),
      trainer.loss,
      nullptr,
      x.first().size(0),
      a.batch,
      a.max_norm,
      read_groups(trainer, hyperparameters)};
  training.network.x.data += e * x.step();
  if (training.target.classes.data) {
    training.target.classes.data += e * target.step();
  } else {
    training.target.values.data += e * target.step();
  }
  if (a.order.numel() > 0) {
    training.order_size = a.order.size(a.order.dim() - 1);
    training.order = a.order.data<const int64_t>() +
        (a.order.dim() == 2 ? e * training.order_size : 0);
  }
  // A batch has memory of its own.
  training.batch = std::min(a.batch, std::max<int64_t>(1, training.order_size));
  read_parameters(trainer, x.first(), a.last - a.first, training, counts);
  return training;
}

// Checks the classes of all networks.
void check_all_classes(
    const std::vector<Trainers::Use>& trainers,
    const Tensor& target,
    const Tensor& x) {
  const Trainers::Use* fewest = &trainers[0];
  for (const Trainers::Use& trainer : trainers) {
    if (trainer->weights.back().size(0) < (*fewest)->weights.back().size(0)) {
      fewest = &trainer;
    }
  }
  const Tensor flat = reinterpret(
      target, std::array<int64_t, 1>{target.numel()},
      std::array<int64_t, 1>{1});
  check_classes(flat, x, (*fewest)->weights);
}

template <typename T>
int64_t checked_train(
    const std::vector<Trainers::Use>& trainers,
    const Arguments& a) {
  const int64_t networks = std::ssize(trainers);
  const bool by_class = has_classes(trainers[0]->loss, a.target);
  const Shared x(a.x, 2, networks, "x"),
      target(a.target, by_class ? 1 : 2, networks, "target");
  check_order(a.order, networks, x.first().size(0));
  check_losses(a, networks);
  int64_t groups = 0;
  std::size_t parameters = 0;
  for (const Trainers::Use& trainer : trainers) {
    groups += trainer->group_count;
    parameters += 2 * trainer->weights.size();
  }
  if (std::ssize(a.hyperparameters) != groups * numbers_of_a_group) {
    fail(
        "hyperparameters must have ", numbers_of_a_group,
        " entries for each of ", groups, " groups, got ",
        a.hyperparameters.size());
  }
  Operands<T> operands(parameters + 2 * trainers.size(), false);
  std::vector<Training<T>> trainings;
  trainings.reserve(trainers.size());
  std::vector<Count> counts;
  const double* hyperparameters = a.hyperparameters.data();
  for (const Trainers::Use& trainer : trainers) {
    trainings.push_back(training_of(
        *trainer, a, x, target, std::ssize(trainings), hyperparameters,
        operands, counts));
    hyperparameters += trainer->group_count * numbers_of_a_group;
  }
  if (by_class) {
    check_all_classes(trainers, a.target, x.first());
  }
  const int64_t not_finite = train(
      trainings, a.first, a.last, a.losses.template data<T>(),
      a.losses.strides()[0]);
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
    std::vector<int64_t> groups,
    int64_t group_count) {
  if (weights.empty()) {
    fail("weights must have at least one entry, got none");
  }
  if (optimizer != "sgd" && optimizer != "adam") {
    fail("optimizer must be 'sgd' or 'adam', got '", optimizer, "'");
  }
  constexpr int64_t most_groups = 1 << 30; // so that products don't overflow
  if (group_count < 0 || group_count > most_groups) {
    fail("group_count must not be negative or huge, got ", group_count);
  }
  return Trainers::all().add(
      {std::move(weights), std::move(biases), std::move(state),
       parse_loss(loss), parse_activation(output_activation),
       std::move(optimizer), std::move(groups), group_count});
}

void delete_trainer(int64_t trainer) {
  Trainers::all().remove(trainer);
}

int64_t run_trainers(
    std::vector<int64_t> numbers,
    Tensor x,
    Tensor target,
    Tensor losses,
    Tensor order,
    std::vector<double> hyperparameters,
    double max_norm,
    int64_t batch,
    int64_t first,
    int64_t last) {
  std::vector<Trainers::Use> trainers;
  for (const int64_t number : numbers) {
    trainers.emplace_back(number);
  }
  if (trainers.empty()) {
    fail("trainers must have at least one entry, got none");
  }
  const Arguments arguments{
      std::move(x),
      std::move(target),
      std::move(losses),
      std::move(order),
      std::move(hyperparameters),
      max_norm,
      batch,
      first,
      last};
  const int32_t dtype = arguments.x.dtype();
  if (dtype == aoti_torch_dtype_float32()) {
    return checked_train<float>(trainers, arguments);
  }
  if (dtype == aoti_torch_dtype_float64()) {
    return checked_train<double>(trainers, arguments);
  }
  fail("x must be float64 or float32, got ", dtype_name(arguments.x));
}

} // namespace

void train_once(
    const std::vector<int64_t>& trainers,
    AtenTensorHandle x,
    AtenTensorHandle target,
    AtenTensorHandle losses,
    AtenTensorHandle order,
    const std::vector<double>& hyperparameters,
    double max_norm,
    int64_t batch) {
  run_trainers(
      trainers, Tensor(x), Tensor(target), Tensor(losses), Tensor(order),
      hyperparameters, max_norm, batch, 0, 1);
}

void define_training(torch::stable::detail::StableLibrary& m) {
  m.def(
      "_new_trainer(Tensor[] weights, Tensor[] biases, Tensor[] state, "
      "str loss, str output_activation, str optimizer, int[] groups, "
      "int group_count) -> int");
  m.def(
      "_train(int[] trainers, Tensor x, Tensor target, Tensor(a!) losses, "
      "Tensor order, float[] hyperparameters, float max_norm, int batch, "
      "int first, int last) -> int");
  m.def("_delete_trainer(int trainer) -> ()");
}

void register_training(torch::stable::detail::StableLibrary& m) {
  m.impl("_new_trainer", boxed<new_trainer>);
  m.impl("_train", boxed<run_trainers>);
}

void register_delete_trainer(torch::stable::detail::StableLibrary& m) {
  m.impl("_delete_trainer", boxed<delete_trainer>);
}

} // namespace relu_mlp::cpu
