import hashlib
import json
import os
import re
import shutil
from datetime import date, datetime
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from PIL import Image, ImageEnhance, ImageOps

from guardsmith.core.errors import UserError
from guardsmith.evaluation.forecast import _look_at_consents
from guardsmith.registry.add import _numbered, add_subject
from guardsmith.registry.loader import Registry, json_schema, load_registry, unknown_class_nouns

TODAY = date(2026, 6, 1)
CONSENT = "{basis: request, reference: TICKET-17, granted_on: 2026-01-01, expires_on: 2028-01-01}"


def blobs(seed, size=64):
    """A smooth random picture; two seeds look nothing alike."""
    small = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC)


def sha(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def folder(tmp_path):
    """mira, protected, and tom, a control, with one picture per split and R.yaml over them."""
    for number, name in enumerate(["mira/0", "mira/1", "mira/2", "tom/1", "tom/2"]):
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        blobs(number).save(path)
    (tmp_path / "R.yaml").write_text(good(tmp_path))
    return tmp_path


def good(folder):
    return f"""\
version: 1
subjects:  # protected
  - id: mira
    kind: person
    class_noun: person
    identifiers: [sks]
    consent: {CONSENT}
    images:
      - {{path: mira/0.png, sha256: {sha(folder / "mira/0.png")}, split: harden}}
      - {{path: mira/1.png, sha256: {sha(folder / "mira/1.png")}, split: attack}}
      - {{path: mira/2.png, sha256: {sha(folder / "mira/2.png")}, split: reference}}
controls:
  - id: tom
    kind: character
    class_noun: robot
    images:
      - {{path: tom/1.png, sha256: {sha(folder / "tom/1.png")}, split: attack}}
      - {{path: tom/2.png, sha256: {sha(folder / "tom/2.png")}, split: reference}}
"""


def edit(folder, old, new, count=1):
    text = (folder / "R.yaml").read_text()
    assert text.count(old) >= 1
    (folder / "R.yaml").write_text(text.replace(old, new, count))


def load(folder, **options):
    return load_registry(folder / "R.yaml", **{"today": TODAY, **options})


def problems(folder, **options):
    """[(line, sentence)] of a registry that must be refused."""
    with pytest.raises(UserError) as caught:
        load(folder, **options)
    assert caught.value.exit_code == 2
    found = []
    for sentence in str(caught.value).split("\n"):
        match = re.fullmatch(rf"{re.escape(str(folder / 'R.yaml'))}:(\d+): (.+)", sentence)
        assert match, sentence
        found.append((int(match[1]), match[2]))
    return found


def only_problem(folder, line, *words, **options):
    found = problems(folder, **options)
    assert len(found) == 1, found
    assert found[0][0] == line, found
    for word in words:
        assert word in found[0][1], found


# --- what a good registry says ---------------------------------------------------------------------------------------


def test_good_registry(folder):
    registry = load(folder)
    assert isinstance(registry, Registry)
    (mira,), (tom,) = registry.subjects, registry.controls
    assert (mira.id, mira.kind, mira.class_noun, mira.identifiers) == ("mira", "person", "person", ("sks",))
    assert mira.consent.expires_on == date(2028, 1, 1)
    assert [image.split for image in mira.images] == ["harden", "attack", "reference"]
    assert mira.images_of("attack")[0].path == folder / "mira/1.png"
    assert mira.images_of("attack")[0].sha256 == sha(folder / "mira/1.png")
    assert tom.consent is None
    assert tom.images_of("harden") == ()
    assert registry.warnings == ()
    assert registry.path == folder / "R.yaml"
    assert registry.find("tom") is tom
    with pytest.raises(UserError, match="did you mean 'mira'"):
        registry.find("mirra")


def test_models_are_frozen(folder):
    registry = load(folder)
    with pytest.raises(ValueError, match="frozen"):
        registry.subjects[0].id = "x"


def test_paths_are_relative_to_the_file_not_to_the_shell(folder, monkeypatch, tmp_path_factory):
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    load(folder)
    monkeypatch.chdir(folder)
    registry = load_registry("R.yaml", today=TODAY)
    monkeypatch.chdir("/")
    assert all(image.path.is_file() for image in registry.subjects[0].images)


# --- digest ----------------------------------------------------------------------------------------------------------


def test_digest_ignores_formatting_order_and_place(folder, tmp_path_factory):
    before = load(folder).digest
    copy = tmp_path_factory.mktemp("copy") / "deeper"
    shutil.copytree(folder, copy)
    (copy / "mira").rename(copy / "moved")
    data = yaml.safe_load((copy / "R.yaml").read_text().replace("mira/", "moved/"))
    data["subjects"][0]["images"].reverse()
    (copy / "R.yaml").write_text("# another comment\n" + yaml.safe_dump(data, sort_keys=True))
    assert load(copy).digest == before
    assert re.fullmatch("[0-9a-f]{64}", before)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("class_noun: person", "class_noun: woman"),
        ("id: mira", "id: mara"),
        ("kind: person", "kind: character"),
        ("[sks]", "[zwx]"),
        ("TICKET-17", "TICKET-18"),
        ("expires_on: 2028-01-01", "expires_on: 2028-01-02"),
        ("split: reference", "split: attack"),
    ],
)
def test_digest_changes_with_the_content(folder, old, new):
    blobs(50).save(folder / "mira/3.png")
    edit(
        folder,
        "controls:",
        f"      - {{path: mira/3.png, sha256: {sha(folder / 'mira/3.png')}, split: reference}}\ncontrols:",
    )
    before = load(folder).digest
    edit(folder, old, new)
    assert load(folder).digest != before


def test_digest_changes_with_a_picture_and_with_the_role(folder):
    before = load(folder).digest
    old = sha(folder / "mira/0.png")
    blobs(60).save(folder / "mira/0.png")
    edit(folder, old, sha(folder / "mira/0.png"))
    after = load(folder).digest
    assert after != before
    (folder / "R.yaml").write_text(
        (folder / "R.yaml")
        .read_text()
        .replace("controls:\n", "")
        .replace("id: tom", f"id: tom\n    consent: {CONSENT}")
    )
    found = problems(folder)  # tom is protected now and needs a harden split
    assert "harden" in found[0][1]


# --- YAML ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "# nothing\n", "[]", "hello", "- a\n- b\n"])
def test_not_a_registry(folder, text):
    (folder / "R.yaml").write_text(text)
    only_problem(folder, 1, "version and subjects")


@pytest.mark.parametrize("subjects", ["subjects: []", "subjects:", "", "subjects: null"])
def test_empty_registry(folder, subjects):
    (folder / "R.yaml").write_text(f"version: 1\n{subjects}\n")
    only_problem(folder, 2 if subjects else 1, "has no subjects")


def test_syntax_error(folder):
    edit(folder, "    kind: person", "   kind: person")
    only_problem(folder, 4, "not valid YAML")


def test_tab_and_unclosed_bracket(folder):
    edit(folder, "    kind: person", "\tkind: person")
    only_problem(folder, 4, "not valid YAML")
    (folder / "R.yaml").write_text("version: [1\nsubjects: x\n")
    assert "not valid YAML" in problems(folder)[0][1]


def test_duplicate_key(folder):
    edit(folder, "    class_noun: person", "    class_noun: person\n    kind: style")
    only_problem(folder, 6, "'kind'", "line 4")


def test_not_utf8(folder):
    (folder / "R.yaml").write_bytes(b"version: 1\n# caf\xe9\n")
    only_problem(folder, 2, "UTF-8")


def test_python_tags_are_refused(folder):
    (folder / "R.yaml").write_text("version: 1\nsubjects: !!python/object/apply:os.system ['touch pwned']\n")
    only_problem(folder, 2, "not valid YAML")


def test_bombs_and_loops_end_with_a_sentence(folder):
    bomb = "a: &a [x, x, x, x, x, x, x, x, x, x]\n"
    for one, other in zip("abcdefgh", "bcdefghi", strict=True):
        bomb += f"{other}: &{other} [{', '.join([f'*{one}'] * 10)}]\n"
    for text in (bomb, "subjects: &a [*a]\n", "[" * 50_000, "{a: " * 50_000):
        (folder / "R.yaml").write_text(text)
        with pytest.raises(UserError) as caught:
            load(folder)
        assert len(str(caught.value)) < 1000


def test_anchors_and_merges_work(folder):
    edit(folder, f"consent: {CONSENT}", f"consent: &consent {CONSENT}")
    edit(folder, "  - id: tom", "  - id: tom\n    consent: {<<: *consent, reference: TICKET-18}")
    assert load(folder).controls[0].consent.reference == "TICKET-18"
    assert load(folder).controls[0].consent.basis == "request"


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_registry(tmp_path / "R.yaml")
    with pytest.raises(UserError, match="folder"):
        load_registry(tmp_path)


# --- keys and values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        ("controls:", "contrls:", 12, ["unknown key 'contrls'", "did you mean 'controls'"]),
        ("class_noun: person", "clas_noun: person", 5, ["'mira'", "'clas_noun'", "did you mean 'class_noun'"]),
        ("consent:", "consnt:", 7, ["'mira'", "did you mean 'consent'"]),
        ("granted_on:", "grantd_on:", 7, ["did you mean 'granted_on'"]),
        ("split: attack", "splt: attack", 10, ["did you mean 'split'"]),
        ("identifiers:", "zzz:", 6, ["unknown key 'zzz'", "known keys are id, kind"]),
        ("kind: person", "kind: persn", 4, ["'persn'", "did you mean 'person'"]),
        ("kind: person", "kind: 7", 4, ["7", "person, object, character, style"]),
        ("split: attack", "split: atack", 10, ["'atack'", "did you mean 'attack'"]),
        ("version: 1", "version: 2", 1, ["version is 2"]),
        ("id: mira", "id: Mira B", 3, ["'Mira B'", "a-z"]),
        ("id: mira", "id: -mira", 3, ["'-mira'"]),
        ("id: mira", "id: ../mira", 3, ["'../mira'"]),
        ("id: mira", "id: 17", 3, ["17", "quotes"]),
        ("id: mira", "id: no", 3, ["False", "quotes"]),
        ("class_noun: person", "class_noun: Person!", 5, ["'Person!'", "lowercase"]),
        ("class_noun: person", f"class_noun: {'very ' * 10}old", 5, ["40"]),
        ("    kind: person\n", "", 3, ["'mira'", "'kind' is missing"]),
        ("reference: TICKET-17, ", "", 7, ["'reference' is missing"]),
        ("[sks]", "sks", 6, ["identifiers must be a list"]),
        ("[sks]", "['']", 6, ["empty"]),
        ("2026-01-01", "yesterday", 7, ["granted_on is 'yesterday'", "2026-01-31"]),
        ("2028-01-01", "2028-02-30", 7, ["expires_on is '2028-02-30'", "day is out of range"]),
        ("2028-01-01", "20280101", 7, ["expires_on is 20280101", "2026-01-31"]),
        (CONSENT, "request", 7, ["consent must be a mapping"]),
        ("2028-01-01", "2025-01-01", 7, ["before it begins"]),
    ],
)
def test_wrong_key_or_value(folder, old, new, line, words):
    edit(folder, old, new)
    only_problem(folder, line, *words)


def test_wrong_shapes(folder):
    (folder / "R.yaml").write_text("version: 1\nsubjects:\n  - mira\n  - {id: tom, images: {path: x}}\n")
    found = problems(folder)
    assert (3, "subject number 1: an entry of subjects must be a mapping (`key: value`), not 'mira'") in found
    assert any(line == 4 and "subject 'tom': images must be a list" in sentence for line, sentence in found)


def test_ids_are_unique_across_subjects_and_controls(folder):
    edit(folder, "id: tom", "id: mira")
    only_problem(folder, 13, "'mira'", "line 3")


def test_every_problem_at_once_in_the_order_of_the_file(folder):
    edit(folder, "version: 1", "version: 3")
    edit(folder, "kind: person", "kind: persn")
    edit(folder, "2028-01-01", "2026-02-01")
    (folder / "mira/0.png").write_text("no picture")
    edit(folder, "split: attack", "split: atack")
    edit(folder, "id: tom", "id: Tom")
    (folder / "tom/1.png").unlink()
    shutil.copy(folder / "mira/2.png", folder / "tom/2.png")
    found = problems(folder)
    assert [line for line, _ in found] == [1, 4, 7, 9, 10, 13, 17, 18]
    assert "not the picture that was registered" in " ".join(sentence for line, sentence in found if line == 9)


def test_unknown_class_nouns(folder):
    known = ["person", "character", "robot"]
    assert unknown_class_nouns(load(folder), known) == []
    edit(folder, "class_noun: robot", "class_noun: robots")
    (sentence,) = unknown_class_nouns(load(folder), known)
    assert sentence.startswith(f"{folder / 'R.yaml'}:15: ")
    assert "did you mean 'robot'" in sentence
    assert "'tom'" in sentence


# --- consent ---------------------------------------------------------------------------------------------------------


def test_consent_ends_after_its_last_day(folder):
    load(folder, today=date(2028, 1, 1))
    only_problem(folder, 7, "'mira'", "expired on 2028-01-01", today=date(2028, 1, 2))


def test_expired_consent_has_the_line_of_the_date(folder):
    block = (
        "\n      basis: request\n      reference: TICKET-17\n      granted_on: 2026-01-01\n      expires_on: 2026-02-01"
    )
    edit(folder, f" {CONSENT}", block)
    only_problem(folder, 11, "expired on 2026-02-01")


def test_consent_that_has_not_begun(folder):
    load(folder, today=date(2026, 1, 1))
    only_problem(folder, 7, "begins on 2026-01-01", today=date(2025, 12, 31))


def test_consent_without_end(folder):
    edit(folder, ", expires_on: 2028-01-01", "")
    assert load(folder, today=date(2999, 1, 1)).subjects[0].consent.expires_on is None


def test_today_is_the_present_day_by_default(folder):
    edit(folder, "2028-01-01", "2026-01-01")
    with pytest.raises(UserError, match="expired"):
        load_registry(folder / "R.yaml")


def test_protected_subjects_need_consent_and_controls_do_not(folder):
    edit(folder, f"    consent: {CONSENT}\n", "")
    only_problem(folder, 3, "'mira'", "needs a consent")


def test_an_expired_consent_of_a_control_counts(folder):
    edit(folder, "id: tom", f"id: tom\n    consent: {CONSENT}")
    edit(folder, "id: mira", "id: mira")
    assert [line for line, _ in problems(folder, today=date(2029, 1, 1))] == [7, 14]


# --- pictures --------------------------------------------------------------------------------------------------------


def spoil(folder, name, change):
    """Replace a picture and register the new hash."""
    path = folder / name
    old = sha(path)
    change(path)
    edit(folder, old, sha(path))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda path: path.write_text("hello"), ["not a picture"]),
        (lambda path: path.write_bytes(path.read_bytes()[:500]), ["damaged"]),
        (lambda path: path.write_bytes(b""), ["not a picture"]),
        (lambda path: Image.new("RGB", (1, 1)).save(path), ["1 x 1 pixels", "32"]),
        (lambda path: blobs(9).save(path, save_all=True, append_images=[blobs(10)]), ["animated"]),
    ],
)
def test_bad_picture(folder, change, words):
    spoil(folder, "mira/1.png", change)
    only_problem(folder, 10, "'mira'", str(folder / "mira/1.png"), *words)


@pytest.mark.parametrize("mode", ["RGBA", "L", "LA", "P", "I;16", "1"])
def test_other_colour_modes_are_fine(folder, mode):
    def change(path):
        if mode == "I;16":
            Image.fromarray(np.asarray(blobs(9).convert("L")).astype(np.uint16) * 257).save(path)
        else:
            blobs(9).convert(mode).save(path)

    spoil(folder, "mira/1.png", change)
    load(folder)


def test_missing_picture(folder):
    (folder / "mira/1.png").unlink()
    only_problem(folder, 10, "mira/1.png does not exist")


def test_missing_picture_matters_only_when_pictures_are_checked(folder):
    before = load(folder)
    (folder / "mira/1.png").unlink()
    (folder / "mira/2.png").write_text("no picture")
    assert load(folder, check_images=False).digest == before.digest


def test_wrong_hash_names_the_right_one(folder):
    edit(folder, sha(folder / "mira/1.png"), "f" * 64)
    only_problem(folder, 10, "not the picture that was registered", sha(folder / "mira/1.png"))


def test_malformed_hash(folder):
    edit(folder, sha(folder / "mira/1.png"), "abc")
    only_problem(folder, 10, "'abc'", "64 hexadecimal digits")


def test_single_file_without_hash_is_told_it(folder):
    edit(folder, f", sha256: {sha(folder / 'mira/1.png')}", "")
    only_problem(folder, 10, "has no sha256", f"sha256: {sha(folder / 'mira/1.png')}")


@pytest.mark.parametrize("split", ["harden", "attack", "reference"])
def test_a_protected_subject_needs_every_split(folder, split):
    lines = (folder / "R.yaml").read_text().split("\n")
    text = "\n".join(line for line in lines if not (f"split: {split}" in line and "mira" in line))
    (folder / "R.yaml").write_text(text)
    only_problem(folder, 8, "'mira'", f"no image has split {split}")


@pytest.mark.parametrize("split", ["attack", "reference"])
def test_a_control_needs_attack_and_reference(folder, split):
    lines = (folder / "R.yaml").read_text().split("\n")
    text = "\n".join(line for line in lines if not (f"split: {split}" in line and "tom" in line))
    (folder / "R.yaml").write_text(text)
    only_problem(folder, 16, "'tom'", f"no image has split {split}")


def test_same_picture_in_two_splits(folder):
    spoil(folder, "mira/1.png", lambda path: shutil.copy(folder / "mira/0.png", path))
    only_problem(folder, 10, "split attack and in split harden", "line 9")


def test_same_picture_twice_in_one_split(folder):
    line = (folder / "R.yaml").read_text().split("\n")[8]
    edit(folder, line, f"{line}\n{line}")
    only_problem(folder, 10, "listed twice", "line 9")


def test_same_picture_of_two_subjects(folder):
    spoil(folder, "tom/1.png", lambda path: shutil.copy(folder / "mira/0.png", path))
    only_problem(folder, 17, "control 'tom'", "subject 'mira'", "line 9")


@pytest.mark.parametrize(
    "copy",
    [
        lambda image: image.resize((200, 200)),
        lambda image: ImageEnhance.Brightness(image).enhance(1.1),
        ImageOps.mirror,
        lambda image: image.convert("L"),
    ],
)
def test_nearly_the_same_picture_in_two_splits(folder, copy):
    spoil(folder, "mira/2.png", lambda path: copy(blobs(0)).save(path))
    only_problem(folder, 11, "nearly the same", "mira/0.png", "line 9", "harden", "reference")


def test_nearly_the_same_picture_in_one_split_is_fine(folder):
    ImageOps.mirror(blobs(0)).save(folder / "mira/3.png")
    new = f"      - {{path: mira/3.png, sha256: {sha(folder / 'mira/3.png')}, split: harden}}\ncontrols:"
    edit(folder, "controls:", new)
    load(folder)


# --- folders, globs, datasets ----------------------------------------------------------------------------------------


def entry_of(folder, name):
    return f"path: {name}, sha256: {sha(folder / name)}"


@pytest.mark.parametrize("path", ["more", "more/", '"more/*.png"', '"mo?e/[ab].*"', "FOLDER/more", '"FOLDER/more/*"'])
def test_folder_and_glob(folder, path):
    (folder / "more/deeper").mkdir(parents=True)
    blobs(20).save(folder / "more/b.png")
    blobs(21).save(folder / "more/a.png")
    blobs(22).save(folder / "more/deeper/c.png")
    (folder / "more/notes.txt").write_text("not a picture, and not listed")
    edit(folder, entry_of(folder, "mira/1.png"), "path: " + path.replace("FOLDER", str(folder)))
    registry = load(folder)
    images = registry.subjects[0].images_of("attack")
    assert [image.path.name for image in images] == ["a.png", "b.png"]
    assert [image.sha256 for image in images] == [sha(folder / "more/a.png"), sha(folder / "more/b.png")]
    (warning,) = registry.warnings
    assert warning.startswith(f"{folder / 'R.yaml'}:10: ")
    assert "not pinned" in warning


def test_glob_characters_in_the_place_of_the_registry(tmp_path):
    place = tmp_path / "a[1]*"
    for number in range(3):
        (place / f"s{number}").mkdir(parents=True)
        blobs(number).save(place / f"s{number}/x.png")
    images = [f"{{path: 's{n}/*.png', split: {split}}}" for n, split in enumerate(["harden", "attack", "reference"])]
    (place / "R.yaml").write_text(
        f"version: 1\nsubjects:\n  - {{id: a, kind: person, class_noun: person, consent: {CONSENT},\n"
        f"     images: [{', '.join(images)}]}}\n"
    )
    assert len(load(place).subjects[0].images) == 3


def test_pictures_in_folders_are_checked_like_others(folder):
    (folder / "more").mkdir()
    shutil.copy(folder / "mira/0.png", folder / "more/a.png")
    edit(folder, entry_of(folder, "mira/1.png"), "path: more")
    only_problem(folder, 10, "more/a.png is in split attack and in split harden")


@pytest.mark.parametrize("path", ["empty", '"empty/*.png"', '"*.txt"'])
def test_folder_or_glob_without_pictures(folder, path):
    (folder / "empty").mkdir()
    (folder / "a.txt").write_text("x")
    edit(folder, entry_of(folder, "mira/1.png"), f"path: {path}")
    only_problem(folder, 10, "no picture")


def test_folder_with_a_hash(folder):
    edit(folder, "path: mira/1.png", "path: tom")
    only_problem(folder, 10, "belongs to a single file")


@pytest.mark.parametrize(
    ("entry", "word"),
    [
        ("sha256: SHA", "either `path` or `dataset`"),
        ("path: mira/1.png, dataset: imagefolder:x", "either `path` or `dataset`"),
        ("path: mira/1.png, sha256: SHA, revision: main", "`revision`"),
        ("path: mira/1.png, sha256: SHA, dataset_split: train", "`dataset_split`"),
        ("dataset: imagefolder:x, sha256: SHA", "single file"),
    ],
)
def test_contradictory_sources(folder, entry, word):
    edit(folder, entry_of(folder, "mira/1.png"), entry.replace("SHA", "f" * 64))
    only_problem(folder, 10, word)


@pytest.fixture
def offline(monkeypatch, tmp_path_factory):
    datasets = pytest.importorskip("datasets")
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache / "datasets")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return cache


def test_imagefolder_dataset(folder, offline):
    (folder / "data").mkdir()
    exif = Image.Exif()
    exif[274] = 6
    blobs(30).resize((96, 64)).save(folder / "data/a.jpg", exif=exif)
    blobs(31).convert("L").save(folder / "data/b.png")
    edit(folder, entry_of(folder, "mira/1.png"), "dataset: 'imagefolder:data', dataset_split: train")
    registry = load(folder)
    turned, grey = registry.subjects[0].images_of("attack")
    assert Image.open(turned.path).size == (64, 96)
    for image in (turned, grey):
        assert offline in image.path.parents
        assert image.sha256 == hashlib.sha256(Image.open(image.path).tobytes()).hexdigest()
        assert Image.open(image.path).mode == "RGB"
    assert "not pinned" in registry.warnings[0]
    assert load(folder).digest == registry.digest


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        ("imagefolder:nowhere", ["nowhere", "does not exist"]),
        ("'parquet:nowhere.parquet'", ["nowhere.parquet", "does not exist"]),
        ("someone/no-such-dataset", ["someone/no-such-dataset", "cannot be loaded", "Hub"]),
        ("'imagefolder:data', dataset_split: validation", ["validation"]),
    ],
)
def test_dataset_that_cannot_be_read(folder, offline, dataset, words):
    (folder / "data").mkdir()
    blobs(30).save(folder / "data/a.png")
    edit(folder, entry_of(folder, "mira/1.png"), f"dataset: {dataset}, revision: main")
    only_problem(folder, 10, *words)


# --- schema ----------------------------------------------------------------------------------------------------------


def test_committed_schema_is_current():
    committed = Path(__file__).parent.parent / "registries" / "schema.json"
    assert json.loads(committed.read_text()) == json_schema(), (
        "run: guardsmith registry schema --output registries/schema.json"
    )


def test_schema_describes_every_field():
    schema = json_schema()
    for model in [schema, *schema["$defs"].values()]:
        assert model["additionalProperties"] is False
        for name, field in model["properties"].items():
            assert "description" in field, name


# --- add_subject -----------------------------------------------------------------------------------------------------


def photos(place, count, first=100):
    place.mkdir(parents=True)
    for number in range(count):
        blobs(first + number).save(place / f"{number:02}.png")
    return place


MIRA = {"consent_basis": "request", "reference": "T-1", "today": TODAY}


def test_add_creates_a_registry(tmp_path):
    subject = add_subject(
        tmp_path / "R.yaml", photos(tmp_path / "mira", 9), "mira", "person", "person", identifiers=["sks"], **MIRA
    )
    registry = load(tmp_path)
    assert registry.subjects == (subject,)
    assert registry.warnings == ()
    assert subject.consent.granted_on == TODAY
    assert subject.identifiers == ("sks",)
    names = {
        split: [image.path.name for image in subject.images_of(split)] for split in ("harden", "attack", "reference")
    }
    assert names == {
        "harden": ["00.png", "01.png", "02.png", "03.png", "04.png"],
        "attack": ["05.png", "06.png"],
        "reference": ["07.png", "08.png"],
    }
    written = yaml.safe_load((tmp_path / "R.yaml").read_text())
    assert written["subjects"][0]["images"][0] == {
        "path": "mira/00.png",
        "sha256": sha(tmp_path / "mira/00.png"),
        "split": "harden",
    }
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["R.yaml"]


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("ending", [True, False])
@pytest.mark.parametrize("control", [True, False])
def test_add_keeps_every_line(folder, newline, ending, control):
    text = "# a comment\n" + (folder / "R.yaml").read_text().replace("controls:", "\n# about controls\ncontrols:")
    text = (text if ending else text.rstrip("\n")).replace("\n", newline)
    (folder / "R.yaml").write_bytes(text.encode())
    before = load(folder)
    (folder / "R.yaml").chmod(0o640)
    add_subject(folder / "R.yaml", photos(folder / "ann", 6), "ann", "person", "old person", control=control, **MIRA)
    after = load(folder)
    if control:
        assert after.subjects == before.subjects
        assert after.controls[:-1] == before.controls
        assert after.controls[-1].id == "ann"
        assert after.controls[-1].images_of("harden") == ()
    else:
        assert after.controls == before.controls
        assert after.subjects[:-1] == before.subjects
        assert after.subjects[-1].id == "ann"
    new = (folder / "R.yaml").read_bytes().decode()
    rest = iter(new.split(newline))
    assert all(line in rest for line in text.split(newline) if line)  # all old lines, in order
    assert new.count("\r") == (new.count("\n") if newline == "\r\n" else 0)
    assert new.index("# about controls") + len("# about controls" + newline) == new.index("controls:" + newline)
    assert (folder / "R.yaml").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize(
    "tail", ["", "controls:\n", "controls: []\n", "controls: []  # none yet\n", "controls:  # none yet\n"]
)
def test_add_the_first_control(folder, tail):
    text = (folder / "R.yaml").read_text()
    (folder / "R.yaml").write_text(text[: text.index("controls:")] + tail)
    add_subject(folder / "R.yaml", photos(folder / "ann", 4), "ann", "person", "person", control=True)
    assert [control.id for control in load(folder).controls] == ["ann"]
    assert tail.partition("#")[2] in (folder / "R.yaml").read_text()


def test_add_keeps_unusual_indentation(folder):
    text = (folder / "R.yaml").read_text()
    data = yaml.safe_load(text)
    (folder / "R.yaml").write_text(yaml.safe_dump(data, sort_keys=False))  # lists at the column of their key
    add_subject(folder / "R.yaml", photos(folder / "ann", 6), "ann", "person", "person", **MIRA)
    assert [subject.id for subject in load(folder).subjects] == ["mira", "ann"]


def test_add_uses_folders_named_like_splits(tmp_path):
    for number, split in enumerate(["harden", "attack", "reference"]):
        photos(tmp_path / "mira" / split, number + 1, first=10 * number)
    subject = add_subject(tmp_path / "R.yaml", tmp_path / "mira", "mira", "person", "person", **MIRA)
    assert [len(subject.images_of(split)) for split in ("harden", "attack", "reference")] == [1, 2, 3]
    assert subject.images_of("attack")[0].path == tmp_path / "mira/attack/00.png"
    blobs(99).save(tmp_path / "mira/loose.png")
    with pytest.raises(UserError, match="loose"):
        add_subject(tmp_path / "R.yaml", tmp_path / "mira", "other", "person", "person", **MIRA)


@pytest.mark.parametrize(
    ("count", "ratios", "sizes"),
    [
        (3, None, (1, 1, 1)),
        (16, None, (8, 4, 4)),
        (10, {"harden": 8, "attack": 1, "reference": 1}, (8, 1, 1)),
        (5, {"harden": 98, "attack": 1, "reference": 1}, (3, 1, 1)),
        (4, {"harden": 0.1, "attack": 0.5, "reference": 0.4}, (1, 2, 1)),
    ],
)
def test_ratios(tmp_path, count, ratios, sizes):
    subject = add_subject(
        tmp_path / "R.yaml", photos(tmp_path / "mira", count), "mira", "person", "person", ratios=ratios, **MIRA
    )
    assert tuple(len(subject.images_of(split)) for split in ("harden", "attack", "reference")) == sizes


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"id": "mira"}, ["taken"]),
        ({"id": "No"}, ["'No'"]),
        ({"kind": "persn"}, ["did you mean 'person'"]),
        ({"class_noun": "Person"}, ["lowercase"]),
        ({"consent_basis": None, "reference": None}, ["needs a consent"]),
        ({"reference": None}, ["'reference' is missing"]),
        ({"expires_on": date(2026, 5, 1)}, ["before it begins"]),
        ({"granted_on": date(2026, 1, 1), "expires_on": date(2026, 5, 1)}, ["expired"]),
        ({"folder": "mira"}, ["is also a picture of"]),
        ({"folder": "tom"}, ["holds 2 pictures"]),
        ({"folder": "nowhere"}, ["not a folder"]),
        ({"ratios": {"harden": 1, "attack": 0, "reference": 1}}, ["no image has split attack"]),
        ({"ratios": {"harden": 0}}, ["zero"]),
    ],
)
def test_add_changes_nothing_when_the_result_would_be_wrong(folder, change, words):
    photos(folder / "ann", 6)
    before = (folder / "R.yaml").read_text()
    arguments = {"folder": "ann", "id": "ann", "kind": "person", "class_noun": "person", **MIRA, **change}
    arguments["folder"] = folder / arguments["folder"]
    with pytest.raises(UserError) as caught:
        add_subject(folder / "R.yaml", **arguments)
    for word in words:
        assert word in str(caught.value)
    assert (folder / "R.yaml").read_text() == before
    assert sorted(path.name for path in folder.iterdir()) == ["R.yaml", "ann", "mira", "tom"]


@pytest.mark.parametrize("control", [False, True])
def test_add_speaks_of_lines_that_are_in_the_file(folder, control):
    """The new entry has no lines: it was not written, and what stands below its place is not moved."""
    edit(folder, "kind: character", "kind: charactr")
    rows = (folder / "R.yaml").read_text().splitlines()
    photos(folder / "ann", 4)
    (folder / "ann/00.png").write_bytes((folder / "tom/2.png").read_bytes())
    with pytest.raises(UserError) as caught:
        add_subject(folder / "R.yaml", folder / "ann", "tom", "person", "Person", control=control, **MIRA)
    first, *others = str(caught.value).splitlines()
    assert first == f"{folder / 'R.yaml'} was not changed, because 'tom' cannot be added:"
    assert sum(line.startswith("the new entry: class_noun is 'Person', but a class noun is") for line in others) == 1
    taken = next(line for line in others if "is taken" in line)
    assert taken == f"the new entry: the id 'tom' is taken (line {rows.index('  - id: tom') + 1}): choose another"
    picture = next(number for number, row in enumerate(rows, 1) if "tom/2.png" in row)
    if control:
        assert any(f"the new entry: {folder / 'ann/00.png'}" in line and f"(line {picture})" in line for line in others)
    else:
        start = f"{folder / 'R.yaml'}:{picture}: control 'tom': "
        assert any(line.startswith(start) and line.endswith("(the new entry): remove one") for line in others)
    [own] = [line for line in others if "'charactr'" in line]
    place, number, _ = own.split(":", 2)
    assert place == str(folder / "R.yaml") and "charactr" in rows[int(number) - 1]


def test_add_names_no_line_of_a_file_that_is_not_there(tmp_path):
    photos(tmp_path / "mira", 4)
    for options, words in (
        ({"class_noun": "Person"}, "the new entry: class_noun is 'Person'"),
        ({"consent_basis": None, "reference": None}, "the new entry: a protected subject needs a consent"),
        ({"control": True}, "the registry has no subjects yet: add a protected one before a control"),
    ):
        arguments = {"id": "mira", "kind": "person", "class_noun": "person", **MIRA, **options}
        with pytest.raises(UserError) as caught:
            add_subject(tmp_path / "R.yaml", tmp_path / "mira", **arguments)
        first, *others = str(caught.value).splitlines()
        assert first == f"{tmp_path / 'R.yaml'} was not written, because 'mira' cannot be added:"
        assert len(others) == 1 and others[0].startswith(words)
        assert not (tmp_path / "R.yaml").exists()


def test_add_near_duplicates_across_the_splits_are_refused(tmp_path):
    photos(tmp_path / "mira", 6)
    ImageOps.mirror(blobs(100)).save(tmp_path / "mira/99.png")
    with pytest.raises(UserError, match="nearly the same"):
        add_subject(tmp_path / "R.yaml", tmp_path / "mira", "mira", "person", "person", **MIRA)
    assert not (tmp_path / "R.yaml").exists()


def test_add_a_control_alone_protects_nobody(tmp_path):
    with pytest.raises(UserError, match="has no subjects"):
        add_subject(tmp_path / "R.yaml", photos(tmp_path / "tom", 4), "tom", "person", "person", control=True)


@pytest.mark.parametrize("text", ["{version: 1, subjects: []}\n", "version: 1\nsubjects: [{id: a}]\n"])
def test_add_to_a_file_in_brackets_is_refused(tmp_path, text):
    (tmp_path / "R.yaml").write_text(text)
    with pytest.raises(UserError):
        add_subject(tmp_path / "R.yaml", photos(tmp_path / "ann", 4), "ann", "person", "person", **MIRA)
    assert (tmp_path / "R.yaml").read_text() == text


def test_add_is_not_misled_by_an_alias_or_a_block_text_at_the_end(folder):
    edit(folder, "TICKET-17", "TICKET-17\n")
    text = (folder / "R.yaml").read_text()
    head, tail = text[: text.index("controls:")], "    class_noun: |-\n      person\n      # tail\n"
    broken = head.replace("    class_noun: person\n", "") + tail
    (folder / "R.yaml").write_text(broken)
    with pytest.raises(UserError, match="cannot be extended safely"):
        add_subject(folder / "R.yaml", photos(folder / "ann", 4), "ann", "person", "person", **MIRA)
    assert (folder / "R.yaml").read_text() == broken


def test_parquet_dataset(folder, offline):
    """A table of encoded pictures, as datasets writes them."""
    import datasets

    blobs(30).save(folder / "a.png")
    files = {"image": [{"bytes": (folder / "a.png").read_bytes(), "path": None}]}
    table = datasets.Dataset.from_dict(files, features=datasets.Features({"image": datasets.Image()}))
    table.to_parquet(folder / "some.parquet")
    edit(folder, entry_of(folder, "mira/1.png"), "dataset: 'parquet:some.parquet'")
    [image] = load(folder).subjects[0].images_of("attack")
    assert image.sha256 == hashlib.sha256(blobs(30).tobytes()).hexdigest()


# --- as files and pictures come --------------------------------------------------------------------------------------


def test_nearly_the_same_picture_of_two_subjects(folder):
    spoil(folder, "tom/2.png", lambda path: ImageOps.mirror(blobs(1, 200)).save(path))
    only_problem(folder, 18, "control 'tom'", "nearly the same", "mira/1.png", "subject 'mira'", "line 10")


def test_a_registry_path_that_is_a_folder_is_a_sentence_when_something_is_added(folder):
    (folder / "there").mkdir()
    photos(folder / "ann", 4)
    for place, words in ((folder / "there", "is a folder"), (folder / "none" / "R.yaml", "create it")):
        with pytest.raises(UserError, match=words):
            add_subject(place, folder / "ann", "ann", "person", "person", **MIRA)
    assert not any((folder / "there").iterdir())


@pytest.mark.parametrize("newline", ["\r", "\r\n", "\n"])
@pytest.mark.parametrize("ending", [True, False])
def test_add_to_a_file_with_any_line_ends(folder, newline, ending):
    text = "# café\n" + (folder / "R.yaml").read_text()
    text = (text if ending else text.rstrip("\n")).replace("\n", newline)
    (folder / "R.yaml").write_bytes(text.encode())
    before = load(folder)
    add_subject(folder / "R.yaml", photos(folder / "ann", 6), "ann", "person", "person", **MIRA)
    assert load(folder).subjects[:-1] == before.subjects
    new = (folder / "R.yaml").read_bytes().decode()
    other = {"\r": "\n", "\n": "\r", "\r\n": None}[newline]
    assert other is None or other not in new
    rest = iter(new.split(newline))
    assert all(line in rest for line in text.split(newline) if line)


def test_add_to_a_text_with_line_ends_that_only_yaml_knows(folder):
    text = (
        (folder / "R.yaml").read_text().replace("subjects:  # protected\n", "subjects:  # protected\u2028# one more\n")
    )
    (folder / "R.yaml").write_text(text)
    before = load(folder)
    add_subject(folder / "R.yaml", photos(folder / "ann", 6), "ann", "person", "person", **MIRA)
    assert load(folder).subjects[:-1] == before.subjects
    assert "# protected\u2028# one more\n" in (folder / "R.yaml").read_text()


def test_links_that_loop_are_sentences(folder):
    loop = folder / "mira" / "loop.png"
    loop.symlink_to(loop)
    edit(folder, entry_of(folder, "mira/1.png"), f"path: mira/loop.png, sha256: {'f' * 64}")
    only_problem(folder, 10, "loop.png cannot be read")
    (folder / "R.yaml").write_text(good(folder))
    edit(folder, entry_of(folder, "mira/1.png"), "path: mira/loop.png")
    assert len(problems(folder)) == 1


def test_pictures_of_any_name_are_read(folder):
    more = folder / "more"
    more.mkdir()
    blobs(20).save(more / "a.png")
    (more / "a.png").rename(more / os.fsdecode(b"caf\xe9.png"))
    edit(folder, entry_of(folder, "mira/1.png"), "path: more")
    assert len(load(folder).subjects[0].images_of("attack")) == 1
    other = photos(folder / "other", 3, first=300)
    (other / "00.png").rename(other / os.fsdecode(b"caf\xe9.png"))
    before = (folder / "R.yaml").read_text()
    with pytest.raises(UserError, match="is not UTF-8, so it cannot be written in a registry") as caught:
        add_subject(folder / "R.yaml", other, "ann", "person", "person", **MIRA)
    assert "\n" not in str(caught.value) and (folder / "R.yaml").read_text() == before


def test_numbered_pictures_stay_in_their_order():
    names = ["IMG_10.png", "IMG_2.png", "IMG_1.png", "a.png", "2.png", "10.png"]
    assert [file.name for file in sorted(map(Path, names), key=_numbered)] == [
        "2.png", "10.png", "IMG_1.png", "IMG_2.png", "IMG_10.png", "a.png",
    ]  # fmt: skip


@pytest.mark.parametrize(("hours", "fine"), [(0.01, True), (None, True), (30.0, False)])
def test_a_consent_holds_through_its_last_day(hours, fine):
    today = date(2026, 5, 4)
    consent = SimpleNamespace(expires_on=today)
    registry = SimpleNamespace(subjects=[SimpleNamespace(id="mira", consent=consent)])
    said = []
    plan = SimpleNamespace(add=lambda what, text, status="fine": said.append((status, text)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("guardsmith.evaluation.forecast.datetime", Noon)
        _look_at_consents(plan, registry, hours, today)
    assert [status for status, _ in said] == ["fine" if fine else "problem"]
    assert hours or "unknown" in said[0][1]


class Noon(datetime):
    """Whatever the clock says."""

    @classmethod
    def now(cls, tz=None):
        return cls(2026, 5, 4, 12, tzinfo=tz)
