"""The native autograd node: how it is named, built, found and reported.

What is compiled here is a node of a few lines, without a header of PyTorch.
"""

import os
import shutil
import subprocess
import sys
import types
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import relu_mlp
from relu_mlp import cli, ops
from relu_mlp.ops import native_node, node_build

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.skipif(ops.LIBRARY_PATH is None, reason="the node calls the library"),
    pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the sources"),
]

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="compiles")

#: It has every function that the package may call: one that returns its last argument if that can
#: be called, and None otherwise.
NODE = """\
#include <Python.h>
static PyObject* function(PyObject*, PyObject* arguments) {
  const Py_ssize_t count = PyTuple_GET_SIZE(arguments);
  PyObject* last = count ? PyTuple_GET_ITEM(arguments, count - 1) : Py_None;
  return Py_NewRef(PyCallable_Check(last) ? last : Py_None);
}
static PyMethodDef any = {"any", function, METH_VARARGS, nullptr};
static PyObject* get(PyObject*, PyObject*) { return PyCFunction_New(&any, nullptr); }
static PyMethodDef methods[] = {{"__getattr__", get, METH_O, nullptr}, {}};
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_node", nullptr, -1, methods};
PyMODINIT_FUNC PyInit__node() { return PyModule_Create(&definition); }
"""


def make_source(folder):
    """The sources of a small node."""
    (folder / "csrc/autograd").mkdir(parents=True)
    shutil.copy(ROOT / "setup.py", folder)
    (folder / "csrc/mlp.h").write_text("// a header\n")
    (folder / "csrc/autograd/module.cpp").write_text(NODE)


@pytest.fixture
def source(tmp_path, monkeypatch):
    """The sources of a small node, which was not built yet."""
    make_source(tmp_path / "source")
    monkeypatch.setattr(node_build, "SOURCE", tmp_path / "source")
    monkeypatch.setattr(node_build, "PACKAGE", tmp_path / "package")
    monkeypatch.setattr(native_node.process, "node", None)
    monkeypatch.setattr(ops, "node", None)
    monkeypatch.setenv("RELU_MLP_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("RELU_MLP_NODE", raising=False)
    return tmp_path / "source"


@pytest.fixture
def built(source, made_once):
    """The small node, compiled once, in no folder that is searched."""

    def make(folder):
        node_build.build(folder)

    return made_once("small_node", make) / node_build.file_name()


@pytest.fixture
def cached(built):
    """The small node in the cache."""
    node_build.cache_folder().mkdir()
    return Path(shutil.copy(built, node_build.cache_folder()))


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def not_built_for(version):
    python = ".".join(map(str, sys.version_info[:3]))
    return f"it was not built for PyTorch {version} and Python {python}. Run `relu-mlp build`."


# -- The name --------------------------------------------------------------------


def test_the_name_changes_with_all_that_matters(source, monkeypatch):
    names = [node_build.file_name()]
    assert names[0].startswith(f"_node-{torch.__version__}-")
    assert names[0].endswith(node_build.EXTENSION_SUFFIXES[0])
    for thing, attribute, value in (
        (torch, "__version__", "2.99.0"),
        (torch.version, "git_version", "abc"),
        (node_build, "EXTENSION_SUFFIXES", [".cpython-399.so"]),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(thing, attribute, value)
            names.append(node_build.file_name())
    (source / "csrc/autograd/new.h").touch()
    names.append(node_build.file_name())
    for path in ("setup.py", "csrc/mlp.h", "csrc/autograd/module.cpp"):
        text = (source / path).read_bytes()
        (source / path).write_bytes(text[:-1] + b" ")  # of the same length
        names.append(node_build.file_name())
    (source / "csrc/mlp.h").rename(source / "csrc/renamed.h")
    names.append(node_build.file_name())
    assert len(set(names)) == len(names) == 9


def test_the_name_does_not_depend_on_the_folder(source, tmp_path, monkeypatch):
    name = node_build.file_name()
    make_source(tmp_path / "elsewhere")
    monkeypatch.setattr(node_build, "SOURCE", tmp_path / "elsewhere")
    assert node_build.file_name() == name


@pytest.mark.installation
def test_the_sources_are_installed():
    installed = {path.relative_to(node_build.SOURCE) for path in node_build.sources()}
    in_checkout = {
        path.relative_to(ROOT) for pattern in node_build.PATTERNS for path in ROOT.glob(pattern)
    }
    assert installed == in_checkout
    assert any(path.suffix == ".cpp" for path in installed)
    for path in installed:
        assert (node_build.SOURCE / path).read_bytes() == (ROOT / path).read_bytes(), path


# -- Loading ---------------------------------------------------------------------


@needs_compiler
@pytest.mark.slow
def test_loads_the_node_that_matches(cached):
    node, problem = native_node.load_node()
    assert problem is None
    assert node.__file__ == str(cached)


@needs_compiler
@pytest.mark.slow
def test_does_not_load_the_node_of_another_version(cached, source, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "2.99.0")
        assert native_node.load_node() == (None, not_built_for("2.99.0"))
    (source / "csrc/mlp.h").write_text("// another header\n")
    assert native_node.load_node() == (None, not_built_for(torch.__version__))


@needs_compiler
@pytest.mark.slow
def test_the_package_comes_before_the_cache(cached, monkeypatch):
    node_build.PACKAGE.mkdir()
    copy = Path(shutil.copy(cached, node_build.PACKAGE))
    assert native_node.load_node()[0].__file__ == str(copy)
    monkeypatch.setattr(native_node.process, "node", None)
    copy.unlink()  # it is mapped, so it must not be cut off
    copy.touch()
    assert native_node.load_node()[0].__file__ == str(cached)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("size", [0, 1, len(node_build.END), 5000, -len(node_build.END), -1])
def test_does_not_map_a_file_that_was_cut_off(size, cached, monkeypatch):
    monkeypatch.setattr(native_node, "_import", None)
    cached.write_bytes(cached.read_bytes()[:size])
    problem = f"{cached} is damaged or can't be read. Run `relu-mlp build`."
    assert native_node.load_node() == (None, problem)


def test_a_folder_or_a_broken_link_in_its_place(source):
    path = node_build.cache_folder() / node_build.file_name()
    path.mkdir(parents=True)
    assert "is damaged or can't be read" in native_node.load_node()[1]
    path.rmdir()
    path.symlink_to("nowhere")
    assert native_node.load_node() == (None, not_built_for(torch.__version__))


@pytest.mark.parametrize("start", [b"", b"\x7fELF\x02\x01", bytes(range(256)) * 40])
def test_a_file_that_is_no_library(start, source):
    path = node_build.cache_folder() / node_build.file_name()
    path.parent.mkdir()
    path.write_bytes(start + node_build.END)
    node, problem = native_node.load_node()
    assert node is None and "\n" not in problem
    assert problem.startswith(f"{path} could not be loaded: ")
    assert problem.endswith("Run `relu-mlp build`.")


def test_a_node_that_does_not_fit_the_extension(source, monkeypatch):
    path = node_build.cache_folder() / node_build.file_name()
    path.parent.mkdir()
    path.write_bytes(node_build.END)
    module = types.SimpleNamespace(connect=lambda path: f"it does not fit {path}")
    monkeypatch.setattr(native_node, "_import", lambda path: module)
    problem = f"it does not fit {ops.LIBRARY_PATH}. Run `relu-mlp build`."
    assert native_node.load_node() == (None, problem)


@needs_compiler
@pytest.mark.slow
def test_is_not_loaded_by_request(cached, monkeypatch):
    monkeypatch.setenv("RELU_MLP_NODE", "0")
    assert native_node.load_node() == (None, "RELU_MLP_NODE is 0. Unset it.")


@needs_compiler
@pytest.mark.slow
def test_a_later_import_takes_the_node_of_the_first(cached, source):
    node, _ = native_node.load_node()
    cached.unlink()
    assert native_node.load_node() == (node, None)
    (source / "csrc/mlp.h").write_text("// of another version\n")
    again, problem = native_node.load_node()
    assert again is None and "the node of another version of relu_mlp" in problem


def test_without_sources(source, monkeypatch, capsys):
    name = node_build.file_name()
    (source / "csrc/.#mlp.h").symlink_to("the lock of an editor")
    assert node_build.file_name() == name

    problem = f"its sources can't be read in {source}. Install relu_mlp again."
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", lambda _: os.stat("/nowhere"))
        assert native_node.load_node() == (None, problem)
    shutil.rmtree(source)
    assert native_node.load_node() == (None, problem)
    assert f"the sources of the native autograd node are not in {source}" in failure(capsys)


def test_without_the_extension(source, monkeypatch, capsys):
    monkeypatch.setattr(native_node, "LIBRARY_PATH", None)
    assert native_node.load_node() == (None, "it calls the extension, which is missing.")
    monkeypatch.setattr(ops, "LIBRARY_PATH", None)
    assert "the node calls the extension, which is missing: " in failure(capsys)


# -- Building --------------------------------------------------------------------


def failure(capsys, *arguments):
    """The line that `relu-mlp build` prints when it fails."""
    assert cli.main(["build", *arguments]) == 2
    printed = capsys.readouterr()
    assert not printed.out
    (line,) = printed.err.splitlines()
    assert line.startswith("relu-mlp build: error: ")
    return line


@needs_compiler
@pytest.mark.slow
def test_two_builds_at_once(built):
    """Both write the same bytes as a third one, which was made in another folder."""
    cache = node_build.cache_folder()
    with ThreadPoolExecutor() as pool:
        paths = list(pool.map(node_build.build, [cache] * 2))
    assert [*cache.iterdir()] * 2 == paths
    assert paths[0].name == built.name
    assert paths[0].read_bytes() == built.read_bytes()
    assert native_node.load_node()[1] is None


@needs_compiler
@pytest.mark.slow
def test_is_not_built_twice(cached, monkeypatch, capsys):
    monkeypatch.setattr(ops, "node", native_node.load_node()[0])
    monkeypatch.setattr(node_build, "build", None)
    assert cli.main(["build"]) == 0
    printed = capsys.readouterr().out
    assert printed == f"already built: {cached} (--force builds it again)\n"


@needs_compiler
@pytest.mark.slow
def test_a_compilation_that_fails(source, capsys):
    (source / "csrc/autograd/module.cpp").write_text("#error no luck\n")
    assert failure(capsys).endswith(
        "the native autograd node can't be built: "
        "csrc/autograd/module.cpp:1:2: error: #error no luck"
    )
    assert list(node_build.cache_folder().iterdir()) == []


def test_a_node_that_does_not_load(source, capsys, monkeypatch):
    monkeypatch.setattr(node_build, "_compile", lambda *_: source / "setup.py")
    line = failure(capsys)
    assert "the node was built, but " in line and " could not be loaded: " in line


@pytest.mark.slow
@pytest.mark.parametrize("named", ["nonsense", None])
def test_without_a_compiler(named, source, capsys, tmp_path, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    if named:
        monkeypatch.setenv("CXX", named)
    which = ": CXX is 'nonsense'" if named else ""
    line = f"can't be built: no C++ compiler found{which}. Install g++ or clang++."
    assert failure(capsys).endswith(line)


def test_without_setuptools(source, capsys, monkeypatch):
    monkeypatch.setattr(node_build, "find_spec", lambda name: None)
    line = "can't be built without setuptools: pip install setuptools ninja"
    assert failure(capsys).endswith(line)


def test_a_cache_that_cannot_be_written_to(source, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(node_build, "_compile", None)  # the error comes before
    (tmp_path / "file").write_text("")
    # /proc is read-only for root too.
    for folder in (tmp_path / "file", tmp_path / "file/below", "/proc", "/proc/relu_mlp"):
        monkeypatch.setenv("RELU_MLP_CACHE", str(folder))
        assert native_node.load_node() == (None, not_built_for(torch.__version__))
        assert str(folder) in failure(capsys)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("step", ["_compile", "os.fsync"])
def test_a_build_that_is_interrupted_leaves_nothing(step, error, source, tmp_path, monkeypatch):
    def interrupted(*_):
        """While the node is compiled or written, nothing is found."""
        assert native_node.load_node() == (None, not_built_for(torch.__version__))
        raise error

    monkeypatch.setattr(node_build, "_compile", lambda *_: source / "setup.py")
    monkeypatch.setattr(f"{node_build.__name__}.{step}", interrupted)
    with pytest.raises(error):
        node_build.build(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("variables", [
    {"RELU_MLP_CACHE": "/a", "XDG_CACHE_HOME": "/b", "HOME": "/c"},
    {"RELU_MLP_CACHE": "", "XDG_CACHE_HOME": "/b", "HOME": "/c"},
    {"RELU_MLP_CACHE": "", "XDG_CACHE_HOME": "", "HOME": "/c"},
])  # fmt: skip
def test_the_folder_of_the_cache(variables, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    expected = {0: "/a", 1: "/b/relu_mlp", 2: "/c/.cache/relu_mlp"}
    assert str(node_build.cache_folder()) == expected[list(variables.values()).count("")]


# -- A wheel ---------------------------------------------------------------------


@needs_compiler
@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / "relu_mlp").exists(), reason="needs the whole checkout")
def test_a_wheel_can_build_the_node(tmp_path, monkeypatch):
    """The wheel is made without the extension, which takes minutes; it gets a built one."""
    checkout, site = tmp_path / "checkout", tmp_path / "site"
    checkout.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, checkout)
    for name in ("csrc", "relu_mlp"):
        ignored = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / name, checkout / name, ignore=ignored)
    monkeypatch.chdir(checkout)
    done = run("setup.py", "--quiet", "bdist_wheel", RELU_MLP_EXTENSION="0")
    assert done.returncode == 0, done.stderr
    (wheel,) = checkout.glob("dist/*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    source = site / "relu_mlp/_source"
    found = {path.relative_to(source) for path in source.rglob("*") if path.is_file()}
    assert found == {
        path.relative_to(ROOT) for pattern in node_build.PATTERNS for path in ROOT.glob(pattern)
    }

    shutil.copy(ops.LIBRARY_PATH, site / "relu_mlp")
    shutil.rmtree(source / "csrc/autograd")
    (source / "csrc/autograd").mkdir()
    (source / "csrc/autograd/module.cpp").write_text(NODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(site))
    monkeypatch.setenv("RELU_MLP_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("RELU_MLP_NODE", raising=False)
    done = run("-m", "relu_mlp", "build")
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "cache").iterdir()
    assert done.stdout.startswith(f"built for PyTorch {torch.__version__} and Python ")
    assert done.stdout.endswith(f" s: {path}\n")
    script = """
        import sys, relu_mlp
        from relu_mlp import ops
        first, path = ops.node, relu_mlp.build_info().node
        for name in [name for name in sys.modules if name.split(".")[0] == "relu_mlp"]:
            del sys.modules[name]
        import relu_mlp
        from relu_mlp import ops
        assert ops.node is first and relu_mlp.build_info().node_problem is None
        print(relu_mlp.build_info().node)
    """
    done = run("-c", "\n".join(map(str.strip, script.splitlines())).replace("\ndel", "\n    del"))
    assert (done.stdout, done.stderr) == (f"{path}\n", "")


# -- The report ------------------------------------------------------------------


def test_the_report_says_whether_it_runs():
    info = relu_mlp.build_info()
    assert (info.node is None) == (info.node_problem is not None) == (ops.node is None)
    assert info.node_problem == ops.NODE_PROBLEM
    lines = replace(info, node=None, node_problem="nobody built it. Build it.").advice()
    assert "The native autograd node is not loaded: nobody built it. Build it." in lines
    assert not any("node" in line for line in replace(info, node="a", node_problem=None).advice())


@pytest.mark.slow
@pytest.mark.installation
def test_info_says_that_it_is_left_out_by_request():
    done = run("-m", "relu_mlp", "info", RELU_MLP_NODE="0")
    line = "The native autograd node is not loaded: RELU_MLP_NODE is 0. Unset it."
    assert line in done.stdout.splitlines()
