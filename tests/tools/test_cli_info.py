"""`relu-mlp info`, and what all commands share."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import relu_mlp
from relu_mlp import cli, ops


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "relu_mlp", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_says_what_build_info_says(capsys):
    assert cli.main(["info"]) == 0
    assert capsys.readouterr().out.startswith(str(relu_mlp.build_info()))


@pytest.mark.slow
@pytest.mark.installation
@pytest.mark.skipif(ops.LIBRARY_PATH is None, reason="has instruction sets only with the library")
def test_advises_those_who_have_chosen_less():
    said = run("info", RELU_MLP_BACKEND="reference").stdout
    assert "Unset RELU_MLP_BACKEND" in said
    said = run("info", RELU_MLP_ISA="baseline").stdout
    best = relu_mlp.build_info().supported_instruction_sets[-1]
    assert best == "baseline" or f"this processor has {best}. Unset RELU_MLP_ISA" in said


def test_advises_those_who_have_no_extension():
    info = replace(relu_mlp.build_info(), problem="no compiler. Install one.", library=None)
    assert info.advice()[0] == "The extension is missing: no compiler. Install one."


def test_advises_those_who_have_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    info = replace(relu_mlp.build_info(), cuda_architectures=())
    assert any("no kernels for CUDA" in line for line in info.advice())
    info = replace(info, cuda_architectures=("sm_90",))
    assert not any("CUDA" in line for line in info.advice())


@pytest.mark.slow
@pytest.mark.installation
@pytest.mark.parametrize("name", ["RELU_MLP_BACKEND", "RELU_MLP_ISA"])
def test_a_bad_variable_is_one_line_and_status_2(name):
    if ops.LIBRARY_PATH is None and name == "RELU_MLP_ISA":
        return  # nothing reads it
    result = run("info", **{name: "nonsense"})
    assert result.returncode == 2 and not result.stdout
    assert result.stderr.startswith(f"relu-mlp info: error: {name} must be")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_has_an_example(name, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0
    assert f"example:\n  relu-mlp {name}" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["info", "--nonsense"]])
def test_a_usage_error_has_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert "usage: relu-mlp" in capsys.readouterr().err


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(cli.Problem, match=r"training needs pandas.*pip install 'relu-mlp\[cli\]'"):
        cli.needs("pandas", "cli", "training")


def test_a_broken_package_is_not_called_missing(monkeypatch, tmp_path):
    (tmp_path / "broken_package.py").write_text("import missing_dependency")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="missing_dependency"):
        cli.needs("broken_package", "cli", "training")
