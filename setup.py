"""The build, and nothing else: names and metadata are in pyproject.toml.

RELU_MLP_EXTENSION=1 makes the C++ extension a must, 0 leaves it out. Unset,
it is built where a C++ compiler is found; without one the package is
installed in pure Python and says so at its first use. A compiler that is
there and fails stops the build in every case but 0.
"""

import os
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

NO_TORCH = """\
relu_mlp: PyTorch cannot be imported by the Python that runs this build.
Install PyTorch first, then build against it:
    pip install --no-build-isolation .
(With build isolation pip hides the installed PyTorch from the build.)"""


def extension_arguments() -> dict:
    """The arguments of setup() that build relu_mlp/_C.abi3.so."""
    wanted = os.environ.get("RELU_MLP_EXTENSION", "auto")
    if wanted not in ("auto", "0", "1"):
        sys.exit(f"relu_mlp: RELU_MLP_EXTENSION must be 0 or 1, got {wanted!r}")
    # Only what compiles needs PyTorch: an sdist can be made without it.
    builds = {"build_ext", "build", "bdist_wheel", "editable_wheel", "install", "develop"}
    if wanted == "0" or not builds.intersection(sys.argv):
        return {}
    compiler = os.environ.get("CXX", "c++").split()[0]
    if wanted == "auto" and not any(map(shutil.which, (compiler, "g++", "clang++"))):
        print("relu_mlp: no C++ compiler found; building without the extension", file=sys.stderr)
        return {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        sys.exit(NO_TORCH)

    # ninja lies beside the Python that runs this, even in an environment that
    # is not activated.
    os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])

    extension = CppExtension(
        "relu_mlp._C",
        # Paths relative to this file, as setuptools wants them in an sdist.
        sorted(str(path) for path in Path("csrc").rglob("*.cpp")),
        depends=sorted(str(path) for path in Path("csrc").rglob("*.h")),
        extra_compile_args={
            "cxx": [
                "-O3",
                "-g0",  # Python's own flags may ask for debug information
                "-std=c++20",
                "-fvisibility=hidden",
                # The oldest PyTorch whose stable ABI the library asks for: one
                # binary serves it and every later one.
                "-DTORCH_TARGET_VERSION=0x020b000000000000",
            ]
        },
        py_limited_api=True,
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


os.chdir(Path(__file__).resolve().parent)
setup(**extension_arguments())
