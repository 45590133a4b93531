// The operators of TrainingStep (relu_mlp/training.py). A trainer knows the
// parameters and the optimizer's state, so that a call need not pass them: for a
// small network, passing them takes longer than the step.
#pragma once

#include <torch/csrc/stable/library.h>

#include <vector>

namespace relu_mlp::cpu {

void define_training(torch::stable::detail::StableLibrary& m);
void register_training(torch::stable::detail::StableLibrary& m); // for tensors
void register_delete_trainer(torch::stable::detail::StableLibrary& m);

// For direct.h.
void train_once(
    const std::vector<int64_t>& trainers,
    AtenTensorHandle x,
    AtenTensorHandle target,
    AtenTensorHandle losses,
    AtenTensorHandle order,
    const std::vector<double>& hyperparameters,
    double max_norm,
    int64_t batch);

} // namespace relu_mlp::cpu
