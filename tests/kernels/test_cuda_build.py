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


def test_a_toolkit_without_headers(tmp_path, monkeypatch):
    """nvcc in PATH is a wrapper. The build goes on for the CPU instead of failing."""
    source = (ROOT / "setup.py").read_text(encoding="utf-8").split("\nos.chdir(")[0]
    names = {"__name__": "setup"}
    exec(compile(source, "setup.py", "exec"), names)
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.88'\n")
    nvcc.chmod(0o755)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", str(tmp_path))
    assert names["why_not_cuda"]() == (
        f"{tmp_path} has no include/cuda_runtime.h; CUDA_HOME names the toolkit"
    )
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "cuda_runtime.h").touch()
    assert names["why_not_cuda"]() is None


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
