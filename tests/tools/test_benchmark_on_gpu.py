"""benchmarks/on_gpu.py, tried on the CPU, because time on a GPU is too scarce for its mistakes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import relu_mlp

pandas = pytest.importorskip("pandas")
pytest.importorskip("matplotlib")

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "on_gpu.py"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PROGRAM.exists(), reason="needs the checkout"),
]


def test_what_it_writes(tmp_path):
    options = "--device cpu --dtype float32 --shape 8,4,6,2 --shape 1,3,2 --rounds 2 --out"
    package = str(Path(relu_mlp.__file__).parent.parent)
    path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, PROGRAM, *options.split(), tmp_path]
    subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=True)
    assert (tmp_path / "cuda.png").read_bytes().startswith(b"\x89PNG")
    table = pandas.read_csv(tmp_path / "cuda.csv")
    layers = {"eager", "eager again", "compile", "relu_mlp", "relu_mlp recompute"}
    for shape in ("8x4x6x2", "1x3x2"):
        cases = table[table["shape"] == shape].groupby("case")
        found = {case: set(rows["candidate"]) for case, rows in cases}
        assert found["training"] >= layers | {"products"}
        assert found["inference"] >= layers | {"products", "move"}
    assert (table["microseconds"] > 0).all() and (table["times_eager"] > 0).all()
    assert (table["low"] <= table["times_eager"]).all()
    assert (table["times_eager"] <= table["high"]).all()
    eager = table[table["candidate"] == "eager"]
    assert (eager[["times_eager", "low", "high"]] == 1).all(axis=None)
