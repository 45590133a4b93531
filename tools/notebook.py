"""Runs examples/backpropagation.ipynb and writes its outputs into it: `python tools/notebook.py`.

It needs the packages of the notebook's test (nbclient, ipykernel, matplotlib) and Pillow, which
reduces the pictures to 96 colors, so that the file stays small. Machine-dependent data (times,
paths) is not written.
"""

from __future__ import annotations

import base64
import io
import os
import tempfile
from pathlib import Path

import jupyter_client
import nbclient
import nbformat
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "examples" / "backpropagation.ipynb"
COLORS = 96


def small(picture: str) -> str:
    """A picture (PNG, base64) with few colors, and without matplotlib's metadata."""
    image = Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")
    smaller = io.BytesIO()
    few = image.quantize(COLORS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    few.save(smaller, "PNG", optimize=True)
    return base64.b64encode(smaller.getvalue()).decode()


def main() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    with tempfile.TemporaryDirectory() as folder:
        manager = jupyter_client.AsyncKernelManager(
            # Not an installed kernel, but ipykernel's own, which runs this Python.
            kernel_name="python3",
            kernel_spec_manager=jupyter_client.kernelspec.KernelSpecManager(kernel_dirs=[]),
            transport="ipc",  # sockets that are files
            connection_file=str(Path(folder, "kernel.json")),
        )
        client = nbclient.NotebookClient(
            notebook, km=manager, timeout=300, record_timing=False, coalesce_streams=True
        )
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        client.execute(
            cleanup_kc=True,
            cwd=folder,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(filter(None, paths)),
                "IPYTHONDIR": folder,
                "MPLBACKEND": "module://matplotlib_inline.backend_inline",
            },
        )
    for cell in notebook.cells:
        cell.metadata = {}
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = small(output.data["image/png"])
    notebook.metadata.language_info = {"name": "python"}
    NOTEBOOK.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")
    print(f"{NOTEBOOK.relative_to(ROOT)}: {NOTEBOOK.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
