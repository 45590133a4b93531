// The sums of the parameters' gradients. Every chunk of rows has its own sums.
// They are added in the order of the chunks, so any number of threads gives the
// same bits.
#pragma once

#include <type_traits>
#include <vector>

#include "../parallel.h"
#include "buffer.h"
#include "convert.h"
#include "../network.h"
#include "plan.h"

namespace relu_mlp::cpu {

// Sum is the type of the sums of weight gradients; those of biases are double.
template <typename T, typename Sum>
class ChunkSums {
 public:
  // The pointers say where the results go, for every layer. A null pointer
  // means that a sum is not needed.
  ChunkSums(
      const Network<T>& network,
      const Plan& plan,
      const std::vector<T*>& grad_weights,
      const std::vector<T*>& grad_biases)
      : grad_weights_(grad_weights),
        grad_biases_(grad_biases),
        layers_(network.layers.size()),
        chunks_(plan.chunks),
        elements_per_task_(plan.tuning->elements_per_task),
        in_place_(chunks_ == 1 && std::is_same_v<T, Sum>),
        weight_at_(layers_ + 1),
        bias_at_(layers_ + 1) {
    for (std::size_t l = 0; l < layers_; ++l) {
      const int64_t out = network.width(l + 1), in = network.width(l);
      weight_at_[l + 1] =
          weight_at_[l] + (grad_weights[l] && !in_place_ ? out * in : 0);
      bias_at_[l + 1] = bias_at_[l] + (grad_biases[l] ? out : 0);
    }
    weights_ = Buffer<Sum>(chunks_ * weight_count());
    biases_.resize(chunks_ * bias_count());
  }

  // Where chunk c sums the gradients of every weight. A single chunk sums
  // directly into the results if these have type Sum.
  std::vector<Sum*> weights_of(int64_t c) const {
    std::vector<Sum*> sums(layers_);
    for (std::size_t l = 0; l < layers_; ++l) {
      sums[l] = weights_.get() + c * weight_count() + weight_at_[l];
      if constexpr (std::is_same_v<T, Sum>) {
        sums[l] = in_place_ ? grad_weights_[l] : sums[l];
      }
    }
    return sums;
  }
  // The same for every bias. These sums start at 0.
  std::vector<double*> biases_of(int64_t c) {
    std::vector<double*> sums(layers_);
    for (std::size_t l = 0; l < layers_; ++l) {
      sums[l] = biases_.data() + c * bias_count() + bias_at_[l];
    }
    return sums;
  }

  // Adds up the chunks and writes the results of the pass.
  void write_results() {
    for (std::size_t l = 0; l < layers_; ++l) {
      if (grad_weights_[l] && !in_place_) {
        add_chunks(
            grad_weights_[l], weights_.get() + weight_at_[l],
            weight_at_[l + 1] - weight_at_[l], weight_count());
      }
      if (grad_biases_[l]) {
        add_chunks(
            grad_biases_[l], biases_.data() + bias_at_[l],
            bias_at_[l + 1] - bias_at_[l], bias_count());
      }
    }
  }

 private:
  int64_t weight_count() const { // sums of one chunk
    return weight_at_[layers_];
  }
  int64_t bias_count() const {
    return bias_at_[layers_];
  }

  // total[i] = the sum over the chunks c of parts[c * step + i], in order, for
  // i < count. The first part is overwritten.
  template <typename S>
  void add_chunks(T* total, S* parts, int64_t count, int64_t step) const {
    parallel_for(
        count, std::max<int64_t>(1, elements_per_task_ / chunks_),
        [&](int64_t begin, int64_t end) {
          for (int64_t c = 1; c < chunks_; ++c) {
            for (int64_t i = begin; i < end; ++i) {
              parts[i] += parts[c * step + i];
            }
          }
          if constexpr (std::is_same_v<S, float> && is_16bit<T>) {
            round_to(total + begin, parts + begin, end - begin);
          } else {
            for (int64_t i = begin; i < end; ++i) {
              total[i] = T(compute_t<T>(parts[i]));
            }
          }
        });
  }

  const std::vector<T*>&grad_weights_, &grad_biases_;
  const std::size_t layers_;
  const int64_t chunks_, elements_per_task_;
  const bool in_place_;
  // The offsets of the sums of layer l within the sums of a chunk.
  std::vector<int64_t> weight_at_, bias_at_;
  Buffer<Sum> weights_;
  std::vector<double> biases_;
};

} // namespace relu_mlp::cpu
