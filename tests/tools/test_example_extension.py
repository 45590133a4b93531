"""examples/extension builds and passes its own tests: in C++, in Python, and under another name."""

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

import relu_mlp

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "extension"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not EXAMPLE.exists(), reason="needs the sources"),
]
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")


def run(*command, cwd, **environment):
    """A command's output. If the command fails, the test shows it."""
    scripts = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={**os.environ, "PATH": scripts, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def copied(folder, name="squared_relu"):
    """A copy of the example with its name replaced, in contents and in paths."""
    for source in filter(Path.is_file, EXAMPLE.rglob("*")):
        if source.suffix == ".pyc":
            continue
        target = folder / str(source.relative_to(EXAMPLE)).replace("squared_relu", name)
        target.parent.mkdir(parents=True, exist_ok=True)
        text = source.read_text(encoding="utf-8").replace("squared_relu", name)
        target.write_text(text.replace("squared-relu", name.replace("_", "-")), encoding="utf-8")
    return folder


def installed(source, site):
    """Builds the wheel of a copy and unpacks it into `site`; the path of the wheel."""
    run(sys.executable, "setup.py", "--quiet", "bdist_wheel", cwd=source)
    (wheel,) = (source / "dist").glob("*.whl")
    zipfile.ZipFile(wheel).extractall(site)
    return wheel


def run_tests(source, site, *options):
    """Runs the tests of a copy with the package in `site`."""
    (source / "pytest.ini").write_text("[pytest]\n")
    paths = [str(site), str(Path(relu_mlp.__file__).parent.parent)]
    return run(
        *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests", *options),
        cwd=source,
        PYTHONPATH=os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]),
    )


@needs_compiler
def test_builds_a_wheel_that_passes_its_tests(tmp_path):
    source, site = copied(tmp_path / "source"), tmp_path / "site"
    wheel = installed(source, site)
    assert re.fullmatch(r"squared_relu-0\.1\.0-cp310-abi3-\w+\.whl", wheel.name)
    shutil.rmtree(source / "squared_relu")  # so that the installed package is tested
    assert "8 passed" in run_tests(source, site)

    tool = shutil.which("nm")
    if tool is not None:
        wanted = run(tool, "-D", "--undefined-only", site / "squared_relu/_C.abi3.so", cwd=tmp_path)
        # Only the C API of the stable ABI: no Python, and no C++ of ATen or c10.
        assert "aoti_torch_" in wanted and not re.findall(
            r" U (Py\w+|_ZNK?(?:2at|3c10)\w+)", wanted
        )


def test_passes_its_tests_in_python(tmp_path):
    source = copied(tmp_path / "source")
    assert not list(source.rglob("*.so"))
    assert "8 passed" in run_tests(source, source)


@needs_compiler
def test_is_installed_under_another_name(tmp_path):
    source, site = copied(tmp_path / "source", "my_operator"), tmp_path / "site"
    if subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True).returncode:
        pytest.skip("needs pip")
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation")
    run(*pip, "--no-index", "--no-deps", "--target", site, ".", cwd=source)
    assert (site / "my_operator" / "_C.abi3.so").exists()
    left = [p for p in source.rglob("*") if p.suffix in (".py", ".cpp", ".h", ".cu")]
    assert left and not any(
        "squared_relu" in p.read_text() or "squared_relu" in str(p) for p in left
    )
    shutil.rmtree(source / "my_operator")
    assert "6 passed" in run_tests(source, site, "-k", "test_operator")


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_the_cuda_kernel_compiles(tmp_path):
    said = run(
        *("nvcc", "-c", EXAMPLE / "csrc" / "squared_relu.cu", "-o", tmp_path / "cuda.o"),
        *("-O3", "-std=c++20", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-DUSE_CUDA"),
        f"-I{cpp_extension.include_paths()[0]}",
        *("-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90,code=sm_90"),
        *cpp_extension.COMMON_NVCC_FLAGS,  # as PyTorch compiles extensions
        "--resource-usage",
        cwd=tmp_path,
    )
    kernels = re.findall(r"Compiling entry function '\w*kernel\w*' for '(sm_\d+)'", said)
    assert sorted(kernels) == ["sm_80"] * 4 + ["sm_90"] * 4  # one kernel for each dtype
    assert set(re.findall(r"(\d+) bytes spill", said)) == {"0"}


def test_is_as_short_as_it_says():
    suffixes = {".py", ".cpp", ".h", ".cu"}
    lines = sum(
        len(path.read_text(encoding="utf-8").splitlines())
        for path in EXAMPLE.rglob("*")
        if path.suffix in suffixes
    )
    assert lines <= 150
    tests = len((EXAMPLE / "tests" / "test_squared_relu.py").read_text().splitlines())
    page = (ROOT / "docs" / "extension.md").read_text(encoding="utf-8")
    assert f"in {lines} lines" in (EXAMPLE / "README.md").read_text(encoding="utf-8")
    assert f"in {lines} lines" in page and f"in {tests} lines" in page


@pytest.mark.skipif(
    shutil.which("g++") is None or platform.machine() != "x86_64", reason="needs GCC on x86"
)
def test_the_text_for_two_instruction_sets_runs(tmp_path):
    page = (ROOT / "docs" / "extension.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"^```cpp\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "text.cpp").write_text(text)
    expected = str(sum(i % 10 * (i % 3) for i in range(1000)))
    run("g++", "-O2", "-Wall", "-Werror", "text.cpp", "-o", "text", cwd=tmp_path)
    assert run(tmp_path / "text", cwd=tmp_path).split() == [expected, expected]
    disassembly = run("objdump", "-d", "text", cwd=tmp_path) if shutil.which("objdump") else "%ymm"
    assert "%ymm" in disassembly  # the second copy is of another set


def test_the_traps_are_there():
    """The statements of docs/extension.md about PyTorch that its own code does not show."""

    def backward(ctx, grad):
        return grad * 2 * torch.relu(*ctx.saved_tensors)

    def save(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    def square(x):
        return torch.relu(x).square()

    operator = torch.library.custom_op(
        "teaching_traps::square", square, mutates_args=(), schema="(Tensor x) -> Tensor"
    )
    operator.register_fake(torch.empty_like)
    operator.register_autograd(backward, setup_context=save)
    x = torch.tensor([1.0, 2.0])
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.grad(lambda x: operator(x).sum())(x)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's own
        compiled = torch.compile(
            lambda x: torch.func.jvp(operator, (x,), (x,))[1], backend="aot_eager"
        )
        assert torch.equal(compiled(x), torch.zeros(2))

        function = type(
            "Square",
            (torch.autograd.Function,),
            {
                "forward": staticmethod(square),
                "setup_context": staticmethod(save),
                "backward": staticmethod(backward),
                "jvp": staticmethod(backward),
            },
        )
        with pytest.raises(torch._dynamo.exc.Unsupported, match="custom jvp"):
            torch.compile(lambda x: function.apply(x), fullgraph=True, backend="aot_eager")(
                x.requires_grad_()
            )
