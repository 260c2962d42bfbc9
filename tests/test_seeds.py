"""The table of seeds: no two purposes draw from the same noise, and code takes its seeds from there."""

import re
from itertools import combinations
from pathlib import Path

import pytest
from tiny import assert_one_sentence

from guardsmith.core import seeds
from guardsmith.core.errors import UserError
from guardsmith.core.seeds import SeedRange, picture_ranges

ROOT = Path(__file__).parent.parent / "guardsmith"


def test_no_two_ranges_overlap():
    ranges = picture_ranges()
    assert len(ranges) > 10 and all(each.length > 0 for each in ranges.values())
    for (name, one), (other_name, other) in combinations(ranges.items(), 2):
        assert one.end <= other.start or other.end <= one.start, f"{name} and {other_name}"


def test_a_range_gives_its_seeds_and_no_more():
    known = SeedRange(500, 10)
    assert list(known.seeds(3)) == [500, 501, 502] and list(known.seeds(2, first=8)) == [508, 509]
    assert list(known.seeds(10))[-1] + 1 == known.end
    for count, first in ((11, 0), (1, 10)):
        with pytest.raises(UserError, match="have seeds") as caught:
            known.seeds(count, first)
        assert_one_sentence(caught.value)


def test_no_module_has_seeds_of_its_own():
    """A round number next to the word seed, as all of them were before the table."""
    found = []
    for file in ROOT.rglob("*.py"):
        for number, line in enumerate(file.read_text().splitlines(), 1):
            named = re.search(r"(?i)seed|drawn_by|drawn_with_states", line) and re.search(r"\b[1-9]\d{0,3}_000\b", line)
            if named and file.name != "seeds.py":
                found.append(f"{file.relative_to(ROOT)}:{number}: {line.strip()}")
    allowed = ("cloaks/metacloak.py",)  # training of surrogates, apart from every picture
    assert [place for place in found if not place.startswith(allowed)] == []


def test_kept_pictures_keep_their_seeds():
    """Results that were kept are of these; whoever moves a range makes them again."""
    starts = {name: each.start for name, each in picture_ranges().items()}
    assert starts == {
        "HARDENING_CLASS": 10_000, "HARDENING_BENIGN": 20_000, "ATTACK_SAMPLES": 30_000, "BENIGN_BASE": 40_000,
        "BENIGN_AGAIN": 50_000, "ATTACK_CLASS": 60_000, "CLOAKING_CLASS": 70_000, "RELEASED": 90_000,
        "HARDENING_REPLACEMENT": 100_000, "PROBE": 110_000, "SCREENING": 120_000,
        "DEPLOYABILITY_REFERENCE": 130_000, "DEPLOYABILITY": 140_000,
    }  # fmt: skip
    assert seeds.FIRST_STAGE_OFFSET == 1_000_000
