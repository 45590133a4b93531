"""Makes what is published, in dist/: an sdist, and from it a wheel. This is `make wheel`.

The wheel serves every PyTorch from 2.11 on, every CPython from 3.10 on, and every Linux that has
the symbols it needs: auditwheel gives it the oldest manylinux tag that they allow. It has no CUDA
kernels and no native autograd node, which would bind it to one PyTorch. Two builds of the same
commit are equal in every byte; --twice checks that.

libtorch and libc10 are PyTorch's, and stay outside. So do libstdc++ and libgcc, for these reasons:
exceptions pass from this library through PyTorch's, which is sound only with one C++ runtime in the
process; and the symbols needed of libstdc++ are older than those that PyTorch's own wheels need.
"""

from __future__ import annotations

import argparse
import gzip
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"

#: In bytes, without CUDA.
LARGEST = 1_000_000

SETTINGS = {"RELU_MLP_EXTENSION": "1", "RELU_MLP_NODE": "0", "FORCE_CUDA": "0"}


def run(*command: str | Path, **environment: str) -> str:
    """Runs a module of this Python, and returns what it prints. Exits if it fails."""
    scripts = str(Path(sys.executable).parent)  # auditwheel calls patchelf
    path = os.pathsep.join([scripts, os.environ.get("PATH", os.defpath)])
    result = subprocess.run(
        [sys.executable, "-m", *map(str, command)],
        cwd=ROOT,
        env={**os.environ, "PATH": path, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if result.returncode:
        sys.exit(f"{result.stdout}\nThis failed: {' '.join(map(str, command))}")
    return result.stdout


def date_of_sources() -> int:
    """The date that every file of the archives gets: that of the last commit."""
    if "SOURCE_DATE_EPOCH" in os.environ:
        return int(os.environ["SOURCE_DATE_EPOCH"])
    git = ["git", "log", "-1", "--format=%ct"]
    said = subprocess.run(git, cwd=ROOT, capture_output=True, text=True)
    first_of_zip = 315532800  # 1980; a zip file has no earlier date
    return int(said.stdout) if said.returncode == 0 else first_of_zip


def without_builder(sdist: Path, date: int) -> None:
    """Replaces dates and owners in an sdist, which setuptools takes from the disk."""

    def plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.mtime, member.uid, member.gid, member.uname, member.gname = date, 0, 0, "", ""
        member.mode = 0o755 if member.mode & 0o100 else 0o644
        return member

    with tempfile.TemporaryDirectory() as folder:
        shutil.unpack_archive(sdist, folder)
        (top,) = Path(folder).iterdir()
        with (
            sdist.open("wb") as file,
            gzip.GzipFile("", "wb", fileobj=file, mtime=date) as compressed,
            tarfile.open(fileobj=compressed, mode="w", format=tarfile.PAX_FORMAT) as archive,
        ):
            for path in [top, *sorted(top.rglob("*"))]:
                archive.add(path, path.relative_to(folder), recursive=False, filter=plain)


def make(folder: Path) -> list[Path]:
    """Makes the sdist and the wheel in a folder, and returns their paths."""
    date = date_of_sources()
    settings = {**SETTINGS, "SOURCE_DATE_EPOCH": str(date)}
    with tempfile.TemporaryDirectory() as raw:
        print("Building ...", flush=True)
        run("build", "--no-isolation", "--outdir", raw, **settings)
        (wheel,) = Path(raw).glob("*.whl")
        (sdist,) = Path(raw).glob("*.tar.gz")
        without_builder(sdist, date)
        excluded = [part for name in ("libtorch*", "libc10*") for part in ("--exclude", name)]
        run("auditwheel", "repair", "--strip", *excluded, "--wheel-dir", folder, wheel, **settings)
        (repaired,) = folder.glob("*.whl")
        return [repaired, Path(shutil.copy(sdist, folder))]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    arguments.add_argument("--twice", action="store_true", help="build twice and compare")
    twice = arguments.parse_args().twice
    shutil.rmtree(DIST, ignore_errors=True)
    DIST.mkdir()
    wheel, sdist = make(DIST)
    if "manylinux" not in wheel.name:
        sys.exit(f"auditwheel found no manylinux tag: {wheel.name}")
    if wheel.stat().st_size > LARGEST:
        sys.exit(f"{wheel.name} has {wheel.stat().st_size} bytes, more than {LARGEST}")
    print(run("abi3audit", "--strict", "--summary", wheel), end="")
    print(run("twine", "check", "--strict", wheel, sdist), end="")
    if twice:
        with tempfile.TemporaryDirectory() as folder:
            for first, second in zip((wheel, sdist), make(Path(folder)), strict=True):
                if first.read_bytes() != second.read_bytes():
                    sys.exit(f"two builds of {first.name} differ")
        print("Two builds are equal.")
    for path in (sdist, wheel):
        print(f"{path.relative_to(ROOT)}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
