// Runs a network that Python has left behind, both as TorchScript and as an
// AOTInductor package, and prints what each computes. No Python in here: the
// operator comes from relu_mlp's library, which registers it when it is loaded.

#include <dlfcn.h>

#include <fstream>
#include <iomanip>
#include <iostream>
#include <iterator>

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/script.h>

// A tensor that torch.save has written.
torch::Tensor read_tensor(const char* path) {
  std::ifstream file(path, std::ios::binary);
  TORCH_CHECK(file, "cannot open ", path);
  const std::vector<char> bytes(std::istreambuf_iterator<char>(file), {});
  return torch::jit::pickle_load(bytes).toTensor();
}

// A row on a line, with as many digits as tell any two floats apart.
void print(const char* name, const torch::Tensor& y) {
  std::cout << name << ' ' << y.sizes() << '\n' << std::setprecision(9);
  for (const torch::Tensor& row : y.unbind()) {
    for (int64_t n = 0; n < row.numel(); ++n) {
      std::cout << row[n].item<float>() << (n + 1 < row.numel() ? ' ' : '\n');
    }
  }
}

int main(int argc, char** argv) try {
  TORCH_CHECK(
      argc == 5, "usage: ", argv[0], " LIBRARY TORCHSCRIPT PACKAGE INPUT");
  TORCH_CHECK(
      dlopen(argv[1], RTLD_NOW), "cannot load the operators: ", dlerror());
  c10::InferenceMode no_gradients;
  const torch::Tensor x = read_tensor(argv[4]);
  print("TorchScript", torch::jit::load(argv[2]).forward({x}).toTensor());
  print(
      "AOTInductor",
      torch::inductor::AOTIModelPackageLoader(argv[3]).run({x}).at(0));
} catch (const c10::Error& error) {
  std::cerr << error.what_without_backtrace() << '\n';
  return 1;
} catch (const std::exception& error) {
  std::cerr << error.what() << '\n';
  return 1;
}
