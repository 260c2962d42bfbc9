"""Sources that are a folder or a Hub id: which of the two a text can be, before anything asks the network."""

from __future__ import annotations

import os
from pathlib import Path

from guardsmith.core.errors import UserError

_SEPARATORS = tuple(sorted({"/", "\\", os.sep}))


def is_path(source: str) -> bool:
    """Whether a text can only be a path: something of that name is there, or no Hub id is written so.

    A Hub id is `owner/name`, or a bare name. What begins with a dot, a tilde or a separator, has more than one slash, or ends
    with a separator or `.safetensors` is none. Neither is a name in a folder that is here, unless the Hub's local cache has it.
    """
    return Path(source).expanduser().exists() or _written_as_path(source) or _in_folder_here(source)


def _written_as_path(source: str) -> bool:
    ends = (*_SEPARATORS, ".safetensors")
    begins = (".", "~", *_SEPARATORS)
    return (
        source.startswith(begins)
        or source.lower().endswith(ends)
        or source.count("/") > 1
        or "\\" in source
        or Path(source).is_absolute()  # a drive
    )


def _in_folder_here(source: str) -> bool:
    if "/" not in source or not Path(source).parent.is_dir():
        return False
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return not (Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=source, repo_type="model")).is_dir()


def check_source(source: str, what: str, instead: str = "a folder that exists, or a Hub id (owner/name)") -> None:
    """Refuse a path at which nothing is, before it is taken for a Hub id.

    Args:
        source: a folder or a Hub id, as the user wrote it.
        what: it should be, for the message, e.g. "base model".
        instead: what can be named, for the message.

    Raises:
        UserError: it is a path, and there is no such file or folder.
    """
    path = Path(source).expanduser()
    if path.exists() or not is_path(source):
        return
    if _written_as_path(source):
        raise UserError(f"there is no {what} at {source}; name {instead}")
    raise UserError(
        f"there is no {what} at {source}: the folder {path.parent} is here and holds no {path.name}; correct the path (a Hub id "
        "with such an owner can be named from another folder)"
    )
