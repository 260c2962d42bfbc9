"""Odd registries, recipes, policies and bases, thrown at `check`, `--dry-run` and `verify --policy`: a sentence, and exit 2 or 0.

Some dozens of each in CI. `python tests/test_odd_input.py 1000` throws so many of each and prints what came of them.
"""

import contextlib
import io
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import make_checkpoint

from guardsmith.cli.app import main
from guardsmith.gate.policy import as_yaml, default_policy

COUNT = int(sys.argv[1]) if __name__ == "__main__" and len(sys.argv) > 1 else 40
OPTIONS = settings(
    max_examples=COUNT, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
OUTCOMES = Counter()
ROOT = Path(__file__).parent.parent

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(min_value=-3, max_value=3), st.floats(), st.text(max_size=8),
    st.sampled_from([
        "", " ", ".", "..", "/", "~", "*", "**", "**x", "[", "a\0b", "no", "1e400", "2026-02-30", "a:b", ":", "hub:", "parquet:",
        "imagefolder:..", "builtin:", "builtin:x", "x" * 300, "dog", "{identifier}", "{}", "{", "guardsmith:NO", "os:path",
        "\ud800", 10**30, -1, 0, 1e-320,
    ]),
)  # fmt: skip
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def places(data, where=()):
    """Every place in nested data."""
    yield where
    if isinstance(data, dict):
        for key, value in data.items():
            yield from places(value, (*where, key))
    elif isinstance(data, list):
        for number, value in enumerate(data):
            yield from places(value, (*where, number))


@st.composite
def spoilt(draw, good):
    """Data with one to three places replaced, removed, added to or put under another key."""
    data = yaml.safe_load(good)
    for _ in range(draw(st.integers(1, 3))):
        where = draw(st.sampled_from(list(places(data))))
        if not where:
            continue
        holder = data
        for key in where[:-1]:
            holder = holder[key]
        kind = draw(st.sampled_from(["replace", "replace", "remove", "rename", "add"]))
        if kind == "replace" or isinstance(holder, list):
            holder[where[-1]] = draw(values)
        elif kind == "add":
            holder[draw(st.text(max_size=5))] = draw(values)
        else:
            old = holder.pop(where[-1])
            if kind == "rename":
                holder[draw(st.sampled_from([f"{where[-1]}x", "", 3, None, True])) if True else ""] = old
    return data


@st.composite
def texts(draw, good):
    """A file: spoilt data, or text with some of it cut out, doubled or replaced by other bytes."""
    if draw(st.booleans()):
        return yaml.safe_dump(draw(spoilt(good)), allow_unicode=draw(st.booleans()), sort_keys=False).encode(
            errors="surrogatepass"
        )
    raw = good.encode()
    begin = draw(st.integers(0, len(raw)))
    end = min(len(raw), begin + draw(st.integers(0, 30)))
    other = draw(st.sampled_from([b"", raw[begin:end] * 2]) | st.binary(max_size=6) | st.text(max_size=6).map(
        lambda text: text.encode(errors="surrogatepass")))  # fmt: skip
    return raw[:begin] + other + raw[end:]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("odd"))


@pytest.fixture(scope="module", autouse=True)
def embedded_base_is_loaded_once():
    """No odd recipe changes it, and a dry run only looks at it."""
    from guardsmith.evaluation import forecast

    load, loaded = forecast.load_model, {}

    def once(source, revision=None):
        if source != "builtin:avatar" or revision is not None:
            return load(source, revision)
        if source not in loaded:
            loaded[source] = load(source)
        return loaded[source]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forecast, "load_model", once)
        yield


def make_place(folder):
    """A folder with a good registry of two subjects, which the odd ones are made of."""
    lines = ["version: 1", "subjects:"]
    for number, subject in enumerate(["mira", "nora"]):
        lines += [f"  - id: {subject}", "    kind: person", "    class_noun: person", "    identifiers: [sks]"]
        lines += [
            "    consent: {basis: request, reference: T, granted_on: 2026-01-01, expires_on: 2099-01-01}",
            "    images:",
        ]
        for split_number, split in enumerate(["harden", "attack", "reference"]):
            file = folder / subject / split / "a.png"
            file.parent.mkdir(parents=True)
            small = np.random.default_rng(3 * number + split_number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(small).resize((64, 64)).save(file)
            lines.append(f"      - {{path: {subject}/{split}, split: {split}}}")
    (folder / "good.yaml").write_text("\n".join(lines) + "\n")
    return folder


def throw(arguments, allowed=(0, 2)):
    """Run a command; its exit code, after checking that what it printed is for people."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(arguments)
        except BaseException:  # what gets out of `main` is a traceback for users
            code, _ = "traceback", traceback.print_exc()
    said = err.getvalue()
    OUTCOMES[arguments[0], code] += 1
    assert code in allowed, (code, said[-3000:])
    assert "this is a bug" not in said and "Traceback" not in said, said[-3000:]
    assert code == 0 or said.strip(), "a refusal has words"
    return code


def test_the_good_ones_pass(place):
    assert throw(["check", str(place / "good.yaml")]) == 0
    assert throw(["harden", "--recipe", "demo", "--subjects", str(place / "good.yaml"), "--dry-run"]) == 0


def test_odd_registries(place):
    good = (place / "good.yaml").read_text()

    @OPTIONS
    @given(texts(good))
    def odd(text):
        (place / "odd.yaml").write_bytes(text)
        code = throw(["check", str(place / "odd.yaml")])
        arguments = ["harden", "--recipe", "demo", "--subjects", str(place / "odd.yaml"), "--dry-run"]
        assert code == 0 or throw(arguments) == 2, "what `check` refuses is refused everywhere"

    odd()


@pytest.mark.parametrize("recipe", ["demo", "avatar-axes", "avatar-images"])
def test_odd_recipes(place, recipe):
    good = (ROOT / "recipes" / f"{recipe}.yaml").read_text()
    good = "\n".join(
        line for line in good.splitlines() if not line.startswith(("#", "subjects", "bystanders", "negatives"))
    )

    @OPTIONS
    @given(texts(f"{good}\n"))
    def odd(text):
        (place / "recipe.yaml").write_bytes(text)
        throw(["harden", "--recipe", str(place / "recipe.yaml"), "--subjects", str(place / "good.yaml"), "--dry-run"])

    odd()


def test_odd_policies(place):
    """A verification of nothing: a policy that is in order leads to the sentence about that."""

    @OPTIONS
    @given(texts(as_yaml(default_policy())))
    def odd(text):
        (place / "policy.yaml").write_bytes(text)
        throw(
            ["verify", str(place / "nothing"), "--recipe", "demo", "--subjects", str(place / "good.yaml"), "--policy",
             str(place / "policy.yaml")], allowed=(2,),
        )  # fmt: skip

    odd()


@st.composite
def spoilt_folders(draw, files):
    """Changes of one or two files of a checkpoint: name -> bytes, or `None` for a file that is not there any more."""
    found = {}
    for name in draw(st.lists(st.sampled_from(sorted(files)), min_size=1, max_size=2, unique=True)):
        raw = files[name]
        kind = draw(st.sampled_from(["text", "text", "text", "gone", "cut", "pointer", "bytes"]))
        if kind == "text" and name.endswith(".json") and "tokenizer.json" not in name:
            found[name] = draw(texts(raw.decode()))
        elif kind == "gone":
            found[name] = None
        elif kind == "pointer":
            found[name] = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
        elif kind == "bytes":
            place = draw(st.integers(0, len(raw) - 1))
            found[name] = raw[:place] + draw(st.binary(min_size=1, max_size=8)) + raw[place + 8 :]
        else:
            found[name] = raw[: draw(st.integers(0, len(raw) - 1))]
    return found


def test_odd_bases(place, epsilon_folder):
    base = place / "base"
    shutil.copytree(epsilon_folder, base)
    files = {file.relative_to(base).as_posix(): file.read_bytes() for file in base.rglob("*") if file.is_file()}
    command = ["harden", "--recipe", "apdm-sd15", "--base", str(base), "--subjects", str(place / "good.yaml"), "--output",
               str(place / "out"), "--dry-run"]  # fmt: skip
    assert throw(command) == 0

    @OPTIONS
    @given(spoilt_folders(files))
    def odd(found):
        for name, data in found.items():
            (base / name).unlink() if data is None else (base / name).write_bytes(data)
        try:
            throw(command)
        finally:
            for name in found:
                (base / name).write_bytes(files[name])

    odd()
    assert not (place / "out").exists()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        here = make_place(Path(folder))
        test_odd_registries(here)
        for name in ("demo", "avatar-axes", "avatar-images"):
            test_odd_recipes(here, name)
        test_odd_policies(here)
        test_odd_bases(here, make_checkpoint(Path(folder) / "epsilon", "epsilon"))
    print(dict(OUTCOMES))
