"""Words that no id of a real subject can be, because published evidence has them anyway.

Published evidence replaces ids, and nothing is published in which one is left as a word. An id that is a word of the page, of a
prompt or of the software's own names would always be left: found out here, and not after hours of attacks.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import cache
from pathlib import Path

WORDS = Path(__file__).parent / "evidence_words.txt"
"""Words of the evidence of a verification that contain no names; tests/test_reserved.py writes and checks it."""


def words_of(text: str) -> set[str]:
    """Words of a text in lowercase, as an id could be one."""
    return set(re.findall(r"[a-z0-9][a-z0-9_-]*", text.lower()))


@cache
def evidence_words() -> frozenset[str]:
    """The words in `WORDS`."""
    return frozenset(WORDS.read_text(encoding="utf-8").split())


def is_reserved(subject_id: str, class_nouns: Collection[str]) -> bool:
    """Whether an id is a word of the evidence.

    Args:
        subject_id: the id.
        class_nouns: of the registry, which stand in prompts and reports.
    """
    nouns = {word for noun in class_nouns for word in words_of(noun)}
    number = re.fullmatch(r"[0-9]+(e-?[0-9]+)?", subject_id)  # every report has many
    return bool(number) or subject_id in nouns or subject_id in evidence_words()
