"""The tutorial's notebook runs from top to bottom, with a hardening and attacks of a few steps."""

import json
import shutil
from pathlib import Path

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "docs" / "tutorial" / "first-hardening.ipynb"
SMALL = {
    "method.name": "persguard", "method.params": {"steps": 2, "class_images": 4, "batch_size": 2, "benign_images": 4},
    "negatives": None, "sampling.steps": 2, "probe.times": 0, "verify.images_per_unit": 2, "verify.class_images": 2,
    "verify.benign_images": 10, "verify.deployability.checks": [],
    "verify.attacks": {"lora": {"name": "lora", "params": {"steps": 2, "batch_size": 2}}},
}  # fmt: skip


def test_the_notebook_runs_and_shows_pictures(tmp_path):
    import nbformat  # here, for it takes four seconds, and every worker imports this file
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    [parameters] = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    parameters.source = (
        f"import sys\nsys.path.insert(0, {str(ROOT / 'tests')!r})\nimport inprocess\n"
        "from guardsmith.runtime import executors\nexecutors.processes = inprocess.processes\n"  # see conftest.py
        f"CHANGES = {SMALL}\nOUTPUT = {str(tmp_path / 'out')!r}\nREGISTRY = {str(ROOT / 'registries/demo.yaml')!r}"
    )
    NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    shown = [output.data for cell in notebook.cells for output in cell.get("outputs", ()) if "data" in output]
    assert sum("image/png" in data for data in shown) == 3, "real pictures, the figure, and one that the model draws"
    text = "".join(output.text for cell in notebook.cells for output in cell.get("outputs", ()) if "text" in output)
    assert "protected mira" in text and "inconclusive" in text
    assert (tmp_path / "out" / "verify" / "report.html").is_file()
    shutil.rmtree(tmp_path / "out")


def test_the_notebook_is_committed_without_outputs():
    notebook = json.loads(NOTEBOOK.read_text())
    assert len(notebook["cells"]) > 5
    assert not any(cell.get("outputs") for cell in notebook["cells"])
