"""Names and builds the library of the native autograd node, csrc/autograd.

The node uses LibTorch's C++ API, which changes from one release to the next. So a file serves
exactly the PyTorch and the Python for which it was compiled, and its name says which: a file for
others, or from other sources, has another name and is not found.

setup.py runs this file by its path, so it imports nothing of the package.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import find_spec
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]

#: The folder with setup.py and csrc: a copy in a wheel, else the checkout.
SOURCE = PACKAGE / "_source" if (PACKAGE / "_source").exists() else PACKAGE.parent

#: What the node is compiled from. It is compiled in a copy of these files, so it can include no
#: others.
PATTERNS = (
    "setup.py",
    "csrc/*.h",
    "csrc/autograd/*.h",
    "csrc/autograd/*.cpp",
    "csrc/autograd/include/*/*.hpp",
)

#: The end of every complete file. A loader that maps a file which was cut off may crash.
END = b"\nrelu_mlp: the file is complete\n"


class NotBuilt(Exception):
    """The reason why the node was not built, in one line."""


def sources() -> list[Path]:
    """What the node is compiled from; empty if there are no sources."""
    matches = (path for pattern in PATTERNS for path in SOURCE.glob(pattern))
    found = sorted(path for path in matches if path.is_file())  # and no link of an editor's lock
    return found if any(path.suffix == ".cpp" for path in found) else []


def file_name() -> str | None:
    """The name of the library for this PyTorch, this Python and these sources, if there are any."""
    import torch  # here, for a wheel with the sources can be made without PyTorch

    digest = hashlib.sha256(str(torch.version.git_version).encode())
    found = sources()
    for path in found:
        data = path.read_bytes()
        digest.update(f"\0{path.name} {len(data)}\0".encode())
        digest.update(data)
    if not found:
        return None
    return f"_node-{torch.__version__}-{digest.hexdigest()[:16]}{EXTENSION_SUFFIXES[0]}"


def cache_folder() -> Path:
    """Where `relu-mlp build` puts the node."""
    if folder := os.environ.get("RELU_MLP_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "relu_mlp")


def is_complete(path: Path) -> bool:
    """Whether a file exists and was written to its end."""
    try:
        with path.open("rb") as file:
            file.seek(-len(END), os.SEEK_END)
            return file.read() == END
    except OSError:  # also if the file is shorter than that
        return False


def copy_sources(folder: Path) -> None:
    """Fills a folder with the sources and nothing else."""
    shutil.rmtree(folder, ignore_errors=True)
    for path in sources():
        target = folder / path.relative_to(SOURCE)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


def build(folder: Path, show: bool = False) -> Path:
    """Compiles the node for the running PyTorch and Python, and returns the path of the library.

    Args:
        folder: where the library is put. It appears there when it is complete.
        show: whether the output of the compiler is shown.

    Raises:
        NotBuilt: if it can't be compiled.
        OSError: if a folder can't be written to.
    """
    name = file_name()
    if name is None:
        raise NotBuilt(f"the sources of the native autograd node are not in {SOURCE}")
    if find_spec("setuptools") is None:
        raise NotBuilt(
            "the native autograd node can't be built without setuptools: "
            "pip install setuptools ninja"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with (
        # Made first: a folder that can't be written to is an error before the compilation.
        tempfile.TemporaryDirectory(dir=folder, prefix=".") as beside,
        tempfile.TemporaryDirectory(prefix="relu_mlp-") as workspace,
    ):
        partial = Path(beside, name)
        shutil.copyfile(_compile(Path(workspace), show), partial)
        with partial.open("ab") as file:
            file.write(END)
            file.flush()
            os.fsync(file.fileno())
        return partial.replace(folder / name)


def _compile(workspace: Path, show: bool) -> Path:
    copy_sources(workspace / "source")
    command = [sys.executable, "setup.py", "--quiet", "build_ext"]
    command += ["--build-lib", str(workspace / "lib"), "--build-temp", str(workspace / "objects")]
    done = subprocess.run(
        command,
        cwd=workspace / "source",
        env={**os.environ, "RELU_MLP_NODE": "only"},
        stdout=None if show else subprocess.PIPE,
        stderr=None if show else subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    if done.returncode:
        output = done.stdout or f"setup.py ended with status {done.returncode}"
        lines = output.replace(f"{workspace}/source/", "").strip().splitlines()
        reason = next((line for line in lines if "error:" in line.lower()), lines[-1])
        raise NotBuilt(f"the native autograd node can't be built: {reason}")
    return next((workspace / "lib").rglob("_node*"))
