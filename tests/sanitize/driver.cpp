// The CPU passes on plain data, without PyTorch, for the sanitizers: `make
// sanitize`.
//
// Networks of small integers, whose sums are exact, go through all passes in
// every dtype on every instruction set. The results must have the bits of plain
// loops in double precision. PyTorch's own products are not tested; where the
// plan chooses them, this package's products are used instead.
//
// Every operand, result and workspace ends at a page that must not be touched,
// is surrounded by a pattern, and holds NaN before it is written. This finds
// accesses that the sanitizers do not see: masked ones and those of AMX.

#include <sys/mman.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <random>
#include <string>
#include <thread>

#include "../../csrc/cpu/bf16_layers.h"
#include "../../csrc/cpu/call.h"
#include "../../csrc/cpu/packed_layers.h"
#include "../../csrc/cpu/walk.h"

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

// -- A network in double precision -------------------------------------------

using Numbers = std::vector<double>;

struct ReferenceNetwork {
  int64_t rows;
  std::vector<int64_t> sizes;
  Activation activation;
  Numbers x, grad; // of y
  std::vector<Numbers> weights, biases; // a bias without elements is missing
  std::vector<Numbers> a; // x, the hidden activations, y
  std::vector<Numbers> grad_hidden; // what else reaches the a_l, or nothing
  Numbers grad_x, of_squares;
  std::vector<Numbers> grad_weights, grad_biases;
  double largest = 0;

  std::size_t layers() const {
    return weights.size();
  }

  void run() {
    a = {x};
    for (std::size_t l = 0; l < layers(); ++l) {
      const int64_t in = sizes[l], out = sizes[l + 1];
      Numbers z(rows * out);
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t i = 0; i < out; ++i) {
          double sum = biases[l].empty() ? 0 : biases[l][i];
          for (int64_t j = 0; j < in; ++j) {
            sum += a[l][r * in + j] * weights[l][i * in + j];
          }
          largest = std::max(largest, std::abs(sum));
          const bool relu = l + 1 < layers() || activation == Activation::relu;
          z[r * out + i] = relu && sum < 0 ? 0 : sum;
        }
      }
      a.push_back(z);
    }
    Numbers delta = grad;
    for (std::size_t n = 0; activation == Activation::relu && n < delta.size();
         ++n) {
      delta[n] = a.back()[n] > 0 ? delta[n] : 0;
    }
    grad_weights.resize(layers());
    grad_biases.resize(layers());
    for (std::size_t l = layers(); l-- > 0;) {
      const int64_t in = sizes[l], out = sizes[l + 1];
      grad_weights[l].assign(out * in, 0);
      grad_biases[l].assign(out, 0);
      Numbers below(rows * in);
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t i = 0; i < out; ++i) {
          const double d = delta[r * out + i];
          if (d == 0) {
            continue;
          }
          grad_biases[l][i] += d;
          for (int64_t j = 0; j < in; ++j) {
            grad_weights[l][i * in + j] += d * a[l][r * in + j];
            below[r * in + j] += d * weights[l][i * in + j];
          }
        }
      }
      for (std::size_t n = 0; n < below.size(); ++n) {
        below[n] += grad_hidden.empty() || l == 0 ? 0 : grad_hidden[l - 1][n];
        below[n] = l > 0 && !(a[l][n] > 0) ? 0 : below[n];
        largest = std::max(largest, std::abs(below[n]));
      }
      delta = below;
    }
    grad_x = delta;
  }
};

// Tangents W_l' and b_l' and x' of a network, or no elements for 0, and what a
// VjpPass makes of them.
struct ReferenceVjp {
  const ReferenceNetwork& net;
  Numbers x_tangent;
  std::vector<Numbers> weight_tangents, bias_tangents;
  Numbers of_grad_output;
  std::vector<Numbers> of_weights, of_inputs;
  double largest = 0;

  // m (rows, out) W^T (in, out) + ..., where W has no elements if it is 0.
  Numbers product(
      const Numbers& m,
      const Numbers& w,
      int64_t out,
      int64_t in,
      bool is_transposed) {
    const int64_t k = is_transposed ? in : out, cols = is_transposed ? out : in;
    Numbers result(net.rows * cols);
    for (int64_t r = 0; !w.empty() && r < net.rows; ++r) {
      for (int64_t c = 0; c < cols; ++c) {
        for (int64_t i = 0; i < k; ++i) {
          result[r * cols + c] +=
              m[r * k + i] * w[is_transposed ? c * in + i : i * in + c];
        }
      }
    }
    for (const double n : result) {
      largest = std::max(largest, std::abs(n));
    }
    return result;
  }

  void run() {
    const std::size_t layers = net.layers();
    const auto mask = [](Numbers& m, const Numbers& a) {
      for (std::size_t n = 0; n < m.size(); ++n) {
        m[n] = a[n] > 0 ? m[n] : 0;
      }
    };
    std::vector<Numbers> deltas(layers);
    deltas[layers - 1] = net.grad;
    if (net.activation == Activation::relu) {
      mask(deltas[layers - 1], net.a.back());
    }
    for (std::size_t l = layers; l-- > 1;) {
      deltas[l - 1] = product(
          deltas[l], net.weights[l], net.sizes[l + 1], net.sizes[l], false);
      mask(deltas[l - 1], net.a[l]);
    }
    Numbers tangent = x_tangent;
    tangent.resize(net.x.size());
    for (std::size_t l = 0; l < layers; ++l) {
      const int64_t in = net.sizes[l], out = net.sizes[l + 1];
      of_inputs.push_back(
          product(deltas[l], weight_tangents[l], out, in, false));
      Numbers& of_weight = of_weights.emplace_back(out * in);
      for (int64_t r = 0; r < net.rows; ++r) {
        for (int64_t i = 0; i < out; ++i) {
          for (int64_t j = 0; j < in; ++j) {
            of_weight[i * in + j] +=
                deltas[l][r * out + i] * tangent[r * in + j];
          }
        }
      }
      Numbers z = product(tangent, net.weights[l], out, in, true);
      const Numbers more = product(net.a[l], weight_tangents[l], out, in, true);
      for (std::size_t n = 0; n < z.size(); ++n) {
        const double bias =
            bias_tangents[l].empty() ? 0 : bias_tangents[l][n % out];
        largest = std::max(largest, std::abs(more[n] + bias));
        z[n] += more[n] + bias;
        largest = std::max(largest, std::abs(z[n]));
      }
      if (l + 1 < layers || net.activation == Activation::relu) {
        mask(z, net.a[l + 1]);
      }
      tangent = z;
    }
    of_grad_output = tangent;
  }
};

// -- One case ----------------------------------------------------------------

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
  Numbers integers(int64_t count, double density) {
    Numbers numbers(count);
    for (double& n : numbers) {
      const bool is_there = double(engine() % 1000) < 1000 * density;
      n = is_there ? double(below(3) - 1) : 0;
    }
    return numbers;
  }
};

ReferenceNetwork random_network(int64_t number, Random& random) {
  ReferenceNetwork net;
  const std::vector<int64_t> edges = {0, 1, 3},
                             few = {0, 1, 2, 3, 5, 7, 8, 9, 15, 16, 17},
                             more = {31, 32, 33, 47,  49,  63,  64,
                                     65, 96, 97, 130, 200, 256, 300};
  if (number < 108) { // every network of two layers with these sizes
    net.rows = std::vector<int64_t>{0, 1, 3, 97}[number % 4];
    for (int64_t rest = number / 4, l = 0; l < 3; ++l, rest /= 3) {
      net.sizes.push_back(edges[rest % 3]);
    }
  } else {
    for (int64_t l = 0, layers = 1 + random.below(4); l <= layers; ++l) {
      net.sizes.push_back(random.one_in(3) ? random.of(more) : random.of(few));
    }
    const int64_t widest =
        *std::max_element(net.sizes.begin(), net.sizes.end());
    do {
      net.rows = random.one_in(2) ? random.of(few)
                                  : random.of({24, 25, 48, 97, 200, 241, 500});
    } while (net.rows * widest > 45'000);
  }
  net.activation = random.one_in(2) ? Activation::none : Activation::relu;
  net.x = random.integers(net.rows * net.sizes[0], 1);
  for (std::size_t l = 0; l + 1 < net.sizes.size(); ++l) {
    const int64_t in = net.sizes[l], out = net.sizes[l + 1];
    net.weights.push_back(random.integers(
        out * in, 6.0 / double(std::max<int64_t>({6, in, out}))));
    net.biases.push_back(
        random.one_in(3) ? Numbers{} : random.integers(out, 1));
  }
  net.grad = random.integers(
      net.rows * net.sizes.back(),
      std::min(1.0, 300.0 / double(std::max<int64_t>(1, net.rows))));
  net.run();
  return net;
}

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

std::mutex output_mutex;

template <typename T>
class Case {
 public:
  Case(
      const ReferenceNetwork& reference,
      Random& random,
      const std::string& name)
      : reference_(reference),
        random_(random),
        name_(name),
        is_exact_(reference.largest < 256) {
    const auto gap = [&] { return random.one_in(2) ? 0 : random.below(9); };
    const int64_t rows = reference.rows;
    x_.emplace_back(reference.x, rows, reference.sizes[0], gap());
    network_ = {x_[0].matrix, {}, reference.activation, nullptr};
    for (std::size_t l = 0; l < reference.layers(); ++l) {
      const int64_t in = reference.sizes[l], out = reference.sizes[l + 1];
      const Numbers& bias = reference.biases[l];
      weights_.emplace_back(reference.weights[l], out, in, gap());
      biases_.emplace_back(bias, 1, int64_t(bias.size()), 0);
      network_.layers.push_back(
          {weights_[l].matrix, bias.empty() ? nullptr : biases_[l].array.data});
    }
    const Call call = call_of(network_);
    plan_ = make_plan(call);
    if (plan_.layers == LayersKind::library) {
      plan_.layers = LayersKind::packed;
    }
    if (random.one_in(2)) { // small blocks and many chunks, so threads interact
      const int64_t chunks = 1 + random.below(5),
                    some = std::max<int64_t>(1, rows);
      plan_.chunk = ceil_div(some, chunks);
      plan_.chunks = ceil_div(some, plan_.chunk);
      plan_.block = 1 + random.below(plan_.chunk);
      if (plan_.layers != LayersKind::packed) {
        plan_.layers =
            rows <= plan_.block ? LayersKind::bf16_one_block : LayersKind::bf16;
      }
    }
    plan_.packing = plan_packing(call, plan_);
  }

  void run() {
    forward(true);
    forward(false);
    backward(false, false);
    backward(true, false);
    backward(true, true);
    if (reference_.layers() > 1) {
      backward_with_grad_hidden();
    }
    vjp();
  }

 private:
  void check(
      const char* what,
      std::size_t l,
      const T* found,
      const Numbers& expected,
      bool is_exact = true) {
    for (std::size_t n = 0; n < expected.size(); ++n) {
      const double wanted = number(as<T>(expected[n]));
      if (is_exact_ && is_exact ? number(found[n]) != wanted
                                : std::isnan(number(found[n]))) {
        const std::lock_guard lock(output_mutex);
        std::fprintf(
            stderr, "%s: %s %zu, number %zu is %g, not %g\n", name_.c_str(),
            what, l, n, number(found[n]), wanted);
        std::exit(1);
      }
    }
  }

  // The same as in csrc/cpu/passes.cpp, except for the library.
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
    f.template operator()<PackedLayers<T>>();
  }

  void forward(bool saves) {
    std::vector<Array<T>> results;
    std::vector<T*> hidden;
    for (std::size_t l = 1; l <= reference_.layers(); ++l) {
      results.emplace_back(int64_t(reference_.a[l].size()));
      if (saves && l < reference_.layers()) {
        hidden.push_back(results.back().data);
      }
    }
    with_layers([&]<typename L>() {
      walk_forward<L>(network_, plan_, hidden, results.back().data);
    });
    check("y", 0, results.back().data, reference_.a.back());
    for (std::size_t l = 0; l < hidden.size(); ++l) {
      check("hidden", l, hidden[l], reference_.a[l + 1]);
    }
  }

  // The backward pass that gradients reach at the hidden activations too.
  void backward_with_grad_hidden() {
    ReferenceNetwork with_more = reference_;
    for (std::size_t l = 1; l < reference_.layers(); ++l) {
      with_more.grad_hidden.push_back(
          random_.integers(int64_t(reference_.a[l].size()), 0.2));
    }
    with_more.run();
    Case<T> other(with_more, random_, name_ + ", with grad_hidden");
    other.backward(false, false);
  }

  // a_1 ... a_{L-1} and y as a pass reads them.
  std::vector<Placed<T>> place_activations() {
    std::vector<Placed<T>> placed;
    for (std::size_t l = 1; l <= reference_.layers(); ++l) {
      const bool is_y = l == reference_.layers();
      placed.emplace_back(
          reference_.a[l], reference_.rows, reference_.sizes[l],
          is_y ? random_.below(3) : 0);
    }
    return placed;
  }

  void vjp() {
    const std::size_t layers = reference_.layers();
    const int64_t rows = reference_.rows;
    const auto some = [&](std::size_t count, double density) {
      return random_.one_in(3) ? Numbers{}
                               : random_.integers(int64_t(count), density);
    };
    ReferenceVjp expected{reference_, some(reference_.x.size(), 1)};
    for (std::size_t l = 0; l < layers; ++l) {
      const int64_t in = reference_.sizes[l], out = reference_.sizes[l + 1];
      expected.weight_tangents.push_back(
          some(out * in, 6.0 / double(std::max<int64_t>({6, in, out}))));
      expected.bias_tangents.push_back(some(out, 1));
    }
    expected.run();

    Network<T> network = network_;
    VjpPass<T> pass;
    const std::vector<Placed<T>> saved = place_activations();
    pass.y = saved.back().matrix;
    const Placed<T> grad(
        reference_.grad, rows, reference_.sizes.back(), random_.below(3),
        random_.one_in(3));
    pass.grad_output = grad.matrix;
    std::vector<Placed<T>> tangents; // x', then W_l' and b_l' by turns
    const auto placed = [&](const Numbers& numbers, int64_t m, int64_t n) {
      tangents.emplace_back(
          numbers.empty() ? Numbers(m * n) : numbers, m, n, 0);
      Matrix<const T> matrix = tangents.back().matrix;
      matrix.data = numbers.empty() ? nullptr : matrix.data;
      return matrix;
    };
    pass.tangents = network_;
    pass.tangents.x = placed(expected.x_tangent, rows, reference_.sizes[0]);
    for (std::size_t l = 0; l < layers; ++l) {
      const int64_t in = reference_.sizes[l], out = reference_.sizes[l + 1];
      network.layers[l].bias = nullptr;
      pass.tangents.layers[l] = {
          placed(expected.weight_tangents[l], out, in),
          placed(expected.bias_tangents[l], 1, out).data};
      if (l > 0) {
        pass.hidden.push_back(saved[l - 1].matrix);
      }
    }
    std::vector<Array<T>> results; // then of W_l and of a_l by turns
    const auto result = [&](const Numbers& numbers) {
      results.emplace_back(int64_t(numbers.size()));
      return random_.one_in(3) ? nullptr : results.back().data;
    };
    pass.of_grad_output = result(expected.of_grad_output);
    pass.of_y = result(expected.of_grad_output);
    for (std::size_t l = 0; l < layers; ++l) {
      pass.of_weights.push_back(result(expected.of_weights[l]));
      pass.of_inputs.push_back(result(expected.of_inputs[l]));
    }
    with_layers([&]<typename L>() { walk_vjp<L>(network, plan_, pass); });
    const auto check_if_wanted = [&](const char* what, std::size_t l,
                                     const T* found, const Numbers& numbers) {
      if (found) {
        check(what, l, found, numbers, expected.largest < 256);
      }
    };
    check_if_wanted("vjp of y", 0, pass.of_y, Numbers(reference_.grad.size()));
    check_if_wanted(
        "vjp of grad_output", 0, pass.of_grad_output, expected.of_grad_output);
    for (std::size_t l = 0; l < layers; ++l) {
      check_if_wanted(
          "vjp of weight", l, pass.of_weights[l], expected.of_weights[l]);
      check_if_wanted(
          "vjp of input", l, pass.of_inputs[l], expected.of_inputs[l]);
    }
  }

  void backward(bool recompute, bool by_loss) {
    const std::size_t layers = reference_.layers();
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
    const int64_t rows = reference_.rows;
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
          saved.emplace_back(reference_.a[l], rows, reference_.sizes[l], 0);
          pass.hidden.push_back(
              is_kept ? saved.back().matrix : Matrix<const T>{});
        }
      }
      saved.emplace_back(
          reference_.a.back(), rows, reference_.sizes.back(), random_.below(3));
      pass.y = saved.back().matrix;
    }
    std::vector<Placed<T>> more;
    more.reserve(reference_.grad_hidden.size());
    for (std::size_t l = 0; l < reference_.grad_hidden.size(); ++l) {
      more.emplace_back(
          reference_.grad_hidden[l], rows, reference_.sizes[l + 1], 0);
      pass.grad_hidden.push_back(more.back().matrix);
    }
    // The target of 1/2 sum (y - target)^2, whose gradient is grad.
    Numbers target = reference_.a.back();
    for (std::size_t n = 0; n < target.size(); ++n) {
      target[n] -= reference_.grad[n];
    }
    const bool is_transposed = !by_loss && random_.one_in(3);
    const Placed<T> grad(
        by_loss ? target : reference_.grad, rows, reference_.sizes.back(),
        by_loss ? 0 : random_.below(3), is_transposed);
    Array<T> loss(1);
    (by_loss ? pass.target : pass.grad_output) = grad.matrix;
    pass.loss_scale = 0.5;
    pass.loss = by_loss ? loss.data : nullptr;
    Array<T> grad_x(int64_t(reference_.x.size()));
    std::vector<Array<T>> weight_grads, bias_grads;
    pass.grad_x = needs.x() ? grad_x.data : nullptr;
    for (std::size_t l = 0; l < layers; ++l) {
      weight_grads.emplace_back(int64_t(reference_.grad_weights[l].size()));
      bias_grads.emplace_back(int64_t(reference_.grad_biases[l].size()));
      pass.grad_weights.push_back(
          needs.weight(l) ? weight_grads[l].data : nullptr);
      pass.grad_biases.push_back(needs.bias(l) ? bias_grads[l].data : nullptr);
    }
    with_layers([&]<typename L>() { walk_backward<L>(network, plan_, pass); });
    const char* const what = by_loss ? "grad by loss"
        : recompute                  ? "grad, recomputed"
                                     : "grad";
    if (needs.x()) {
      check(what, 999, grad_x.data, reference_.grad_x);
    }
    for (std::size_t l = 0; l < layers; ++l) {
      if (needs.weight(l)) {
        check(what, l, weight_grads[l].data, reference_.grad_weights[l]);
      }
      if (needs.bias(l)) {
        check(what, 100 + l, bias_grads[l].data, reference_.grad_biases[l]);
      }
    }
  }

  const ReferenceNetwork& reference_;
  Random& random_;
  const std::string name_;
  const bool is_exact_;
  std::vector<Placed<T>> x_, weights_, biases_;
  Network<T> network_;
  Plan plan_;
};

void run_cases(
    int64_t first,
    int64_t step,
    int64_t count,
    const std::string& set) {
  for (int64_t number = first; number < count; number += step) {
    Random random{std::mt19937_64(uint64_t(number))};
    const ReferenceNetwork reference = random_network(number, random);
    const std::string name = set + ", case " + std::to_string(number);
    Case<float>(reference, random, name + ", float").run();
    Case<double>(reference, random, name + ", double").run();
    Case<BFloat16>(reference, random, name + ", bfloat16").run();
    Case<Half>(reference, random, name + ", half").run();
  }
}

} // namespace
} // namespace relu_mlp::cpu

// The argument is the number of cases for each instruction set.
int main(int argc, char** argv) {
  using namespace relu_mlp::cpu;
  const int64_t count = argc > 1 ? std::atoll(argv[1]) : 250;
  for (const std::string& set : supported_instruction_sets()) {
    choose_instruction_set(set);
    // Two independent callers, each with its own threads.
    std::thread other([&] { run_cases(1, 2, count, set); });
    run_cases(0, 2, count, set);
    other.join();
    std::printf(
        "%s: %lld networks, each in 4 dtypes and 7 passes\n", set.c_str(),
        static_cast<long long>(count));
    std::fflush(stdout);
  }
}
