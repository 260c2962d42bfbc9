"""The tutorial's notebook runs from top to bottom, with a hardening and attacks of a few steps."""

import asyncio
import json
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "docs" / "tutorial" / "first-hardening.ipynb"
SMALL = {
    "method.name": "persguard", "method.params": {"steps": 2, "class_images": 4, "batch_size": 2, "benign_images": 4},
    "negatives": None, "sampling.steps": 2, "probe.times": 0, "verify.images_per_unit": 2, "verify.class_images": 2,
    "verify.benign_images": 10, "verify.deployability.checks": [],
    "verify.attacks": {"lora": {"name": "lora", "params": {"steps": 2, "batch_size": 2}}},
}  # fmt: skip


async def executed(cells):
    """Run cells one after the other as a kernel of Jupyter does, in IPython inside of a running event loop; a kernel's process of
    its own would import everything anew.

    Returns:
        What they print, and everything that they show, by MIME type.
    """
    from IPython.core.interactiveshell import InteractiveShell
    from IPython.utils.capture import capture_output
    from traitlets.config import Config

    shell, printed, shown = InteractiveShell.instance(config=Config(HistoryManager={"enabled": False})), [], []
    for cell in cells:
        with shell.display_trap, capture_output() as captured:
            done = await shell.run_cell_async(cell, transformed_cell=shell.transform_cell(cell))
        done.raise_error()
        printed.append(captured.stdout)
        shown += [output.data for output in captured.outputs]
    InteractiveShell.clear_instance()
    return "".join(printed), shown


def test_the_notebook_runs_and_shows_pictures(tmp_path, monkeypatch):
    notebook = json.loads(NOTEBOOK.read_text())
    assert notebook["nbformat"] == 4
    cells = {"".join(cell["source"]): cell for cell in notebook["cells"] if cell["cell_type"] == "code"}
    [parameters] = [code for code, cell in cells.items() if "parameters" in cell["metadata"].get("tags", ())]
    changed = (
        f"CHANGES = {SMALL}\nOUTPUT = {str(tmp_path / 'out')!r}\nREGISTRY = {str(ROOT / 'registries/demo.yaml')!r}"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])  # which IPython replaces
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    text, shown = asyncio.run(executed([changed if code == parameters else code for code in cells]))
    assert sum("image/png" in data for data in shown) == 3, "real pictures, the figure, and one that the model draws"
    assert "protected mira" in text and "inconclusive" in text
    assert (tmp_path / "out" / "verify" / "report.html").is_file()
    shutil.rmtree(tmp_path / "out")


def test_the_notebook_is_committed_without_outputs():
    notebook = json.loads(NOTEBOOK.read_text())
    assert len(notebook["cells"]) > 5
    assert not any(cell.get("outputs") for cell in notebook["cells"])
