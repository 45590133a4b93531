"""How setup.py handles the compilers, the user's flags and the folder that it finds."""

import platform
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools
import torch

from relu_mlp import ops

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the sources")

FLAGS = ("CC", "CXX", "LDSHARED", "CPPFLAGS", "CFLAGS", "CXXFLAGS", "LDFLAGS")


@pytest.fixture
def script(monkeypatch):
    """The functions of setup.py, which is told to build, but does not."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.setattr(sys, "argv", ["setup.py", "build_ext"])
    for name in (*FLAGS, "RELU_MLP_EXTENSION", "RELU_MLP_NODE"):
        monkeypatch.setenv(name, "")  # restores what the script changes
        monkeypatch.delenv(name)
    monkeypatch.setenv("FORCE_CUDA", "0")
    monkeypatch.setenv("RELU_MLP_EXTENSION", "0")
    monkeypatch.chdir(ROOT)
    functions = runpy.run_path("setup.py")
    monkeypatch.delenv("RELU_MLP_EXTENSION")
    return functions


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """Makes commands, and leaves only these on the path."""

    def make(*names):
        for name in names:
            (tmp_path / name).write_text("#!/bin/sh\n")
            (tmp_path / name).chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))

    make()
    return make


# -- The compiler ----------------------------------------------------------------


@pytest.mark.parametrize(
    "there, named, expected",
    [
        (["c++", "g++"], None, "c++"),
        (["g++", "clang++"], None, "g++"),
        (["clang++"], None, "clang++"),
        (["c++"], "", "c++"),
        (["c++"], "  ", "c++"),
        (["mine"], "mine", "mine"),
        (["mine"], " mine -pipe ", "mine -pipe"),
        (["ccache", "g++"], "ccache g++", "ccache g++"),
        (["ccache"], "ccache g++", None),
        (["c++", "g++"], "nonsense", None),
        ([], None, None),
        ([], "", None),
    ],
)
def test_finds_the_compiler(there, named, expected, script, commands, monkeypatch):
    commands(*there)
    if named is not None:
        monkeypatch.setenv("CXX", named)
    assert script["find_compiler"]() == expected
    if expected:  # PyTorch uses CXX, or c++ if it is not set
        assert script["os"].environ.get("CXX", "c++").split() == expected.split()


@pytest.mark.parametrize("named", [None, "", "nonsense"])
def test_goes_on_without_a_compiler(named, script, commands, monkeypatch, capsys):
    if named is not None:
        monkeypatch.setenv("CXX", named)
    assert script["extension_arguments"]() == {}
    (line,) = capsys.readouterr().err.splitlines()
    by_name = ": CXX is 'nonsense'" if named else ""
    assert line == f"relu_mlp: no C++ compiler found{by_name}; building without the extension"


@pytest.mark.parametrize("named", [None, "", "nonsense"])
def test_stops_without_a_compiler_if_one_is_required(named, script, commands, monkeypatch):
    if named is not None:
        monkeypatch.setenv("CXX", named)
    monkeypatch.setenv("RELU_MLP_EXTENSION", "1")
    with pytest.raises(SystemExit, match="RELU_MLP_EXTENSION=1, but no C\\+\\+ compiler found"):
        script["extension_arguments"]()


def test_works_without_a_path(script, monkeypatch):
    monkeypatch.delenv("PATH")
    if shutil.which("c++") is None:
        pytest.skip("no compiler where the system has its commands")
    assert script["extension_arguments"]()["ext_modules"]


# -- The native autograd node ----------------------------------------------------


def test_the_flags_of_the_node_are_those_of_the_extension(script):
    """It uses all of LibTorch, and so it has to leave out the version of the stable ABI."""
    if script["find_compiler"]() is None:
        pytest.skip("without a compiler nothing is built")
    (extension,) = script["extension_arguments"]()["ext_modules"]
    (node,) = script["node_arguments"]()["ext_modules"]
    extension_flags, node_flags = (e.extra_compile_args["cxx"] for e in (extension, node))
    assert set(extension_flags) - set(node_flags) == {"-DTORCH_TARGET_VERSION=0x020b000000000000"}
    assert "-fvisibility=hidden" in node_flags and set(script["SAFE"]) <= set(node_flags)
    assert set(extension.sources).isdisjoint(node.sources)


needs_package = pytest.mark.skipif(
    not (ROOT / "relu_mlp").exists(), reason="setup.py runs a file of the package"
)


@pytest.fixture
def no_luck(tmp_path, monkeypatch):
    """A compiler that says its version and compiles nothing."""
    says = "case $1 in -v | --version | -dump*) echo 12.2.0; exit 0;; esac"
    (tmp_path / "c++").write_text(f"#!/bin/sh\n{says}\necho 'fatal error: no luck'\nexit 1\n")
    (tmp_path / "c++").chmod(0o755)
    monkeypatch.setenv("CXX", str(tmp_path / "c++"))


@needs_package
@pytest.mark.slow
def test_a_failure_costs_only_the_node(script, no_luck, tmp_path, capsys):
    script["build_node"](tmp_path / "package")
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        "relu_mlp: the native autograd node can't be built: fatal error: no luck; "
        "the package works without it"
    )


@needs_package
@pytest.mark.slow
def test_a_failure_stops_the_build_if_the_node_is_required(
    script, no_luck, tmp_path, monkeypatch, capfd
):
    monkeypatch.setenv("RELU_MLP_NODE", "1")
    with pytest.raises(SystemExit, match=r"RELU_MLP_NODE=1, but .* setup.py ended with status 1"):
        script["build_node"](tmp_path / "package")
    assert "fatal error: no luck" in "".join(capfd.readouterr())


def test_stops_without_a_compiler_if_the_node_is_required(script, commands, monkeypatch):
    monkeypatch.setenv("RELU_MLP_NODE", "1")
    with pytest.raises(SystemExit, match="RELU_MLP_NODE=1, but no C\\+\\+ compiler found"):
        script["extension_arguments"]()


def test_a_wrong_value_stops_the_build(script, monkeypatch):
    monkeypatch.setenv("RELU_MLP_NODE", "yes")
    with pytest.raises(SystemExit, match="RELU_MLP_NODE must be 0 or 1, got 'yes'"):
        script["extension_arguments"]()


@needs_package
def test_a_node_that_is_there_is_kept_and_others_are_removed(script, tmp_path, monkeypatch):
    monkeypatch.setenv("RELU_MLP_NODE", "1")
    functions = script["node_build"]()
    path = tmp_path / functions["file_name"]()
    path.write_bytes(functions["END"])
    (tmp_path / path.name.replace(torch.__version__, "2.99.0")).touch()
    script["build_node"](tmp_path)
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == functions["END"]


@needs_package
def test_the_node_is_left_out_by_request(script, tmp_path, monkeypatch):
    """Also if it was built before."""
    monkeypatch.setenv("RELU_MLP_NODE", "0")
    functions = script["node_build"]()
    (tmp_path / functions["file_name"]()).write_bytes(functions["END"])
    script["build_node"](tmp_path)
    assert list(tmp_path.iterdir()) == []


# -- A person's flags ------------------------------------------------------------


@pytest.mark.parametrize("variable", FLAGS)
@pytest.mark.parametrize(
    "flag",
    [
        "-Ofast",
        "-ffast-math",
        "-funsafe-math-optimizations",
        "-ffinite-math-only",
        "-fno-honor-nans",
        "-fno-signed-zeros",
        "-fassociative-math",
        "-freciprocal-math",
        "-mdaz-ftz",
        "-fdenormal-fp-math=preserve-sign",
    ],
)
def test_leaves_out_what_breaks_numbers(variable, flag, script, monkeypatch, capsys):
    monkeypatch.setenv(variable, f"-first  {flag} -DNAME='a b' {flag}")
    script["leave_out_unsafe_flags"]()
    assert script["os"].environ[variable] == "-first -DNAME='a b'"
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"relu_mlp: {variable}: without {flag} {flag}, which breaks NaN")


def test_leaves_out_what_chooses_instructions(script, monkeypatch, capsys):
    monkeypatch.setattr(script["platform"], "machine", lambda: "x86_64")
    monkeypatch.setenv("CXXFLAGS", "-O2 -march=native -mavx2 -mno-avx512f -m64 -mtune=native")
    script["leave_out_unsafe_flags"]()
    assert script["os"].environ["CXXFLAGS"] == "-O2 -m64 -mtune=native"
    assert "without -march=native -mavx2 -mno-avx512f; the library" in capsys.readouterr().err
    monkeypatch.setattr(script["platform"], "machine", lambda: "aarch64")
    monkeypatch.setenv("CXXFLAGS", "-march=armv8.2-a")
    script["leave_out_unsafe_flags"]()
    assert script["os"].environ["CXXFLAGS"] == "-march=armv8.2-a"


def test_leaves_other_flags_as_they_are(script, monkeypatch, capsys):
    flags = "-O2   -DNAME='a  b' -fno-trapping-math -fno-fast-math -ffp-contract=off"
    for variable in FLAGS:
        monkeypatch.setenv(variable, flags)
    script["leave_out_unsafe_flags"]()
    assert {script["os"].environ[variable] for variable in FLAGS} == {flags}
    assert not capsys.readouterr().err


@pytest.mark.skipif(shutil.which("c++") is None, reason="asks a compiler")
@pytest.mark.parametrize("unsafe", ["-ffast-math", "-Ofast", "-ffinite-math-only"])
def test_what_comes_from_elsewhere_is_overridden(unsafe, script):
    """Python's own flags come before those of the extension."""
    command = ["c++", unsafe, *script["FLAGS"], *script["SAFE"], "-dM", "-E", "-xc++", "/dev/null"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "__FAST_MATH__" not in said and "__FINITE_MATH_ONLY__ 1" not in said


# -- A compiler that fails on an instruction set --------------------------------


class FakeBuild:
    """PyTorch's build_ext, whose compiler fails on the files in `failing`."""

    failing = ()
    build_temp = "build"
    compiler = property(lambda self: self)

    def compile(self, sources, **_):
        if any(Path(source).stem in self.failing for source in sources):
            raise RuntimeError("Error compiling objects for extension")

    def build_extension(self, extension):
        self.compile(extension.sources)
        self.built = [Path(source).stem for source in extension.sources]


def build_where(failing, script, monkeypatch):
    monkeypatch.setattr("torch.utils.cpp_extension.BuildExtension", FakeBuild)
    arguments = script["extension_arguments"]()
    (extension,) = arguments["ext_modules"]
    build = arguments["cmdclass"]["build_ext"]()
    build.failing = failing
    build.build_extension(extension)
    return build.built


@pytest.mark.skipif(shutil.which("c++") is None, reason="without a compiler nothing is built")
def test_a_failing_instruction_set_is_left_out(script, monkeypatch, capsys):
    everything = build_where([], script, monkeypatch)
    assert {"avx2", "avx512", "avx512_bf16", "amx", "baseline", "operators"} <= {*everything}
    capsys.readouterr()
    built = build_where(["avx512_bf16", "amx"], script, monkeypatch)
    assert {*everything} - {*built} == {"avx512_bf16", "amx"}
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "without" in line]
    assert line == (
        "relu_mlp: instruction sets: without amx and avx512_bf16, for which the compiler fails"
    )


@pytest.mark.skipif(shutil.which("c++") is None, reason="without a compiler nothing is built")
@pytest.mark.parametrize("failing", [["baseline"], ["operators", "amx"], ["isa"]])
def test_any_other_failure_stops_the_build(failing, script, monkeypatch):
    with pytest.raises(RuntimeError, match="Error compiling"):
        build_where(failing, script, monkeypatch)


MAIN = """
#include <cstdio>
#include "csrc/cpu/isa/isa.h"
int main() {
  for (const auto& name : relu_mlp::cpu::compiled_instruction_sets()) {
    std::puts(name.c_str());
  }
}
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a compiler")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the sets are those of x86")
@pytest.mark.parametrize("sets", [[], ["avx2"], ["avx2", "amx"], ["avx512", "amx"]])
def test_a_library_without_some_instruction_sets(sets, tmp_path):
    """Their files hold tables of kernels, here empty ones."""
    source = MAIN + "namespace relu_mlp::cpu {\n"
    for name in ["baseline", *sets]:
        if name == "amx":
            source += "extern const Bf16Kernels amx_kernels{};\n"
        else:
            source += f'extern const InstructionSet {name}_set{{"{name}"}};\n'
    (tmp_path / "main.cpp").write_text(source + "}\n")
    command = ["c++", "-std=c++20", "-fPIC", f"-I{ROOT}", "-o", tmp_path / "main"]
    command += [tmp_path / "main.cpp", ROOT / "csrc/cpu/isa/isa.cpp", ROOT / "csrc/cpu/tuning.cpp"]
    subprocess.run(command, check=True)
    said = subprocess.run([tmp_path / "main"], capture_output=True, text=True, check=True)
    with_avx512 = sets if "avx512" in sets else [name for name in sets if name != "amx"]
    assert said.stdout.split() == ["baseline", *with_avx512]


# -- The folder ------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("c++") is None, reason="without a compiler nothing is built")
def test_the_library_names_no_folder_of_its_builder(script):
    """Otherwise two builds of the same sources would differ."""
    (extension,) = script["extension_arguments"]()["ext_modules"]
    flags = extension.extra_compile_args["cxx"]
    assert f"-ffile-prefix-map={ROOT.resolve()}/=" in flags
    if ops.LIBRARY_PATH is not None:
        data = ops.LIBRARY_PATH.read_bytes()
        assert re.findall(rb"\0(/[^\0]*\.(?:h|hpp|cuh|cpp|cu))\0", data) == []
