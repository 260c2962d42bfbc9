"""The real Hub, for whoever asks for it: needs a token that may write, and a name for a repository to make and delete.

GUARDSMITH_LIVE_REPO=you/scratch HF_TOKEN=... pytest -m slow tests/test_live_hub.py      (not with HF_HUB_OFFLINE=1)
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_publish import make_output

from guardsmith.models.checkpoint import weights_digest
from guardsmith.registry.loader import load_registry

ROOT = Path(__file__).parent.parent
REPO = os.environ.get("GUARDSMITH_LIVE_REPO")


def has_token():
    from huggingface_hub import get_token

    return get_token() is not None


@pytest.mark.slow
@pytest.mark.skipif(REPO is None or not has_token(), reason="needs GUARDSMITH_LIVE_REPO and a token")
def test_publish_download_and_publish_again(tmp_path, v_folder):
    from huggingface_hub import HfApi, snapshot_download

    registry = load_registry(ROOT / "registries" / "demo.yaml")
    output = make_output(tmp_path / "out", v_folder, registry)
    command = [sys.executable, "-m", "guardsmith", "publish", str(output), "--repo-id", REPO, "--private",
               "--subjects", str(registry.path), "--contact", "nobody@example.org", "--tag", "smoke"]  # fmt: skip
    assert not HfApi().repo_exists(REPO), f"{REPO} is there already; name one that may be deleted"
    try:
        first = subprocess.run(command, capture_output=True, text=True, check=False)
        assert first.returncode == 0, first.stderr
        again = subprocess.run(command, capture_output=True, text=True, check=False)
        assert again.returncode == 0 and "holds exactly this already" in again.stderr, again.stderr
        folder = Path(snapshot_download(REPO, revision="smoke", local_dir=tmp_path / "down"))
        assert weights_digest(folder) == weights_digest(output / "model")
        assert HfApi().model_info(REPO).card_data.license == "apache-2.0", "the Hub read the card"
    finally:
        HfApi().delete_repo(REPO, missing_ok=True)
