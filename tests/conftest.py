import fcntl
import itertools
import os
import shutil

import pytest
import torch

import relu_mlp
import support
from support.covering import covering

#: Where tests make their tensors; tools/on_gpu.sh sets it.
if "RELU_MLP_TEST_DEVICE" in os.environ:
    torch.set_default_device(os.environ["RELU_MLP_TEST_DEVICE"])


def pytest_addoption(parser):
    parser.addoption(
        "--strength",
        type=int,
        metavar="N",
        help="of every test, the fewest cases in which all combinations of the values of N "
        "parameters occur: 1 is the fast set, 99 all combinations. Unless told, 3 for tests "
        "marked with `covering`, and all for the others",
    )


@pytest.hookimpl(trylast=True)  # of what -k and -m have chosen
def pytest_collection_modifyitems(config, items):
    """Leaves a covering array of the cases of each test; see support/covering.py."""
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
    """The values of a test's parameters, as they are told apart."""
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


@pytest.fixture(params=support.BACKENDS)
def backend(request):
    """Every backend present in turn; the test runs under it."""
    with relu_mlp.backend(request.param):
        yield request.param


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """made_once(name, make): the path of a folder that make(path) has filled.

    The processes of one test run share it. Who comes while another fills it waits.
    """
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def folder_of(name, make):
        folder, done = base / name, base / f"{name}.done"
        with (base / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a process that failed
                folder.mkdir()
                make(folder)
                done.touch()
        return folder

    return folder_of


@pytest.fixture
def fresh_compiler():
    """Neither graphs nor guards of an earlier test, and none left for a later one."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
