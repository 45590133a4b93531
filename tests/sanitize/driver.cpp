// The CPU passes on plain data, without PyTorch: under the sanitizers (`make
// sanitize`) and on an emulated AArch64 (`make test-aarch64`).
//
// Networks go through all passes in every dtype on every instruction set, by
// each way of multiplying and packing that a plan can choose. The results must
// lie within the bounds of rounding around a reference in double precision
// (reference.h). For networks of small integers, whose sums are exact, they
// must have its bits. PyTorch's own products are plain loops here (pytorch.cpp).
//
// Every operand, result and workspace ends at a page that must not be touched,
// is surrounded by a pattern, and holds NaN before it is written. This finds
// accesses that the sanitizers do not see: masked ones and those of AMX.

#include <sys/mman.h>

#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <map>
#include <mutex>
#include <random>
#include <string>
#include <thread>

#include "../../csrc/cpu/bf16_layers.h"
#include "../../csrc/cpu/call.h"
#include "../../csrc/cpu/library_layers.h"
#include "../../csrc/cpu/packed_layers.h"
#include "../../csrc/cpu/walk.h"
#include "reference.h"

// -- Memory ------------------------------------------------------------------

namespace {

constexpr std::size_t page = 4096;

struct Header { // in a separate page before the data
  std::size_t bytes, mapped;
};

char* start_of_page(void* p) {
  return reinterpret_cast<char*>(
      reinterpret_cast<std::uintptr_t>(p) / page * page);
}

void* guarded(std::size_t bytes) {
  const std::size_t used = (bytes + 63) / 64 * 64;
  const std::size_t data = std::max(page, (used + page - 1) / page * page);
  char* const base = static_cast<char*>(mmap(
      nullptr, data + 2 * page, PROT_READ | PROT_WRITE,
      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (base == MAP_FAILED) {
    std::abort();
  }
  mprotect(base + page + data, page, PROT_NONE);
  std::memset(base + page, 0xff, data); // NaN in every format
  // An allocation of no bytes is in the last bytes before the guard page.
  char* const p = base + page + data - (used ? used : 64);
  *reinterpret_cast<Header*>(base) = {bytes, data + 2 * page};
  return p;
}

void release(void* p) {
  if (!p) {
    return;
  }
  char* const first = start_of_page(p);
  const Header head = *reinterpret_cast<Header*>(first - page);
  const char* const end = first - page + head.mapped - page;
  const auto check = [&](const char* from, const char* to) {
    for (; from < to; ++from) {
      if (*from != char(0xff)) {
        std::fprintf(
            stderr, "written %td bytes behind %zu bytes\n",
            from - static_cast<char*>(p), head.bytes);
        std::abort();
      }
    }
  };
  check(first, static_cast<char*>(p));
  check(static_cast<char*>(p) + head.bytes, end);
  munmap(first - page, head.mapped);
}

} // namespace

// The functions that csrc/cpu/buffer.h calls.
void* operator new(std::size_t bytes, std::align_val_t) {
  return guarded(bytes);
}
void* operator new(
    std::size_t bytes,
    std::align_val_t,
    const std::nothrow_t&) noexcept {
  return guarded(bytes);
}
void operator delete(void* p, std::align_val_t) noexcept {
  release(p);
}
void operator delete(void* p, std::size_t, std::align_val_t) noexcept {
  release(p);
}

namespace relu_mlp::cpu {
namespace {

template <typename T>
class Array { // ends at a guard page
 public:
  explicit Array(int64_t count)
      : data(static_cast<T*>(guarded(count * sizeof(T)))) {
    // guarded() leaves up to 63 bytes before the guard page, which would hide
    // an access out of bounds. So the data moves up to the page.
    const std::size_t bytes = count * sizeof(T);
    shift_ = bytes ? (bytes + 63) / 64 * 64 - bytes : 64;
    data = reinterpret_cast<T*>(reinterpret_cast<char*>(data) + shift_);
  }
  Array(Array&& other) noexcept
      : data(std::exchange(other.data, nullptr)), shift_(other.shift_) {}
  ~Array() {
    if (data) {
      char* const p = reinterpret_cast<char*>(data) - shift_;
      const char* const first = start_of_page(p);
      for (const char* at = first; at < reinterpret_cast<char*>(data); ++at) {
        if (*at != char(0xff)) {
          std::fprintf(stderr, "written before an array\n");
          std::abort();
        }
      }
      // The pattern around the data has been checked. The data itself is ours.
      const Header head = *reinterpret_cast<const Header*>(first - page);
      munmap(const_cast<char*>(first) - page, head.mapped);
    }
  }
  T* data;

 private:
  std::size_t shift_;
};

template <typename T>
T as(double value) {
  return T(compute_t<T>(value));
}
template <typename T>
double number(T value) {
  return double(compute_t<T>(value));
}
// The numbers at `data`.
template <typename T>
Numbers numbers_of(const T* data, std::size_t count) {
  Numbers all(count);
  std::transform(data, data + count, all.begin(), number<T>);
  return all;
}

template <typename T>
Rounding rounding_of() {
  // This reference rounds as much as the passes do in double.
  return std::is_same_v<T, double> ? Rounding{0x2p-53, 0x2p-53, 0}
      : std::is_same_v<T, float>   ? Rounding{0x1p-24, 0x1p-24, 0x1p-149}
      : std::is_same_v<T, Half>    ? Rounding{0x1p-24, 0x1p-11, 0x1p-24}
                                   : Rounding{0x1p-24, 0x1p-8, 0x1p-126};
}
template <typename T>
double largest_finite() {
  return std::is_same_v<T, Half> ? 65504.0 : 3e38;
}

// -- Random networks ---------------------------------------------------------

struct Random {
  std::mt19937_64 engine;
  int64_t below(int64_t n) {
    return int64_t(engine() % uint64_t(n));
  }
  bool one_in(int64_t n) {
    return below(n) == 0;
  }
  int64_t of(const std::vector<int64_t>& from) {
    return from[below(int64_t(from.size()))];
  }
};

// -1, 0 and 1 have exact sums. Other numbers are multiples of 1/64 of less than
// 2, which every dtype holds.
enum class Values { integers, finite, any };

Numbers random_numbers(
    Values values,
    int64_t count,
    double density,
    Random& random) {
  Numbers numbers(count);
  for (double& n : numbers) {
    const bool is_there = double(random.below(1000)) < 1000 * density;
    const double some = values == Values::integers
        ? double(random.below(3) - 1)
        : double(random.below(255) - 127) / 64;
    n = is_there ? some : 0;
  }
  if (values == Values::any && count > 0) {
    constexpr double infinity = std::numeric_limits<double>::infinity();
    const double nan = std::nan("");
    const double special[] = {infinity, -infinity, nan, -nan, -0.0};
    numbers[random.below(count)] = special[random.below(5)];
  }
  return numbers;
}

struct RandomNetwork : NetworkNumbers {
  Values values;
  bool has_equal_grads; // in all rows

  bool has_exact_sums() const { // if no delta is too large: see `largest`
    return values == Values::integers;
  }
};

// So many that few numbers of a row or column are not 0.
double density_of_weights(int64_t in, int64_t out) {
  return 6.0 / double(std::max<int64_t>({6, in, out}));
}

RandomNetwork random_network(int64_t case_number, Random& random) {
  RandomNetwork net;
  const Values values = std::array{
      Values::integers, Values::integers, Values::finite,
      Values::any}[random.below(4)];
  const std::vector<int64_t> edges = {0, 1, 3},
                             few = {0, 1, 2, 3, 5, 7, 8, 9, 15, 16, 17},
                             more = {31, 32, 33, 47,  49,  63,  64,
                                     65, 96, 97, 130, 200, 256, 300};
  if (case_number < 108) { // every network of two layers with these sizes
    net.rows = std::vector<int64_t>{0, 1, 3, 97}[case_number % 4];
    for (int64_t rest = case_number / 4, l = 0; l < 3; ++l, rest /= 3) {
      net.sizes.push_back(edges[rest % 3]);
    }
  } else {
    // Rows of 256 numbers map to the same cache sets.
    const bool is_square = random.one_in(6);
    const int64_t layers = 1 + random.below(is_square ? 2 : 4);
    for (int64_t l = 0; l <= layers; ++l) {
      net.sizes.push_back(
          is_square              ? 256
              : random.one_in(3) ? random.of(more)
                                 : random.of(few));
    }
    const int64_t widest =
        *std::max_element(net.sizes.begin(), net.sizes.end());
    // Zeros are skipped in the reference of integers alone.
    const int64_t most = values == Values::integers ? 45'000 : 8'000;
    do {
      net.rows = is_square   ? random.of({15, 16, 40})
          : random.one_in(2) ? random.of(few)
                             : random.of({24, 25, 48, 97, 200, 241, 500});
    } while (net.rows * widest > most);
  }
  net.activation = std::array{
      Activation::none, Activation::relu, Activation::sigmoid,
      Activation::tanh}[random.below(values == Values::integers ? 2 : 4)];
  net.is_finite = values != Values::any;
  net.values = values;
  net.has_equal_grads = random.one_in(6);
  net.x = random_numbers(values, net.rows * net.sizes[0], 1, random);
  for (std::size_t l = 0; l + 1 < net.sizes.size(); ++l) {
    const int64_t in = net.sizes[l], out = net.sizes[l + 1];
    net.weights.push_back(
        random_numbers(values, out * in, density_of_weights(in, out), random));
    net.biases.push_back(
        random.one_in(3) ? Numbers{} : random_numbers(values, out, 1, random));
  }
  const int64_t out = net.sizes.back();
  const double density =
      std::min(1.0, 300.0 / double(std::max<int64_t>(1, net.rows)));
  net.grad = random_numbers(values, net.rows * out, density, random);
  for (int64_t n = out; net.has_equal_grads && n < net.rows * out; ++n) {
    net.grad[n] = net.grad[n - out];
  }
  return net;
}

// -- One case ----------------------------------------------------------------

// A matrix in its own memory, with NaN between its rows.
template <typename T>
struct Placed {
  Array<T> array;
  Matrix<const T> matrix;

  Placed(
      const Numbers& numbers,
      int64_t rows,
      int64_t cols,
      int64_t gap,
      bool is_transposed = false)
      : array(
            rows == 0 || cols == 0
                ? 0
                : (is_transposed ? (cols - 1) * (rows + gap) + rows
                                 : (rows - 1) * (cols + gap) + cols)) {
    matrix = is_transposed
        ? Matrix<const T>{array.data, rows, cols, 1, rows + gap}
        : Matrix<const T>{array.data, rows, cols, cols + gap, 1};
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < cols; ++c) {
        const_cast<T&>(matrix.at(r, c)) = as<T>(numbers[r * cols + c]);
      }
    }
  }
};

// What has run, by name, on an instruction set.
class Tally {
 public:
  void add(const std::string& what) {
    const std::lock_guard lock(mutex_);
    ++counts_[what];
  }
  // Prints the counts. Returns whether each of `names` has run.
  bool covers(const std::vector<std::string>& names) {
    bool has_all = true;
    const char* separator = "  ";
    for (const std::string& name : names) {
      std::printf("%s%s %d", separator, name.c_str(), counts_[name]);
      separator = ", ";
      has_all = has_all && counts_[name] > 0;
    }
    std::printf("\n");
    counts_.clear();
    return has_all;
  }

 private:
  std::mutex mutex_;
  std::map<std::string, int> counts_;
};

Tally tally;
std::mutex output_mutex;

constexpr const char* kinds[] = {"packed", "bf16", "bf16_one_block", "library"};
constexpr const char* packs[] = {"none", "view", "once", "per_use", "left"};

template <typename T>
class Case {
 public:
  Case(const RandomNetwork& numbers, Random& random, const std::string& name)
      : numbers_(numbers), random_(random), name_(name) {
    const auto gap = [&] { return random.one_in(2) ? 0 : random.below(9); };
    const int64_t rows = numbers.rows;
    x_.emplace_back(numbers.x, rows, numbers.sizes[0], gap());
    network_ = {x_[0].matrix, {}, numbers.activation, activate};
    for (std::size_t l = 0; l < numbers.layers(); ++l) {
      const int64_t in = numbers.sizes[l], out = numbers.sizes[l + 1];
      const Numbers& bias = numbers.biases[l];
      weights_.emplace_back(numbers.weights[l], out, in, gap());
      biases_.emplace_back(bias, 1, int64_t(bias.size()), 0);
      network_.layers.push_back(
          {weights_[l].matrix, bias.empty() ? nullptr : biases_[l].array.data});
    }
    choose_plan();
  }

  void run() {
    forward(true);
    forward(false);
    backward(false, false);
    vjp();
    backward(true, false);
    backward(true, true);
    other_losses();
    if (numbers_.layers() > 1) {
      backward(false, false, random_grad_hidden());
    }
  }

 private:
  static void activate(Activation phi, T* z, int64_t count) {
    for (int64_t n = 0; n < count; ++n) {
      z[n] = as<T>(activated(phi, number(z[n])));
    }
  }

  // The plan of the call; or small blocks and many chunks, so threads interact;
  // or the library's products.
  void choose_plan() {
    const int64_t some = std::max<int64_t>(1, numbers_.rows);
    const Call call = call_of(network_);
    plan_ = make_plan(call);
    const int64_t choice = random_.below(3);
    if (choice == 1) {
      const int64_t chunks = 1 + random_.below(5);
      plan_.chunk = ceil_div(some, chunks);
      plan_.chunks = ceil_div(some, plan_.chunk);
      plan_.block = 1 + random_.below(plan_.chunk);
      const bool multiplies_bf16 = plan_.layers == LayersKind::bf16 ||
          plan_.layers == LayersKind::bf16_one_block;
      plan_.layers = !multiplies_bf16 ? LayersKind::packed
          : some <= plan_.block       ? LayersKind::bf16_one_block
                                      : LayersKind::bf16;
    } else if (choice == 2) {
      plan_.layers = LayersKind::library;
      plan_.chunk = some;
      plan_.chunks = 1;
      plan_.block = is_16bit<T> ? some : 1 + random_.below(some);
    }
    plan_.packing = plan_packing(call, plan_);
    tally.add(kinds[int(plan_.layers)]);
    if (plan_.layers == LayersKind::packed) {
      for (const LayerPacking& layer : plan_.packing) {
        tally.add(std::string("forward ") + packs[int(layer.forward)]);
        tally.add(std::string("grad_input ") + packs[int(layer.grad_input)]);
        tally.add(std::string("grad_weight ") + packs[int(layer.grad_weight)]);
      }
    }
  }

  void check(
      const std::string& what,
      const T* found,
      const Bounded& expected,
      bool is_exact) const {
    for (std::size_t n = 0; n < expected.value.size(); ++n) {
      const double value = expected.value[n], error = expected.error[n];
      const double is = number(found[n]), rounded = number(as<T>(value));
      const bool may_overflow =
          std::abs(value) + error > largest_finite<T>() && !std::isnan(is);
      const bool is_right = is_exact || !std::isfinite(value)
          ? is == rounded || (std::isnan(is) && std::isnan(rounded))
          : std::abs(is - value) <= error || may_overflow;
      if (!is_right) {
        const std::lock_guard lock(output_mutex);
        std::fprintf(
            stderr, "%s, %s: %s, number %zu is %.17g, not %.17g +- %g\n",
            name_.c_str(), kinds[int(plan_.layers)], what.c_str(), n, is, value,
            is_exact ? 0 : error);
        std::exit(1);
      }
    }
  }

  // The same as in csrc/cpu/passes.cpp.
  template <typename F>
  void with_layers(const F& f) {
    if constexpr (std::is_same_v<T, BFloat16>) {
      if (plan_.layers == LayersKind::bf16_one_block) {
        return f.template operator()<Bf16Layers<BFloat16>>();
      }
      if (plan_.layers == LayersKind::bf16) {
        return f.template operator()<Bf16Layers<float>>();
      }
    }
    if (plan_.layers == LayersKind::library) {
      return f.template operator()<LibraryLayers<T>>();
    }
    f.template operator()<PackedLayers<T>>();
  }

  // Every layer is checked for the input that it has got.
  void forward(bool saves) {
    const std::size_t layers = numbers_.layers();
    std::vector<Array<T>> results;
    std::vector<T*> hidden;
    for (std::size_t l = 1; l <= layers; ++l) {
      results.emplace_back(numbers_.rows * numbers_.sizes[l]);
      if (saves && l < layers) {
        hidden.push_back(results.back().data);
      }
    }
    T* const y = results.back().data;
    with_layers(
        [&]<typename L>() { walk_forward<L>(network_, plan_, hidden, y); });
    if (!saves) { // the same bits, or NaN
      check("y of inference", y, a_.back(), true);
      return;
    }
    a_ = {numbers_.x};
    for (std::size_t l = 0; l < layers; ++l) {
      const Bounded expected =
          forward_reference(numbers_, l, a_[l], rounding_of<T>());
      check(
          "activation " + std::to_string(l + 1), results[l].data, expected,
          numbers_.has_exact_sums());
      a_.push_back(numbers_of(results[l].data, expected.value.size()));
    }
  }

  // Numbers like those of the network, or none.
  Numbers some(int64_t count, double density) {
    return random_.one_in(3)
        ? Numbers{}
        : random_numbers(numbers_.values, count, density, random_);
  }

  std::vector<Numbers> random_grad_hidden() {
    std::vector<Numbers> grads;
    for (std::size_t l = 1; l < numbers_.layers(); ++l) {
      grads.push_back(some(numbers_.rows * numbers_.sizes[l], 0.2));
    }
    return grads;
  }

  // The gradient of y, with any strides.
  Placed<T> place_grad() {
    const bool is_transposed = random_.one_in(3);
    Placed<T> placed(
        numbers_.grad, numbers_.rows, numbers_.sizes.back(), random_.below(3),
        is_transposed);
    if (numbers_.has_equal_grads) {
      placed.matrix.row_stride = 0;
    }
    return placed;
  }

  void backward(
      bool recompute,
      bool by_loss,
      const std::vector<Numbers>& grad_hidden = {}) {
    const std::size_t layers = numbers_.layers();
    std::string flags;
    for (std::size_t n = 0; n < 1 + 2 * layers; ++n) {
      flags += by_loss ? "01"[n > 0] : "01"[!random_.one_in(3)];
    }
    const Needs needs{flags};
    if (needs.lowest_layer() == layers) {
      return;
    }
    Network<T> network = network_;
    BackwardPass<T> pass{needs};
    pass.recompute = recompute;
    const int64_t rows = numbers_.rows, out = numbers_.sizes.back();
    std::vector<Placed<T>> saved;
    saved.reserve(layers + 1);
    if (!recompute) { // an operand that is not needed keeps its shape
      network.x.data = needs.weight(0) ? network.x.data : nullptr;
      for (std::size_t l = 0; l < layers; ++l) {
        const bool is_kept = l > needs.lowest_layer() || needs.weight(l);
        if (!needs.propagation_through(l)) {
          network.layers[l].weight.data = nullptr;
        }
        network.layers[l].bias = nullptr;
        if (l > 0) {
          saved.emplace_back(a_[l], rows, numbers_.sizes[l], 0);
          pass.hidden.push_back(
              is_kept ? saved.back().matrix : Matrix<const T>{});
        }
      }
      saved.emplace_back(a_.back(), rows, out, random_.below(3));
      pass.y = saved.back().matrix;
    }
    std::vector<Placed<T>> placed_hidden;
    for (std::size_t l = 0; l < grad_hidden.size(); ++l) {
      const bool is_missing = grad_hidden[l].empty();
      placed_hidden.emplace_back(
          grad_hidden[l], is_missing ? 0 : rows, numbers_.sizes[l + 1], 0);
      pass.grad_hidden.push_back(
          is_missing ? Matrix<const T>{} : placed_hidden.back().matrix);
    }
    // By the loss 1/2 sum (y - target)^2, whose gradient is y - target.
    Numbers grad = numbers_.grad, target = grad;
    for (std::size_t n = 0; by_loss && n < grad.size(); ++n) {
      target[n] = number(as<T>(a_.back()[n] - grad[n]));
      grad[n] = a_.back()[n] - target[n];
    }
    const Placed<T> placed =
        by_loss ? Placed<T>(target, rows, out, 0) : place_grad();
    Array<T> loss(1);
    if (by_loss) {
      set_loss(pass, Loss::half_sse, {placed.matrix, {}}, loss.data);
    } else {
      pass.grad_output = placed.matrix;
    }
    Array<T> grad_x(int64_t(numbers_.x.size()));
    std::vector<Array<T>> weight_grads, bias_grads;
    pass.grad_x = needs.x() ? grad_x.data : nullptr;
    for (std::size_t l = 0; l < layers; ++l) {
      weight_grads.emplace_back(int64_t(numbers_.weights[l].size()));
      bias_grads.emplace_back(numbers_.sizes[l + 1]);
      pass.grad_weights.push_back(
          needs.weight(l) ? weight_grads[l].data : nullptr);
      pass.grad_biases.push_back(needs.bias(l) ? bias_grads[l].data : nullptr);
    }
    with_layers([&]<typename L>() { walk_backward<L>(network, plan_, pass); });

    const Gradients& expected = gradients(grad, grad_hidden);
    const bool is_exact = numbers_.has_exact_sums() && expected.largest < 256;
    const std::string how = by_loss ? ", by loss"
        : recompute                 ? ", recomputed"
        : grad_hidden.empty()       ? ""
                                    : ", with grad_hidden";
    if (by_loss) {
      check("loss", loss.data, loss_reference(grad), numbers_.has_exact_sums());
    }
    if (needs.x()) {
      check("grad of x" + how, grad_x.data, expected.x, is_exact);
    }
    for (std::size_t l = 0; l < layers; ++l) {
      const std::string which = std::to_string(l) + how;
      if (needs.weight(l)) {
        check(
            "grad of weight " + which, weight_grads[l].data,
            expected.weights[l], is_exact);
      }
      if (needs.bias(l)) {
        check(
            "grad of bias " + which, bias_grads[l].data, expected.biases[l],
            is_exact);
      }
    }
  }

  // The values of the losses other than squared errors. Their gradients run, and
  // the tests in Python check them.
  void other_losses() {
    const std::size_t layers = numbers_.layers();
    const int64_t rows = numbers_.rows, out = numbers_.sizes.back();
    const Placed<T> values(numbers_.grad, rows, out, 0);
    const Array<int64_t> classes(rows);
    for (int64_t i = 0; i < rows; ++i) {
      classes.data[i] =
          out == 0 || random_.one_in(3) ? ignored_class : random_.below(out);
    }
    const Matrix<const int64_t> by_class{classes.data, rows, 1, 1, 1};
    for (const auto& [kind, target] :
         {std::pair{Loss::l1, Target<T>{values.matrix, {}}},
          {Loss::huber, {values.matrix, {}}},
          {Loss::bce_with_logits, {values.matrix, {}}},
          {Loss::cross_entropy, {values.matrix, {}}},
          {Loss::cross_entropy, {{}, by_class}}}) {
      std::string flags(1 + 2 * layers, '1');
      flags[0] = '0';
      BackwardPass<T> pass{Needs{flags}};
      pass.recompute = true;
      Array<T> loss(1);
      set_loss(pass, kind, target, loss.data);
      std::vector<Array<T>> grads;
      const auto result = [&](int64_t count) {
        return grads.emplace_back(count).data;
      };
      for (std::size_t l = 0; l < layers; ++l) {
        pass.grad_weights.push_back(
            result(int64_t(numbers_.weights[l].size())));
        pass.grad_biases.push_back(result(numbers_.sizes[l + 1]));
      }
      with_layers(
          [&]<typename L>() { walk_backward<L>(network_, plan_, pass); });
      check(
          std::string(loss_names[int(kind)]), loss.data,
          other_loss_reference(
              kind, target.classes.data, pass.loss_scale, a_.back()),
          false);
    }
  }

  // A loss of y and the numbers of `grad`, or of these classes.
  Bounded other_loss_reference(
      Loss kind,
      const int64_t* classes,
      double scale,
      const Numbers& y) const {
    const int64_t rows = numbers_.rows, out = numbers_.sizes.back();
    double sum = 0, magnitude = 0;
    for (int64_t i = 0; i < rows; ++i) {
      const double* const z = y.data() + i * out;
      double largest = -INFINITY, exps = 0, spread = 0;
      for (int64_t j = 0; j < out; ++j) {
        largest = z[j] > largest ? z[j] : largest;
      }
      for (int64_t j = 0; j < out; ++j) {
        exps += std::exp(z[j] - largest);
        const double apart = std::abs(z[j] - largest);
        spread = std::isfinite(apart) ? std::max(spread, apart) : spread;
      }
      const double log_sum = std::log(exps);
      for (int64_t j = 0; j < out; ++j) {
        const double t = number(as<T>(numbers_.grad[i * out + j]));
        const double e = std::abs(z[j] - t), below = z[j] < 0 ? z[j] : 0;
        const double cross = log_sum - (z[j] - largest);
        double term = 0, size = 0;
        if (kind == Loss::l1) {
          size = term = e;
        } else if (kind == Loss::huber) {
          size = e;
          term = e < 1 ? e * e / 2 : e - 0.5;
        } else if (kind == Loss::bce_with_logits) {
          term = (1 - t) * z[j] - below + std::log1p(std::exp(-std::abs(z[j])));
          size = 1 + std::abs((1 - t) * z[j]) - below;
        } else if (classes) {
          term = classes[i] == j ? cross : 0;
          size = classes[i] == j ? 1 + log_sum + 2 * spread : 0;
        } else {
          term = t * cross;
          size = std::abs(t) * (1 + log_sum + 2 * spread);
        }
        sum += term;
        magnitude += size;
      }
    }
    Bounded loss(1);
    loss.value[0] = scale * sum;
    loss.round(
        0, scale * magnitude, rounding_of<T>().of_sum(rows * out + out),
        rounding_of<T>());
    return loss;
  }

  // The vector-Jacobian product of the backward pass.
  void vjp() {
    const std::size_t layers = numbers_.layers();
    const int64_t rows = numbers_.rows;
    Tangents tangents{some(int64_t(numbers_.x.size()), 1), {}, {}};
    for (std::size_t l = 0; l < layers; ++l) {
      const int64_t in = numbers_.sizes[l], out = numbers_.sizes[l + 1];
      tangents.weights.push_back(some(out * in, density_of_weights(in, out)));
      tangents.biases.push_back(some(out, 1));
    }

    Network<T> network = network_;
    VjpPass<T> pass;
    pass.tangents = network_;
    const Placed<T> grad = place_grad();
    pass.grad_output = grad.matrix;
    std::vector<Placed<T>> saved, placed;
    const auto place = [&](const Numbers& numbers, int64_t m, int64_t n) {
      const bool is_missing = numbers.empty();
      placed.emplace_back(numbers, is_missing ? 0 : m, n, 0);
      Matrix<const T> matrix = placed.back().matrix;
      matrix.rows = m; // an operand that is missing keeps its shape
      matrix.data = is_missing ? nullptr : matrix.data;
      return matrix;
    };
    pass.tangents.x = place(tangents.x, rows, numbers_.sizes[0]);
    for (std::size_t l = 0; l < layers; ++l) {
      const int64_t in = numbers_.sizes[l], out = numbers_.sizes[l + 1];
      network.layers[l].bias = nullptr;
      pass.tangents.layers[l] = {
          place(tangents.weights[l], out, in),
          place(tangents.biases[l], 1, out).data};
      const bool is_y = l + 1 == layers;
      saved.emplace_back(a_[l + 1], rows, out, is_y ? random_.below(3) : 0);
      if (is_y) {
        pass.y = saved.back().matrix;
      } else {
        pass.hidden.push_back(saved.back().matrix);
      }
    }
    std::vector<Array<T>> results;
    const auto result = [&](std::size_t count) {
      results.emplace_back(int64_t(count));
      return random_.one_in(3) ? nullptr : results.back().data;
    };
    pass.of_grad_output = result(numbers_.grad.size());
    pass.of_y = result(numbers_.grad.size());
    for (std::size_t l = 0; l < layers; ++l) {
      pass.of_weights.push_back(result(numbers_.weights[l].size()));
      pass.of_inputs.push_back(result(a_[l].size()));
    }
    with_layers([&]<typename L>() { walk_vjp<L>(network, plan_, pass); });

    const Gradients& backward = gradients(numbers_.grad);
    const VjpGradients expected = vjp_reference(
        numbers_, a_, backward.deltas, tangents, rounding_of<T>());
    const bool is_exact = numbers_.has_exact_sums() &&
        std::max(backward.largest, expected.largest) < 256;
    const auto check_if_wanted = [&](const std::string& what, const T* found,
                                     const Bounded& numbers) {
      if (found) {
        check("vjp: grad of " + what, found, numbers, is_exact);
      }
    };
    check_if_wanted(
        "grad_output", pass.of_grad_output, expected.of_grad_output);
    check_if_wanted("y", pass.of_y, expected.of_y);
    for (std::size_t l = 0; l < layers; ++l) {
      const std::string which = std::to_string(l);
      check_if_wanted(
          "weight " + which, pass.of_weights[l], expected.of_weights[l]);
      check_if_wanted(
          "input " + which, pass.of_inputs[l], expected.of_inputs[l]);
    }
  }

  // The reference for gradients of y and of the hidden activations. Most passes
  // share it.
  const Gradients& gradients(
      const Numbers& grad,
      const std::vector<Numbers>& grad_hidden = {}) {
    if (gradients_.empty() || grad != grad_of_y_ ||
        grad_hidden != grad_hidden_) {
      grad_of_y_ = grad;
      grad_hidden_ = grad_hidden;
      gradients_ = {backward_reference(
          numbers_, a_, grad, grad_hidden, rounding_of<T>())};
    }
    return gradients_[0];
  }

  // The loss whose gradient at y is `grad`.
  static Bounded loss_reference(const Numbers& grad) {
    Bounded loss(1);
    for (const double g : grad) {
      loss.value[0] += 0.5 * g * g;
    }
    loss.round(
        0, loss.value[0], rounding_of<T>().of_sum(int64_t(grad.size())),
        rounding_of<T>());
    return loss;
  }

  const RandomNetwork& numbers_;
  Random& random_;
  const std::string name_;
  std::vector<Placed<T>> x_, weights_, biases_;
  Network<T> network_;
  Plan plan_;
  std::vector<Numbers> a_; // x, the hidden activations that were found, y
  Numbers grad_of_y_;
  std::vector<Numbers> grad_hidden_;
  std::vector<Gradients> gradients_; // for both; none or one
};

void run_cases(
    int64_t first,
    int64_t step,
    int64_t count,
    const std::string& set) {
  for (int64_t number = first; number < count; number += step) {
    Random random{std::mt19937_64(uint64_t(number))};
    const RandomNetwork net = random_network(number, random);
    const std::string name = set + ", case " + std::to_string(number);
    Case<float>(net, random, name + ", float").run();
    Case<double>(net, random, name + ", double").run();
    Case<BFloat16>(net, random, name + ", bfloat16").run();
    Case<Half>(net, random, name + ", half").run();
  }
}

// -- Conversions -------------------------------------------------------------

// Every number of T is widened. Rounding is checked on each of them, halfway
// to the next one, and one bit of a float beside both.
template <typename T>
void check_conversions(const std::string& name) {
  constexpr int64_t count = 1 << 16;
  std::vector<uint16_t> all(count), rounded(count);
  std::vector<float> wide(count);
  for (int64_t i = 0; i < count; ++i) {
    all[i] = uint16_t(i);
  }
  const auto fail_unless = [&](bool is_right, const char* what, int64_t i) {
    if (!is_right) {
      std::fprintf(
          stderr, "%s: %s, bits %llx\n", name.c_str(), what,
          static_cast<unsigned long long>(i));
      std::exit(1);
    }
  };
  const auto is_same = [](double a, double b) {
    return std::isnan(a) ? std::isnan(b)
                         : a == b && std::signbit(a) == std::signbit(b);
  };
  const T* const numbers = reinterpret_cast<const T*>(all.data());
  widen(wide.data(), numbers, count);
  for (int64_t i = 0; i < count; ++i) {
    fail_unless(is_same(wide[i], number(numbers[i])), "widened", i);
  }
  // The instructions for bfloat16 take subnormal numbers for 0.
  const bool has_subnormals = !(
      std::is_same_v<T, BFloat16> && chosen_instruction_set().bf16 != nullptr);
  for (const int64_t offset :
       {-1, 0, 1, 0x0fff, 0x1000, 0x1001, 0x7fff, 0x8000, 0x8001}) {
    std::vector<float> from = wide;
    for (float& f : from) {
      uint32_t bits;
      std::memcpy(&bits, &f, sizeof(bits));
      bits += uint32_t(offset);
      std::memcpy(&f, &bits, sizeof(bits));
    }
    round_to(reinterpret_cast<T*>(rounded.data()), from.data(), count);
    for (int64_t i = 0; i < count; ++i) {
      const T found = reinterpret_cast<const T*>(rounded.data())[i];
      const bool is_skipped =
          !has_subnormals && std::fpclassify(from[i]) == FP_SUBNORMAL;
      fail_unless(
          is_skipped || is_same(number(found), number(T(from[i]))), "rounded",
          i << 16 | (offset & 0xffff));
    }
  }
}

// What must run on an instruction set.
std::vector<std::string> required() {
  std::vector<std::string> names = {
      "packed",
      "library",
      "forward none",
      "forward once",
      "forward per_use",
      "forward left",
      "grad_input view",
      "grad_input once",
      "grad_input per_use",
      "grad_weight view",
      "grad_weight per_use"};
  if (chosen_instruction_set().bf16) {
    names.insert(names.end(), {"bf16", "bf16_one_block"});
  }
  return names;
}

} // namespace
} // namespace relu_mlp::cpu

// The argument is the number of cases for each instruction set.
int main(int argc, char** argv) {
  using namespace relu_mlp::cpu;
  const int64_t count = argc > 1 ? std::atoll(argv[1]) : 250;
  for (const std::string& set : supported_instruction_sets()) {
    choose_instruction_set(set);
    check_conversions<BFloat16>(set + ", bfloat16");
    check_conversions<relu_mlp::cpu::Half>(set + ", half");
    // Two independent callers, each with its own threads.
    std::thread other([&] { run_cases(1, 2, count, set); });
    run_cases(0, 2, count, set);
    other.join();
    std::printf(
        "%s: %lld networks, each in 4 dtypes and 12 passes\n", set.c_str(),
        static_cast<long long>(count));
    if (!tally.covers(required())) {
      std::fprintf(stderr, "too few networks: something has not run\n");
      return 1;
    }
    std::fflush(stdout);
  }
}
