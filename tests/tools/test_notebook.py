"""The notebook runs from top to bottom, and stops where the package is wrong."""

import os
import re
import tempfile
from pathlib import Path

import pytest

import relu_mlp
import support

pytestmark = pytest.mark.slow

# All are in the extra "test". `make abi` runs with PyTorch, pytest and numpy alone.
pytest.importorskip("matplotlib")
pytest.importorskip("ipykernel")
jupyter_client = pytest.importorskip("jupyter_client")
nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")

NOTEBOOK = Path(__file__).parents[2] / "examples" / "backpropagation.ipynb"


#: The pictures and printed lines of the committed file.
LARGEST = 200_000


def read():
    """The notebook as it is committed, with its outputs."""
    return nbformat.read(NOTEBOOK, as_version=4)


def without_outputs():
    notebook = read()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return notebook


def words(cell):
    """The printed lines of a cell, without numbers, which depend on the machine."""
    text = "".join(output.get("text", "") for output in cell.outputs)
    return [re.findall(r"\b[a-z]{4,}\b", line) for line in text.splitlines()]


def execute(notebook, **environment):
    """Runs a notebook with this Python and this relu_mlp. The outputs go into its cells."""
    with tempfile.TemporaryDirectory() as folder:
        manager = jupyter_client.AsyncKernelManager(
            # Not an installed kernel, but ipykernel's own, which is this Python.
            kernel_name="python3",
            kernel_spec_manager=jupyter_client.kernelspec.KernelSpecManager(kernel_dirs=[]),
            # Sockets that are files need no ports, but a short path, of about 100 characters.
            transport="ipc",
            connection_file=str(Path(folder, "kernel.json")),
        )
        paths = [str(Path(relu_mlp.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
        client = nbclient.NotebookClient(notebook, km=manager, timeout=120, startup_timeout=120)
        client.execute(
            cleanup_kc=True,
            cwd=folder,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(filter(None, paths)),
                "IPYTHONDIR": folder,
                "MPLBACKEND": "module://matplotlib_inline.backend_inline",
                **environment,
            },
        )


@pytest.mark.parametrize("backend", support.BACKENDS)
def test_runs_from_top_to_bottom(backend):
    committed, notebook = read(), without_outputs()
    notebook.cells.append(nbformat.v4.new_code_cell("print(relu_mlp.__file__)"))
    execute(notebook, RELU_MLP_BACKEND=backend)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in cells)
    assert cells[-1].outputs[0].text.strip() == relu_mlp.__file__
    for cell in cells:
        pictures = [output for output in cell.outputs if "image/png" in output.get("data", {})]
        assert len(pictures) == cell.source.count("plt.show()"), cell.id
        said = [output.text for output in cell.outputs if output.get("name") == "stderr"]
        assert "Warning" not in "".join(said), cell.id
    for cell, before in zip(notebook.cells[:-1], committed.cells):
        if cell.cell_type == "code":
            assert words(cell) == words(before), f"{cell.id}: run tools/notebook.py"


def test_is_committed_with_its_outputs():
    """As tools/notebook.py writes it: small, and without machine-dependent data."""
    notebook = read()
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        pictures = [output for output in cell.outputs if "image/png" in output.get("data", {})]
        assert len(pictures) == cell.source.count("plt.show()"), cell.id
        assert bool(words(cell)) == ("print(" in cell.source), cell.id
        kinds = {output.output_type for output in cell.outputs}
        assert kinds <= {"display_data", "stream"}, cell.id
        assert all(output.get("name") != "stderr" for output in cell.outputs), cell.id
    assert not any(cell.metadata for cell in notebook.cells)
    text = NOTEBOOK.read_text(encoding="utf-8")
    # As Jupyter writes it, so that a change of one line is a difference of one line.
    assert text == nbformat.writes(notebook) + "\n"
    assert len(text.encode()) < LARGEST
    assert "\n".join(notebook.cells[0].source.splitlines()[2:3]).endswith("you can")
    said = "".join(output.get("text", "") for cell in cells for output in cell.outputs)
    assert not re.search(r"(^|\s|[\"'(])[~/]\w+/|[A-Z]:\\\\", said)  # no path of a machine


DIVIDED_BIAS = """
import relu_mlp
the_right_one = relu_mlp.loss_and_grads

def loss_and_grads(x, *arguments, **options):
    loss, weights, biases = the_right_one(x, *arguments, **options)
    return relu_mlp.LossAndGrads(loss, weights, biases and [grad / len(x) for grad in biases])

relu_mlp.loss_and_grads = loss_and_grads
"""
BLIND_CHECK = """
from relu_mlp import GradientReport
GradientReport.ok = True
"""
MASK_FORGOTTEN = """
import relu_mlp
the_right_one = relu_mlp.jacobian

def jacobian(x, weights, biases):
    far = [bias + 100 for bias in biases]  # every unit is on
    return the_right_one(x, weights, far)

relu_mlp.jacobian = jacobian
"""


@pytest.mark.parametrize(
    ("mistake", "cell"),
    [
        pytest.param(DIVIDED_BIAS, "at-the-kink-check", id="loss_and_grads"),
        pytest.param(BLIND_CHECK, "check-mistakes", id="check_gradients"),
        pytest.param(MASK_FORGOTTEN, "jacobian-checks", id="jacobian"),
    ],
)
def test_stops_where_the_package_is_wrong(mistake, cell):
    notebook = without_outputs()
    notebook.cells.insert(0, nbformat.v4.new_code_cell(mistake))
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="AssertionError"):
        execute(notebook, MPLBACKEND="agg")  # which draws nothing, and so is faster
    last = [c for c in notebook.cells if c.get("outputs") or c.get("execution_count")][-1]
    assert last.id == cell
