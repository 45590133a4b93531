"""Without Python: an AOTInductor package, and the C++ program in examples/cpp.

The tests follow the page there to the letter: its Python writes the files, and its commands build
and run the program.
"""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import relu_mlp
import support
from relu_mlp import ReluMLP, ops

EXAMPLE = Path(__file__).parents[2] / "examples" / "cpp"
COMPILER = os.environ.get("CXX", "c++").split()[0]

# PyTorch says this about its own code.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.installation,
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning"),
    pytest.mark.skipif(ops.LIBRARY_PATH is None, reason="is about the library"),
    pytest.mark.skipif(not EXAMPLE.exists(), reason="the examples are not beside the tests"),
    pytest.mark.skipif(not shutil.which(COMPILER), reason="needs a C++ compiler"),
]


def blocks(language):
    page = (EXAMPLE / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder in which the page's Python has run."""
    from torch._inductor import config, cpu_vec_isa  # takes seconds

    folder = tmp_path_factory.mktemp("cpp")
    (code,) = blocks("python")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder / "inductor"))
        # Inductor tries each instruction set of the processor with a compiler, but there is
        # nothing to vectorize here. The code need not be fast, but it should compile fast.
        patch.setattr(cpu_vec_isa, "valid_vec_isa_list", list)
        quick = {"precompile_headers": False, "compile_wrapper_opt_level": "O0"}
        with config.patch({f"aot_inductor.{name}": value for name, value in quick.items()}):
            exec(compile(code, str(EXAMPLE / "README.md"), "exec"), {})
    return folder


@pytest.fixture(scope="module")
def net(folder):
    """The network of the page."""
    torch.manual_seed(0)
    return ReluMLP(16, [32, 24], 10, output_activation="tanh")


@pytest.fixture(scope="module")
def program(folder):
    """The path of the program."""
    (folder / "examples").mkdir()
    (folder / "examples" / "cpp").symlink_to(EXAMPLE, target_is_directory=True)
    run_block(folder, blocks("sh")[0])
    return folder / "build" / "cpp" / "run_mlp"


def run_block(folder, commands):
    """Runs a page's commands with the current Python, and returns their output."""
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": str(Path(relu_mlp.__file__).parent.parent),
        "CMAKE_GENERATOR": "Ninja",
    }
    run = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def test_package_in_python(folder, net):
    package = torch._inductor.aoti_load_package(str(folder / "mlp.pt2"))
    with torch.no_grad():
        for rows in (5, 1, 0, 300):
            x = torch.randn(rows, 16)
            with support.count_calls() as calls:
                y = package(x)
            support.assert_same(y, net(x))
            assert calls["native"] == 0


def test_package_calls_the_operator(folder):
    """It calls the operator, and has no product of its own."""
    with zipfile.ZipFile(folder / "mlp.pt2") as package:
        (wrapper,) = (n for n in package.namelist() if n.endswith(".wrapper.cpp"))
        code = package.read(wrapper).decode()
    assert "torch.ops.relu_mlp._relu_mlp_in_cpp.default" in code  # it runs no Python
    assert not re.search(r"aoti_torch_cpu_(add)?mm", code)


def table(text):
    """The program's output: a name, a shape, and rows of numbers, for each form."""
    tables = {}
    for line in text.splitlines():
        if line[0].isalpha():
            name, shape = line.split(" ", 1)
            rows = tables[name, shape] = []
        else:
            rows.append([float(number) for number in line.split()])
    return tables


def test_program_prints_what_python_computes(program, folder, net):
    expected = net(torch.load(folder / "x.pt")).detach()
    printed = table(run_block(folder, blocks("sh")[1]))
    assert list(printed) == [("TorchScript", "[3, 10]"), ("AOTInductor", "[3, 10]")]
    for rows in printed.values():
        support.assert_same(torch.tensor(rows), expected)


@pytest.mark.parametrize("rows", [1, 0, 7])
def test_other_batch_sizes(rows, program, folder, net):
    x = torch.randn(rows, 16)
    torch.save(x, folder / "other.pt")
    arguments = [ops.LIBRARY_PATH, "mlp.pt", "mlp.pt2", "other.pt"]
    run = subprocess.run([program, *arguments], capture_output=True, text=True, cwd=folder)
    assert run.returncode == 0, run.stderr
    for values in table(run.stdout).values():
        support.assert_same(torch.tensor(values).reshape(rows, 10), net(x).detach())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "usage: "),
        (["none.so", "mlp.pt", "mlp.pt2", "x.pt"], "cannot load the operators: none.so"),
        (["libm.so.6", "mlp.pt", "mlp.pt2", "x.pt"], "Unknown builtin op: relu_mlp::relu_mlp"),
        (["LIBRARY", "none.pt", "mlp.pt2", "x.pt"], "none.pt"),
        (["LIBRARY", "mlp.pt", "none.pt2", "x.pt"], "open"),
        (["LIBRARY", "mlp.pt", "mlp.pt2", "none.pt"], "cannot open none.pt"),
        (["LIBRARY", "mlp.pt", "mlp.pt2", "wrong.pt"], "weights[0] must have shape"),
    ],
    ids=["usage", "no library", "another library", "no script", "no package", "no x", "wrong x"],
)
def test_program_says_what_is_wrong(arguments, message, program, folder):
    torch.save(torch.randn(3, 17), folder / "wrong.pt")
    arguments = [ops.LIBRARY_PATH if a == "LIBRARY" else a for a in arguments]
    run = subprocess.run([program, *arguments], capture_output=True, text=True, cwd=folder)
    assert run.returncode == 1
    assert message in run.stderr
    assert "frame #" not in run.stderr
