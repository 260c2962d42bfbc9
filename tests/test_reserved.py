"""Ids that could not be hidden in published evidence are refused before anything is computed.

`python tests/test_reserved.py` writes the list of words anew; the test says when that is needed.
"""

import json
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from test_page import case, make_subject  # noqa: F401 (a fixture)
from test_public import saved, told  # noqa: F401 (a fixture)
from test_registry import edit, folder, load, only_problem  # noqa: F401 (a fixture)

from guardsmith.attacks import ATTACKS
from guardsmith.diffusion import prompts
from guardsmith.methods import METHODS
from guardsmith.metrics import JUDGES
from guardsmith.registry.reserved import WORDS, evidence_words, is_reserved, words_of
from guardsmith.reports.report import json_schema


def is_a_word(text):
    """Not a number, a colour, a digest, or a name in place of an id."""
    return len(text) > 1 and text[0].isalpha() and not re.fullmatch(r"[0-9a-f]{6,}|(subject|control)-[0-9a-f]+", text)


def keys_of(schema):
    """Every name of a field, and every constant."""
    if isinstance(schema, dict):
        for key, value in schema.items():
            if key in ("properties", "$defs"):
                yield from value
            elif key in ("enum", "const"):
                yield from map(str, value if isinstance(value, list) else [value])
            if key not in ("description", "title"):
                yield from keys_of(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from keys_of(value)


def words_now(files):
    """Words of the public evidence of a verification, of reports' keys, of prompts, and of names in tables."""
    constants = [value for name, value in vars(prompts).items() if name.isupper()]
    text = " ".join([*files.values(), *map(repr, constants), *keys_of(json_schema()), *ATTACKS, *METHODS, *JUDGES])
    text = re.sub(r'data:image/[^"]*|"(mira|nora)"', "", text)
    return {word for word in words_of(text) if is_a_word(word)}


def test_every_word_of_the_evidence_is_on_the_list(told, tmp_path):  # noqa: F811
    missing = words_now(saved(told, tmp_path)) - evidence_words() - {"mira", "nora"}
    assert not missing, f"run python tests/test_reserved.py, or add to {WORDS.name}: {' '.join(sorted(missing))}"


@pytest.mark.parametrize("word", ["dog", "verdict", "sks", "person", "photo", "17", "1e-05", "robot", "teddy"])
def test_words_of_the_evidence_are_reserved(word):
    assert is_reserved(word, {"robot", "teddy bear"})


@pytest.mark.parametrize("word", ["mira", "dog-1", "anna", "max", "kim", "tom", "subject-0417", "a1", "teddy-bear"])
def test_other_ids_are_not(word):
    assert not is_reserved(word, {"robot", "teddy bear"})


def test_an_id_that_cannot_be_hidden_is_refused_at_once(folder):  # noqa: F811
    edit(folder, "id: mira", "id: dog")
    only_problem(folder, 3, "'dog'", "word of the evidence", "dog-1")
    edit(folder, "id: dog", "id: dog-1")
    load(folder)
    edit(folder, "id: tom", "id: robot")
    only_problem(folder, 13, "control 'robot'", "word of the evidence")


def test_an_invented_one_may_have_any_id_for_it_is_not_hidden(folder):  # noqa: F811
    edit(folder, "id: mira", "id: dog")
    edit(folder, "basis: request", "basis: invented")
    assert load(folder).subjects[0].id == "dog"


def test_an_id_that_is_too_long_for_file_names_is_refused_at_once(folder):  # noqa: F811
    edit(folder, "id: mira", f"id: {'m' * 64}")
    load(folder)
    edit(folder, "id: m", "id: mm")
    only_problem(folder, 3, "at most 64 characters")


def write_list(place):
    """Write the list from a verification like that of the page's tests, and keep what it had."""
    import test_page
    import test_public

    there = place / "evidence"
    there.mkdir()
    unwrap = lambda fixture: getattr(fixture, "__wrapped__", None) or fixture._get_wrapped_function()  # noqa: E731
    files = saved(unwrap(test_public.told)(unwrap(test_page.case)(there)), there)
    root = Path(__file__).parent.parent
    real = {file.name: file.read_text() for file in sorted((root / "docs" / "results").glob("*-report.*"))}
    invented = {s["id"] for file in real.values() if file[0] == "{" for s in json.loads(file).get("subjects", [])}
    WORDS.write_text("\n".join(sorted(words_now(files | real) - invented - {"mira", "nora"})) + "\n", encoding="utf-8")


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        write_list(Path(place))
