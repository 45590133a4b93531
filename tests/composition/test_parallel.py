"""Several processes on this machine, with `torchrun` and gloo, over the loopback device.

Starting processes takes most of the time. So each number of processes is started once, and runs the
cases of parallel_worker.py on every backend.
"""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import relu_mlp
from composition import parallel_worker

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


def launch(processes, program, *arguments, cwd):
    """Runs a program under torchrun, and returns its exit status and output.

    torchrun ends the others when one of its processes fails, and all of them when it is told to
    end. The worker ends itself after its limit.
    """
    package = str(Path(relu_mlp.__file__).parent.parent)
    path = os.pathsep.join(
        [package, str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    variables = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    variables["TMPDIR"] = str(cwd)  # torchrun leaves its logs there
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "--local-addr=127.0.0.1"]
    process = subprocess.Popen(
        [*command, str(program), *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    limit = parallel_worker.LIMIT + 30
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        process.terminate()
        output, _ = process.communicate(timeout=60)
        pytest.fail(f"took more than {limit} s:\n{output}")
    finally:
        process.kill()
    return process.returncode, output


def alone(steps, load=None, save=None):
    """Trains in this process, from the start or from a checkpoint; returns the losses."""
    net, _, x, target = parallel_worker.start()
    optimizer = parallel_worker.make_optimizer(net)
    with warnings.catch_warnings():
        # It warns that there is no process group, which is true.
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        if load:
            parallel_worker.load(load, net, optimizer)
        history = parallel_worker.train(net, optimizer, x, target, steps)
        if save:
            parallel_worker.save(save, net, optimizer)
    return [step["loss"] for step in history]


@pytest.mark.parametrize("processes", [2, 4])
def test_every_case(processes, tmp_path, monkeypatch):
    monkeypatch.setattr(parallel_worker, "folder", tmp_path)
    alone(parallel_worker.PART, save=parallel_worker.checkpoint("alone"))

    status, output = launch(processes, Path(parallel_worker.__file__), tmp_path, cwd=tmp_path)
    wanted = [f"{backend} {name}" for backend, name in parallel_worker.cases(processes)]
    for rank in range(processes):
        report = tmp_path / f"rank{rank}"
        passed = report.read_text(encoding="utf-8").splitlines() if report.exists() else []
        failed = [case for case in wanted if case not in passed][:1]
        assert not failed, f"process {rank} did not pass {failed[0]}:\n{output}"
    assert status == 0, output

    # This process alone continues the run that they saved last.
    losses = alone(2, load=parallel_worker.checkpoint("fsdp and units"))
    expected = parallel_worker.expected_history()[parallel_worker.STEPS :]
    assert losses == [step["loss"] for step in expected]


def test_example(tmp_path):
    """The same figures under torchrun as under python, which test_examples.py runs."""
    program = ROOT / "examples" / "distributed.py"
    status, output = launch(2, program, "--tensor-parallel=2", cwd=tmp_path)
    assert status == 0, output
    page = (ROOT / "docs" / "examples" / "distributed.md").read_text(encoding="utf-8")
    printed = [line for line in output.splitlines() if line.startswith("step")]
    assert len(printed) == 5, output
    for line in printed:
        assert line in page
