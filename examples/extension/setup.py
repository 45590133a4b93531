from setuptools import setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
from torch.version import cuda

# The oldest PyTorch that the binary serves is 2.11. USE_CUDA declares CUDA's part of the C API.
FLAGS = ["-O3", "-std=c++20", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-DUSE_CUDA"]
builds_cuda = cuda is not None and CUDA_HOME is not None
extension = (CUDAExtension if builds_cuda else CppExtension)(
    "squared_relu._C",
    ["csrc/squared_relu.cpp"] + ["csrc/squared_relu.cu"] * builds_cuda,
    depends=["csrc/squared_relu.h"],
    extra_compile_args={"cxx": FLAGS, "nvcc": FLAGS},
    py_limited_api=True,  # _C.abi3.so: one binary for every CPython from 3.10 on
)
about = {"name": "squared-relu", "version": "0.1.0", "packages": ["squared_relu"]}
needs = {"python_requires": ">=3.10", "install_requires": ["torch>=2.11"]}
options = {"bdist_wheel": {"py_limited_api": "cp310"}}
commands = {"build_ext": BuildExtension}
setup(**about, **needs, ext_modules=[extension], cmdclass=commands, options=options)
