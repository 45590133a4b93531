import fcntl
import itertools
import os
import shutil

import pytest
import torch

import support
from support.covering import covering

#: The device on which tests make their tensors. tools/on_gpu.sh sets it.
if "RELU_MLP_TEST_DEVICE" in os.environ:
    torch.set_default_device(os.environ["RELU_MLP_TEST_DEVICE"])


def pytest_addoption(parser):
    parser.addoption(
        "--strength",
        type=int,
        metavar="N",
        help="run each test in few cases that still contain all combinations of the values of any "
        "N parameters: 1 is the fast set, 99 means all cases (default: 3 for tests marked with "
        "`covering`, all cases for the others)",
    )


@pytest.hookimpl(trylast=True)  # after the selection by -k and -m
def pytest_collection_modifyitems(config, items):
    """Reduces the cases of each test to a covering array; see support/covering.py."""
    chosen = config.getoption("--strength")
    kept, left_out = [], []
    for _, cases in itertools.groupby(items, lambda item: item.nodeid.partition("[")[0]):
        cases = list(cases)
        mark = cases[0].get_closest_marker("covering")
        strength = chosen or (mark and mark.kwargs.get("strength", 3))
        positions = range(len(cases))
        if strength and hasattr(cases[0], "callspec"):
            positions = covering([levels_of(case) for case in cases], strength)
        kept += [cases[n] for n in positions]
        left_out += [cases[n] for n in sorted({*range(len(cases))} - {*positions})]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept


def levels_of(case):
    """The values of a test's parameters, in a form that can be compared."""
    parameters = sorted(case.callspec.params.items())
    return [(type(v), v if is_hashable(v) else repr(v)) for _, v in parameters]


def is_hashable(value):
    try:
        hash(value)
    except TypeError:
        return False
    return True


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


#: Every available backend in turn. The test runs under it.
backend = support.backend_fixture(support.WITH_NODE)


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """made_once(name, make): the path of a folder that make(path) has filled.

    The processes of one test run share it. A process waits while another one fills it.
    """
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def folder_of(name, make):
        folder, done = base / name, base / f"{name}.done"
        with (base / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)  # left by a process that failed
                folder.mkdir()
                make(folder)
                done.touch()
        return folder

    return folder_of


@pytest.fixture
def fresh_compiler():
    """Removes the graphs and guards of earlier tests before the test, and its own after it."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
