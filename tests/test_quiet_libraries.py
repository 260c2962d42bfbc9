"""A command's stderr holds what guardsmith says, and nothing of the libraries that it imports."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_nothing_of_the_libraries_is_printed(tmp_path):
    command = ["run", "demo", "--dry-run", "--set", "negatives=null", "--output", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-m", "guardsmith", *command], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "torchvision" not in done.stderr and "[transformers]" not in done.stderr
