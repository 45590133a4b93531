"""The build. Names and metadata are in pyproject.toml.

RELU_MLP_EXTENSION=1 requires the C++ extension, and 0 leaves it out. If the variable is not set,
the extension is built if a C++ compiler is found. Without a compiler the package is installed in
pure Python, and says so at its first use. A compiler that fails stops the build, unless the
variable is 0.

With the extension comes the native autograd node (csrc/autograd), for the PyTorch and the Python
of the build alone. If it does not compile, the build says so and goes on, unless RELU_MLP_NODE is
1. If the variable is 0, the node is left out. `relu-mlp build` runs a copy of this file with
RELU_MLP_NODE=only.

The extension includes CUDA kernels if PyTorch has CUDA and an nvcc of the same major version is
found. FORCE_CUDA=1 requires them, and 0 leaves them out. TORCH_CUDA_ARCH_LIST names the
architectures. If it is not set, they are those of the installed GPUs, or DEFAULT_ARCHITECTURES
without a GPU. MAX_JOBS limits the number of compilers that run at once.

The flags in CFLAGS, CXXFLAGS and the like are respected, except for those that make the library
compute wrong numbers. Two builds of the same sources are identical, whatever their directories.
"""

from __future__ import annotations

import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

NO_TORCH = """\
relu_mlp: PyTorch cannot be imported by the Python that runs this build.
Install PyTorch first, then build against it:
    pip install --no-build-isolation .
(With build isolation pip hides the installed PyTorch from the build.)"""


DEFAULT_ARCHITECTURES = "8.0;9.0+PTX"

#: Flags for every C++ compiler, including nvcc.
FLAGS = [
    "-O3",
    "-std=c++20",
    # The oldest PyTorch whose stable ABI the library needs. One binary serves it and all later
    # versions.
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
]

#: The variables from which setuptools, PyTorch and nvcc take the user's flags.
FLAG_VARIABLES = ("CC", "CXX", "LDSHARED", "CPPFLAGS", "CFLAGS", "CXXFLAGS", "LDFLAGS")
NVCC_VARIABLES = ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")

#: Flags that break NaN, infinity, -0 or subnormal numbers. Some of them link code that flushes
#: subnormals to 0 in the whole process, so the linker must not see them either.
UNSAFE = re.compile(
    r"-Ofast|-ffast-math|-funsafe-math-optimizations|-ffinite-math-only|-fassociative-math"
    r"|-freciprocal-math|-fno-signed-zeros|-fno-honor-(nans|infinities)"
    r"|-fapprox-func|-fcx-limited-range|-fdenormal-fp-math(-f32)?=.*|-mdaz-ftz"
    r"|-ffp-model=(fast|aggressive)|-fp-model[= ]?fast.*|-?-use_fast_math|-?-ftz=true"
    r"|-?-prec-(div|sqrt)=false"
)

#: Flags that choose the instructions of an x86 processor. The library chooses them at run time, and
#: its baseline has to run on every processor.
INSTRUCTIONS = re.compile(r"-march=.*|-m(no-)?(sse|ssse|avx|amx|fma|f16c|bmi|gfni|vaes)[\w.-]*")

#: Flags that undo unsafe ones, which may also come from CXX or from Python's own flags. The last
#: flag on the command line counts.
SAFE = [
    "-fno-fast-math",
    "-fno-unsafe-math-optimizations",
    "-fno-finite-math-only",
    "-fno-associative-math",
    "-fno-reciprocal-math",
    "-fsigned-zeros",
]


#: Warnings that are always mistakes: a switch over an enumeration that leaves out a case, and a
#: function that ends without returning its value.
MISTAKES = ["-Werror=switch", "-Werror=return-type"]


def say(line: str) -> None:
    print(f"relu_mlp: {line}", file=sys.stderr)


def why_not_cuda() -> str | None:
    """The reason not to compile for CUDA, or None."""
    import torch
    from torch.utils import cpp_extension

    if torch.version.cuda is None:
        return "this PyTorch has no CUDA"
    if cpp_extension.CUDA_HOME is None:
        return "no nvcc was found; CUDA_HOME names the toolkit"
    nvcc = Path(cpp_extension.CUDA_HOME, "bin", "nvcc")
    try:
        said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"nvcc does not run: {error}"
    # nvcc in PATH may be a wrapper or a link outside of the toolkit.
    if not Path(cpp_extension.CUDA_HOME, "include", "cuda_runtime.h").exists():
        return (
            f"{cpp_extension.CUDA_HOME} has no include/cuda_runtime.h; CUDA_HOME names the toolkit"
        )
    release = re.search(r"release (\d+)\.\d+", said.stdout)
    if release is None or release[1] != torch.version.cuda.split(".")[0]:
        found = release[0] if release else "an unknown release"
        return f"{nvcc} is {found}, and PyTorch is built for CUDA {torch.version.cuda}"
    return why_nvcc_fails(nvcc)


def why_nvcc_fails(nvcc: Path) -> str | None:
    """The reason why nvcc can't make a library, or None.

    It may lack its own files, or refuse the C++ compiler.
    """
    flags = [*FLAGS, "-shared", "-Xcompiler=-fPIC"]
    if os.environ.get("CC"):  # as PyTorch passes it on
        flags += ["-ccbin", os.environ["CC"]]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cu")
        source.write_text("#include <cuda_runtime.h>\n__global__ void probe() {}\n")
        tried = subprocess.run(
            [nvcc, *flags, source.name, "-o", "probe.so"],
            cwd=folder,
            capture_output=True,
            text=True,
        )
    if tried.returncode == 0:
        return None
    lines = (tried.stderr + tried.stdout).splitlines() or [f"status {tried.returncode}"]
    error = next((line for line in lines if "error" in line.lower()), lines[0])
    return f"{nvcc} compiles nothing: {error}"


def builds_cuda() -> bool:
    """Whether to compile for CUDA. Prints the answer, and exits if CUDA is required but missing."""
    forced = os.environ.get("FORCE_CUDA", "auto")
    if forced not in ("auto", "0", "1"):
        sys.exit(f"relu_mlp: FORCE_CUDA must be 0 or 1, got {forced!r}")
    reason = "FORCE_CUDA=0" if forced == "0" else why_not_cuda()
    if reason is not None and forced == "1":
        sys.exit(f"relu_mlp: FORCE_CUDA=1, but CUDA kernels cannot be built: {reason}")
    if reason is not None:
        say(f"CUDA: no ({reason})")
    return reason is None


def cuda_architectures() -> list[str]:
    """The architectures by nvcc's names: sm_80, ..., and compute_90 for PTX."""
    import torch
    from torch.utils import cpp_extension

    if not torch.cuda.is_available():
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHITECTURES)
    flags = " ".join(cpp_extension._get_cuda_arch_flags())
    return re.findall(r",code=(\w+)", flags)


def cuda_extension(sources: list[str], flags: list[str], **arguments):
    from torch.utils.cpp_extension import CUDA_HOME, CUDAExtension
    from torch.version import cuda

    names = cuda_architectures()
    say(f"CUDA: {cuda}, toolkit {CUDA_HOME}, for {' '.join(names)}")
    defines = ["-DRELU_MLP_WITH_CUDA", f"-DRELU_MLP_CUDA_ARCHITECTURES={'+'.join(names)}"]
    extension = CUDAExtension(
        "relu_mlp._C",
        sources
        + [str(path) for path in sorted(Path("csrc/cuda").rglob("*.c*")) if is_source(path)],
        extra_compile_args={
            "cxx": flags + defines,
            "nvcc": [
                *FLAGS,
                *(f"-Xcompiler={flag}" for flag in without_builders_paths() + MISTAKES),
            ],
        },
        # libtorch.so loads libtorch_cuda.so where that exists. Its symbols are weak here, and the
        # CUDA runtime is linked in. So the library also loads with a PyTorch without CUDA.
        extra_link_args=["-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed", "-lrt", "-ldl"],
        **arguments,
    )
    absent = {"torch_cuda", "c10_cuda", "cudart"}
    extension.libraries = [name for name in extension.libraries if name not in absent]
    extension.libraries.append("cudart_static")
    return extension


def is_source(path: Path) -> bool:
    return path.suffix in (".cpp", ".cu") and path.name != "plan.cpp"


def find_compiler() -> str | None:
    """The command of the C++ compiler: CXX if it is set, else the first one found, or None."""
    named = os.environ.get("CXX", "").split()
    if named:
        found = all(map(shutil.which, named[: 2 if is_launcher(named) else 1]))
        return " ".join(named) if found else None
    os.environ.pop("CXX", None)  # a blank value would be used as a command
    command = next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if command not in (None, "c++"):
        os.environ["CXX"] = command
    return command


def no_compiler() -> str:
    """Says that `find_compiler` has found none."""
    named = os.environ.get("CXX", "").strip()
    return f"no C++ compiler found{f': CXX is {named!r}' if named else ''}"


def is_launcher(command: list[str]) -> bool:
    """Whether the first word runs the compiler that the second one names."""
    return len(command) > 1 and Path(command[0]).name in ("ccache", "sccache", "distcc", "icecc")


def leave_out_unsafe_flags() -> None:
    """Removes the user's flags that would make the library compute wrong numbers, and says so."""
    is_x86 = platform.machine().lower() in ("x86_64", "amd64", "i686")
    for variable in (*FLAG_VARIABLES, *NVCC_VARIABLES):
        flags = os.environ.get(variable, "").split()
        kept = [flag for flag in flags if not UNSAFE.fullmatch(flag)]
        unsafe = [flag for flag in flags if UNSAFE.fullmatch(flag)]
        if unsafe:
            say(f"{variable}: without {' '.join(unsafe)}, which breaks NaN or subnormal numbers")
        if is_x86 and variable in FLAG_VARIABLES:
            chosen = [flag for flag in kept if INSTRUCTIONS.fullmatch(flag)]
            kept = [flag for flag in kept if flag not in chosen]
            if chosen:
                say(
                    f"{variable}: without {' '.join(chosen)}; the library has kernels for each "
                    "instruction set, and chooses when it runs"
                )
        if len(kept) < len(flags):
            os.environ[variable] = " ".join(kept)


def without_builders_paths() -> list[str]:
    """Flags that make builds of the same sources identical, whatever their directories.

    Code that makes an error message contains the path of its file, also in PyTorch's headers.
    """
    from torch.utils.cpp_extension import include_paths

    roots = [f"{os.getcwd()}/", *(f"{path}/" for path in include_paths())]
    return [f"-ffile-prefix-map={root}=" for root in roots]


def prepare_environment() -> None:
    """Adds what the build needs to the environment, and leaves out what breaks it."""
    # ninja is in the same folder as the running Python, even in an environment that is not
    # activated.
    path = os.environ.get("PATH", os.defpath)
    os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), path])
    leave_out_unsafe_flags()


def node_arguments() -> dict:
    """The arguments of setup() that build the native autograd node and nothing else."""
    if find_compiler() is None:
        sys.exit(f"{no_compiler()}. Install g++ or clang++.")
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    prepare_environment()
    # The node uses all of LibTorch, and not its stable ABI.
    flags = [flag for flag in FLAGS if not flag.startswith("-DTORCH_TARGET_VERSION")]
    flags += [*SAFE, *MISTAKES, "-g0", "-fvisibility=hidden", *without_builders_paths()]
    sources = sorted(map(str, Path("csrc/autograd").glob("*.cpp")))
    include = str(Path("csrc/autograd/include").resolve())  # ninja runs in another folder
    node = CppExtension(
        "relu_mlp._node", sources, include_dirs=[include], extra_compile_args={"cxx": flags}
    )
    return {"ext_modules": [node], "cmdclass": {"build_ext": BuildExtension}}


def node_build() -> dict:
    """The functions of relu_mlp/ops/node_build.py, without importing the package."""
    return runpy.run_path("relu_mlp/ops/node_build.py")


def build_node(folder: Path) -> None:
    """Builds the native autograd node unless it is there, and removes all others."""
    wanted, functions = os.environ.get("RELU_MLP_NODE", "auto"), node_build()
    name = str(functions["file_name"]())
    for old in folder.glob("_node-*"):
        if wanted == "0" or old.name != name:
            old.unlink()
    if wanted == "0" or functions["is_complete"](folder / name):
        return
    try:
        functions["build"](folder, show=wanted == "1")
    except (functions["NotBuilt"], OSError) as error:
        if wanted == "1":
            sys.exit(f"relu_mlp: RELU_MLP_NODE=1, but {error}")
        say(f"{error}; the package works without it")


def with_node(build_ext: type) -> type:
    """The command build_ext that builds the native autograd node after the extension."""

    class BuildWithNode(build_ext):
        def run(self):
            super().run()
            build_node(Path("relu_mlp" if self.inplace else f"{self.build_lib}/relu_mlp"))

    return BuildWithNode


class BuildPy(build_py):
    """Puts the sources of the node into a wheel, for `relu-mlp build`."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            node_build()["copy_sources"](Path(self.build_lib, "relu_mlp", "_source"))


#: The files of isa/ without which there is no library. Each of the others is an instruction set,
#: and csrc/cpu/isa/isa.cpp does without those that are not linked.
INDISPENSABLE = {"isa.cpp", "baseline.cpp"}


def without_failing_sets(build_ext: type) -> type:
    """The command, which leaves out an instruction set for which the compiler fails."""
    from setuptools.errors import CCompilerError

    class WithoutFailingSets(build_ext):
        def build_extension(self, extension):
            try:
                super().build_extension(extension)
            except (CCompilerError, RuntimeError):  # ninja's failure is a RuntimeError
                sets = {
                    source
                    for source in map(Path, extension.sources)
                    if source.parent.name == "isa" and source.name not in INDISPENSABLE
                }
                failing = {source for source in sets if not self.compiles(extension, source)}
                if failing in (set(), sets):
                    raise  # something else is wrong
                names = " and ".join(sorted(source.stem for source in failing))
                say(f"instruction sets: without {names}, for which the compiler fails")
                extension.sources = [
                    source for source in extension.sources if Path(source) not in failing
                ]
                super().build_extension(extension)

        def compiles(self, extension, source):
            try:
                self.compiler.compile(
                    [str(source)],
                    output_dir=self.build_temp,
                    include_dirs=extension.include_dirs,
                    extra_postargs=extension.extra_compile_args,
                    depends=extension.depends,
                )
            except (CCompilerError, RuntimeError):
                return False
            return True

    return WithoutFailingSets


def extension_arguments() -> dict:
    """The arguments of setup() that build relu_mlp/_C.abi3.so."""
    wanted = os.environ.get("RELU_MLP_EXTENSION", "auto")
    if wanted not in ("auto", "0", "1"):
        sys.exit(f"relu_mlp: RELU_MLP_EXTENSION must be 0 or 1, got {wanted!r}")
    node = os.environ.get("RELU_MLP_NODE", "auto")
    if node == "only":
        return node_arguments()
    if node not in ("auto", "0", "1"):
        sys.exit(f"relu_mlp: RELU_MLP_NODE must be 0 or 1, got {node!r}")
    # Only commands that compile need PyTorch. An sdist can be made without it.
    builds = {"build_ext", "build", "bdist_wheel", "editable_wheel", "install", "develop"}
    if wanted == "0" or not builds.intersection(sys.argv):
        return {}
    compiler = find_compiler()
    if compiler is None:
        reason = no_compiler()
        for name, value in (("RELU_MLP_EXTENSION", wanted), ("RELU_MLP_NODE", node)):
            if value == "1":
                sys.exit(f"relu_mlp: {name}=1, but {reason}. Install g++ or clang++.")
        say(f"{reason}; building without the extension")
        return {}
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        sys.exit(NO_TORCH)

    prepare_environment()

    # Paths are relative to this file, as setuptools requires for an sdist. Every build contains the
    # plans for CUDA.
    sources = [*Path("csrc").glob("*.cpp"), *Path("csrc/cpu").rglob("*.cpp"), "csrc/cuda/plan.cpp"]
    arguments = {
        "sources": sorted(map(str, sources)),
        "depends": sorted(str(path) for path in Path("csrc").rglob("*.*h")),
        "py_limited_api": True,
    }
    # Python's own flags may request debug information, hence -g0.
    flags = [*FLAGS, *SAFE, *MISTAKES, "-g0", "-fvisibility=hidden", *without_builders_paths()]
    say(f"PyTorch {torch.__version__}, compiler {compiler}, MAX_JOBS {os.environ.get('MAX_JOBS')}")
    if builds_cuda():
        extension = cuda_extension(flags=flags, **arguments)
    else:
        extension = CppExtension("relu_mlp._C", extra_compile_args={"cxx": flags}, **arguments)
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": with_node(without_failing_sets(BuildExtension))},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


os.chdir(Path(__file__).resolve().parent)
arguments = extension_arguments()
arguments.setdefault("cmdclass", {})["build_py"] = BuildPy
setup(**arguments)
