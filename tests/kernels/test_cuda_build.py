"""How the build detects CUDA, and how the compiler's report is read."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
BUILD = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the sources")


def build(**environment):
    return subprocess.run(
        BUILD, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )


@pytest.mark.slow
@pytest.mark.skipif(torch.version.cuda is not None, reason="needs a PyTorch without CUDA")
def test_force_cuda_fails_and_says_why():
    said = build(FORCE_CUDA="1", RELU_MLP_EXTENSION="1")
    assert said.returncode != 0
    *_, configuration, reason = said.stderr.splitlines()
    assert configuration.startswith(f"relu_mlp: PyTorch {torch.__version__}, compiler ")
    assert reason == (
        "relu_mlp: FORCE_CUDA=1, but CUDA kernels cannot be built: this PyTorch has no CUDA"
    )


@pytest.mark.slow
def test_a_bad_value_of_force_cuda():
    said = build(FORCE_CUDA="yes", RELU_MLP_EXTENSION="1")
    assert said.returncode != 0
    assert said.stderr.splitlines()[-1] == "relu_mlp: FORCE_CUDA must be 0 or 1, got 'yes'"


@pytest.fixture
def why_not_cuda(tmp_path, monkeypatch):
    """why_not_cuda(release, error=None): what setup.py says with a PyTorch for CUDA 13.0.

    `tmp_path` is the toolkit. Its nvcc is of that release, and fails to compile with that error.
    """
    source = (ROOT / "setup.py").read_text(encoding="utf-8").split("\nos.chdir(")[0]
    names = {"__name__": "setup"}
    exec(compile(source, "setup.py", "exec"), names)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", str(tmp_path))
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()

    def ask(release, error=None):
        version = f"echo 'Cuda compilation tools, release {release}, V{release}.88'"
        other = f"echo 'probe.cu' >&2; echo '{error}' >&2; exit 1" if error else "exit 0"
        nvcc.write_text(f'#!/bin/sh\nif [ "$1" = --version ]; then {version}; else {other}; fi\n')
        nvcc.chmod(0o755)
        return names["why_not_cuda"]()

    return ask


def test_a_toolkit_without_headers(why_not_cuda, tmp_path):
    """nvcc in PATH is a wrapper. The build goes on for the CPU instead of failing."""
    assert why_not_cuda("13.0") == (
        f"{tmp_path} has no include/cuda_runtime.h; CUDA_HOME names the toolkit"
    )


def test_a_toolkit_that_fits(why_not_cuda, tmp_path):
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "cuda_runtime.h").touch()
    assert why_not_cuda("13.0") is None
    assert why_not_cuda("13.2") is None
    assert why_not_cuda("12.8") == (
        f"{tmp_path}/bin/nvcc is release 12.8, and PyTorch is built for CUDA 13.0"
    )
    refusal = "host_config.h:137:2: error: -- unsupported GNU version!"
    assert why_not_cuda("13.0", refusal) == f"{tmp_path}/bin/nvcc compiles nothing: {refusal}"


PTXAS = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z4onePf' for 'sm_90'
ptxas info    : Function properties for _Z4onePf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 1024 bytes smem
ptxas info    : Compile time = 9.0 ms
ptxas info    : Compiling entry function '_Z3twoPf' for 'sm_80'
ptxas info    : Function properties for _Z3twoPf
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers
"""


def test_the_report_of_ptxas_is_read(tmp_path, monkeypatch, capsys):
    path = ROOT / "tools" / "cuda_check.py"
    specification = importlib.util.spec_from_file_location("cuda_check", path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    kernels = module.resources(PTXAS)
    assert kernels == [("_Z4onePf", "sm_90", 40, 0, 0, 1024), ("_Z3twoPf", "sm_80", 255, 8, 16, 0)]
    monkeypatch.setattr(module, "OUT", tmp_path)
    assert module.report(kernels)
    assert not module.report(kernels[:1])
    assert "1 kernels, 0 of them spill" in capsys.readouterr().out
