"""The notebooks run from top to bottom, and what they teach is learnt."""

import json
from pathlib import Path

import nbformat
import pytest
from ipykernel.kernelspec import write_kernel_spec
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
FUNCTIONAL = FOLDER / "01_functional_finetune.ipynb"
MANY_DEVICES = FOLDER / "03_multi_gpu_pjit.ipynb"


def execute(path, directory, *, parameters=None, report=()):
    """Execute a notebook in `directory`; returns the values of the variables named in `report`.

    As papermill does, `parameters` are set in a cell after the one that is tagged so.
    """
    notebook = nbformat.read(path, as_version=4)
    if parameters:
        (tagged,) = (i for i, c in enumerate(notebook.cells) if "parameters" in c.metadata.get("tags", ()))
        lines = (f"{name} = {value!r}" for name, value in parameters.items())
        notebook.cells.insert(tagged + 1, new_code_cell("\n".join(lines)))
    names = ", ".join(f"{name!r}: {name}" for name in report)
    notebook.cells.append(new_code_cell(f"import json\n\nprint(json.dumps({{{names}}}))"))
    # A kernel of this interpreter, whatever "python3" means to the user's Jupyter.
    write_kernel_spec(directory / "kernels" / "this_python")
    specs = KernelSpecManager(kernel_dirs=[str(directory / "kernels")])
    manager = AsyncKernelManager(kernel_name="this_python", kernel_spec_manager=specs)
    work = directory / "work"
    work.mkdir()
    client = NotebookClient(notebook, km=manager, timeout=540, coalesce_streams=True)
    client.execute(cwd=str(work), cleanup_kc=True)
    assert not list(work.iterdir())
    (printed,) = (o.text for o in notebook.cells[-1].outputs if o.get("name") == "stdout")
    return json.loads(printed)


@pytest.mark.parametrize(
    ("parameters", "least"),
    [
        # A third of the steps, for time. They reach 87 %; the base model reads 34 %.
        pytest.param({"STEPS": 40}, 0.75, id="short", marks=pytest.mark.slow),
        pytest.param({}, 0.85, id="full", marks=pytest.mark.slow),
    ],
)
def test_the_functional_loop_learns_to_read_handwriting(tmp_path, parameters, least):
    found = execute(FUNCTIONAL, tmp_path, parameters=parameters, report=("accuracy_before", "accuracy_after"))
    assert found["accuracy_after"] >= least
    assert found["accuracy_after"] - found["accuracy_before"] >= 0.25


@pytest.mark.slow
def test_a_few_steps_on_eight_virtual_devices(tmp_path):
    parameters = {"STEPS": 6, "TEST_STRINGS": 16}
    losses = execute(MANY_DEVICES, tmp_path, parameters=parameters, report=("losses",))["losses"]
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.slow
def test_the_loop_on_eight_virtual_devices_learns_as_on_one(tmp_path):
    found = execute(MANY_DEVICES, tmp_path, report=("accuracy_before", "accuracy_after"))
    assert found["accuracy_after"] >= 0.85


def test_no_notebook_is_left_out():
    assert NOTEBOOKS == [FUNCTIONAL, MANY_DEVICES]


def test_a_notebook_that_fails_is_an_error(tmp_path):
    path = tmp_path / "fails.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[new_code_cell("1 / 0")]), path)
    with pytest.raises(Exception, match="ZeroDivisionError"):
        execute(path, tmp_path)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_it_is_stored_as_executed(path):
    cells = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    assert [c.execution_count for c in cells] == list(range(1, len(cells) + 1))
    outputs = [output for c in cells for output in c.outputs]
    assert outputs
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
