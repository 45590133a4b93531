"""benchmarks/clients.py without the libraries that it measures."""

import importlib.util
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
from torch import nn

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "clients.py"

pytestmark = pytest.mark.skipif(not PROGRAM.exists(), reason="needs the checkout")


@pytest.fixture
def clients(monkeypatch):
    """The program as a module, where no library is installed."""
    spec = importlib.util.spec_from_file_location("clients", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "clients", module)
    spec.loader.exec_module(module)

    def version(package):
        raise PackageNotFoundError(package)

    monkeypatch.setattr(module, "version", version)
    return module


def test_help(clients, capsys):
    with pytest.raises(SystemExit) as stop:
        clients.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("--only", "--rounds", "--out", *clients.CLIENTS))


def test_missing_libraries(clients, capsys, tmp_path):
    clients.main([])
    _, *rows = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows] == list(clients.CLIENTS)
    assert all(row.endswith("not installed") for row in rows)
    clients.main(["--only", "td3"])
    _, row = capsys.readouterr().out.splitlines()
    assert row.split()[:2] == ["td3", "torchrl"]
    path = tmp_path / "clients.json"
    with pytest.raises(SystemExit, match=f"nothing was measured, so {path} was not written"):
        clients.main(["--out", str(path)])
    assert not path.exists()


@pytest.mark.slow  # starting the profiler
def test_measure(clients, monkeypatch):
    """Measures small programs, correct and wrong."""

    def client(factor=lambda model: 1.0, activation=nn.ReLU):
        def make(patch):
            net = nn.Sequential(nn.Linear(3, 4), activation(), nn.Linear(4, 2))
            patch(net)

            def train():
                losses = []
                for _ in range(5):
                    loss = factor(net) * net(torch.randn(6, 3)).square().mean()
                    loss.backward()
                    losses.append(loss.item())
                return losses

            return train

        return clients.Client("package", make)

    monkeypatch.setitem(clients.CLIENTS, "right", client())
    result = clients.measure("right", "package 1", 3)
    assert (result.client, result.package) == ("right", "package 1")
    assert (result.linears, result.fused_linears) == (10, 10)
    assert 0 < result.ratio_low <= result.ratio <= result.ratio_high

    wrong = client(factor=lambda model: 1 + 1e-3 * (type(model) is not nn.Sequential))
    monkeypatch.setitem(clients.CLIENTS, "wrong", wrong)
    with pytest.raises(RuntimeError, match="the losses differ"):
        clients.measure("wrong", "package 1", 1)

    monkeypatch.setitem(clients.CLIENTS, "plain", client(activation=nn.GELU))
    with pytest.raises(RuntimeError, match="plain: nothing ran fused"):
        clients.measure("plain", "package 1", 1)
