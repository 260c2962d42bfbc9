"""One error class per exit code. Each carries one sentence: what is wrong and what to do."""

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

Entry = TypeVar("Entry")


class GuardsmithError(Exception):
    """Base of the errors whose message is one sentence for the user: what is wrong and what to do."""

    exit_code = 4


class UserError(GuardsmithError):
    """Wrong usage, registry, recipe or input file (exit code 2)."""

    exit_code = 2


class RunFailed(GuardsmithError):
    """The input was fine and the run still failed: memory, disk, network, a diverged training (exit code 4)."""

    exit_code = 4


def did_you_mean(word: object, choices: Iterable[str]) -> str:
    """The end of a sentence about an unknown word: the choice that is spelt nearly like it, or nothing."""
    close = difflib.get_close_matches(str(word).lower(), list(choices), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def out_of_memory(error: Exception) -> bool:
    """Whether an error means that memory is short; torch has a class for accelerators, and only a message for the CPU."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )


def system_errno(error: Exception) -> int | None:
    """The system's error number; safetensors and shutil.copytree have it only in their text."""
    number: int | None = getattr(error, "errno", None)
    match = re.search(r"(?:os error |Errno )(\d+)", str(error))
    return number or (int(match[1]) if match else None)


def entry_of(table: Mapping[str, Entry], name: str, what: str, further: str = "") -> Entry:
    """An entry of a table by its name.

    Args:
        table: name -> entry.
        name: its name.
        what: kind of the entries, e.g. "method".
        further: end of the sentence about an unknown name, after the known ones.

    Raises:
        UserError: there is no such entry.
    """
    if name in table:
        return table[name]
    hint = did_you_mean(name, table) or f"; there is: {', '.join(table)}{further}"
    raise UserError(f"there is no {what} {name!r}{hint}")
