"""The notebook runs from top to bottom, and stops where the package is wrong."""

import os
import tempfile
from pathlib import Path

import pytest

import relu_mlp
import support

pytestmark = pytest.mark.slow

# All are in the extra "test"; `make abi` runs with PyTorch, pytest and numpy alone.
pytest.importorskip("matplotlib")
pytest.importorskip("ipykernel")
jupyter_client = pytest.importorskip("jupyter_client")
nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")

NOTEBOOK = Path(__file__).parents[2] / "examples" / "backpropagation.ipynb"


def read():
    return nbformat.read(NOTEBOOK, as_version=4)


def execute(notebook, **environment):
    """Runs a notebook with this Python and this relu_mlp; the outputs go into its cells."""
    with tempfile.TemporaryDirectory() as folder:
        manager = jupyter_client.AsyncKernelManager(
            # No kernel that somebody has installed: ipykernel's own, which is this Python.
            kernel_name="python3",
            kernel_spec_manager=jupyter_client.kernelspec.KernelSpecManager(kernel_dirs=[]),
            # Sockets that are files need no ports, and a short path: it has 100 characters or so.
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
    notebook = read()
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


def test_is_committed_without_outputs():
    notebook = read()
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    for cell in notebook.cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None, cell.id
        assert not cell.metadata, cell.id
    # As Jupyter writes it, so that a change of one line is a difference of one line.
    assert NOTEBOOK.read_text(encoding="utf-8") == nbformat.writes(notebook) + "\n"


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
    notebook = read()
    notebook.cells.insert(0, nbformat.v4.new_code_cell(mistake))
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="AssertionError"):
        execute(notebook, MPLBACKEND="agg")  # which draws nothing, and so is faster
    last = [c for c in notebook.cells if c.get("outputs") or c.get("execution_count")][-1]
    assert last.id == cell
