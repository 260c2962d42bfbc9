"""Tables of named entries (methods, attacks, judges), and entries of a user's own that are named as `module:NAME`."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TypeVar

from guardsmith.core.errors import UserError, entry_of

Entry = TypeVar("Entry")


def find_entry(table: Mapping[str, Entry], name: str, kind: type[Entry], what: str) -> Entry:
    """An entry of a table by its name, or an object of the same class in any module that Python can import.

    Args:
        table: name -> entry.
        name: a key of the table, or `module:NAME`.
        kind: the class that entries have.
        what: the entries are, with its article, e.g. "an attack".

    Raises:
        UserError: there is no such entry, its module cannot be imported, or the object is something else.
    """
    module, colon, attribute = name.partition(":")
    _, _, noun = what.partition(" ")
    if not colon:
        return entry_of(table, name, noun, ", or module:NAME for one of your own")
    try:
        entry = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # a user's module may fail in any way while it is imported
        reason = " ".join(str(error).split())
        raise UserError(
            f"the {noun} {name} cannot be imported ({type(error).__name__}: {reason}); is its module on PYTHONPATH, and can "
            "Python import it?"
        ) from error
    if not isinstance(entry, kind):
        raise UserError(f"{name} is not {what}; make it a {kind.__module__}.{kind.__name__}")
    return entry
