"""Folders of pictures as phones and cameras leave them: what is read, and that the rest is named."""

import json
import shutil
from datetime import date
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import assert_one_sentence

from guardsmith.cli.app import main
from guardsmith.core.errors import UserError
from guardsmith.core.images import open_image
from guardsmith.core.picture_folders import list_pictures, select_pictures, skipped_sentence
from guardsmith.hardening.data import load_negatives
from guardsmith.pictures.cloak_attack import check_references
from guardsmith.registry.add import add_subject
from guardsmith.registry.loader import load_registry

TODAY = date(2026, 6, 1)
CONSENT = {"consent_basis": "request", "reference": "T-1", "today": TODAY}


def blobs(seed, size=64):
    small = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC)


def save_heic(image, file):
    heif = pytest.importorskip("pillow_heif")
    heif.from_pillow(image).save(file, quality=90)


@pytest.fixture
def phone(tmp_path):
    """What a phone's folder holds: 4 pictures that everyone reads, 6 of newer kinds, and other things."""
    folder = tmp_path / "phone"
    (folder / "more" / "deeper").mkdir(parents=True)
    (folder / "notes").mkdir()
    for number, name in enumerate(["a.JPG", "b.png", "c.jpeg", "d.webp", "e.jfif", "f.avif", "g.jp2", "h.jpe"]):
        kind = {".jfif": "JPEG", ".jpe": "JPEG"}.get(Path(name).suffix)
        blobs(number).save(folder / name, format=kind)
    save_heic(blobs(8), folder / "i.heic")
    save_heic(blobs(9), folder / "j.HIF")
    blobs(10).save(folder / "more" / "deeper" / "k.png")
    (folder / "l.mov").write_bytes(b"film")
    (folder / "m.txt").write_text("notes")
    (folder / "notes" / "n.txt").write_text("notes")
    for hidden in (".DS_Store", "._a.JPG", "._i.heic"):
        (folder / hidden).write_bytes(b"\0\5\x16\7Mac OS X")
    return folder


def test_a_phones_folder_is_read_and_the_rest_is_named(phone):
    listing = list_pictures(phone)
    assert [file.name for file in listing.pictures] == [
        "a.JPG", "b.png", "c.jpeg", "d.webp", "e.jfif", "f.avif", "g.jp2", "h.jpe", "i.heic", "j.HIF"
    ]  # fmt: skip
    assert listing.skipped == ["l.mov", "m.txt", "more/"], "a folder without pictures is no loss"
    sentence = skipped_sentence("phone", listing.skipped)
    assert sentence == ("3 other entries of phone were left out (l.mov, m.txt, more/); name sub-folders on their own")
    assert skipped_sentence("x", ["1", "2", "3", "4"]) == "4 other entries of x were left out (1, 2, 3, ...)"


@pytest.mark.parametrize(("name", "seed"), [("e.jfif", 4), ("f.avif", 5), ("g.jp2", 6), ("i.heic", 8), ("j.HIF", 9)])
def test_newer_kinds_show_what_they_show(phone, name, seed):
    opened = np.asarray(open_image(phone / name), dtype=float)
    assert np.abs(opened - np.asarray(blobs(seed), dtype=float)).mean() < 10


def test_a_heic_file_is_turned_upright(tmp_path):
    heif = pytest.importorskip("pillow_heif")
    upright = Image.new("RGB", (48, 64), "white")
    upright.paste((255, 0, 0), (0, 0, 24, 32))
    exif = Image.Exif()
    exif[274] = 6
    heif.from_pillow(upright.transpose(Image.Transpose.ROTATE_90)).save(tmp_path / "a.heic", exif=exif.tobytes())
    red = open_image(tmp_path / "a.heic").getpixel((5, 5))
    assert red[0] > 200 and red[1] < 60


def test_without_pillow_heif_the_sentence_names_the_extra(phone, monkeypatch):
    from guardsmith.core import images

    monkeypatch.setattr(images, "_heif_is_known", lambda: False)
    monkeypatch.setattr(images.Image, "open", lambda data: (_ for _ in ()).throw(images.UnidentifiedImageError("x")))
    with pytest.raises(UserError, match=r"i\.heic is HEIC, which needs pillow-heif: pip install guardsmith\[heic\]"):
        open_image(phone / "i.heic")


def test_registries_say_what_a_folder_leaves_out(phone, tmp_path):
    said = []
    add_subject(tmp_path / "R.yaml", phone, "mira", "person", "person", on_warning=said.append, **CONSENT)
    assert said == [skipped_sentence(phone, ["l.mov", "m.txt", "more/"])]
    registry = load_registry(tmp_path / "R.yaml", today=TODAY)
    assert len(registry.subjects[0].images) == 10
    text = (tmp_path / "R.yaml").read_text()
    start = text.index("      - {path: phone/a.JPG")
    other = tmp_path / "other"
    other.mkdir()
    for number in range(2):
        blobs(20 + number).save(other / f"{number}.png")
    (other / "x.mov").write_bytes(b"film")
    text = (
        text[:start]
        + "      - {path: phone, split: harden}\n      - {path: 'other/0.*', split: attack}\n"
        + ("      - {path: other, split: reference}\n")
    )
    (tmp_path / "R.yaml").write_text(text.replace("'other/0.*'", "'other/0.png*'"))
    shutil.move(other / "0.png", other / "0.pngs")
    with pytest.raises(UserError, match="no picture matches"):
        load_registry(tmp_path / "R.yaml", today=TODAY)
    (tmp_path / "R.yaml").write_text(text.replace("{path: 'other/0.*', split: attack}", "{path: third, split: attack}"))
    (tmp_path / "third").mkdir()
    blobs(30).save(tmp_path / "third" / "z.avif")
    registry = load_registry(tmp_path / "R.yaml", today=TODAY)
    first, second, third = registry.warnings
    assert "3 other entries of phone were left out (l.mov, m.txt, more/)" in first
    assert "left out" not in second
    assert "2 other entries of other were left out (0.pngs, x.mov)" in third


@pytest.mark.parametrize(
    ("count", "splits"), [(5, ["attack", "reference"]), (3, ["harden", "attack", "reference"]), (8, [])]
)
def test_splits_of_one_picture_are_warned_of(tmp_path, capsys, count, splits):
    folder = tmp_path / "mira"
    folder.mkdir()
    for number in range(count):
        blobs(number).save(folder / f"{number}.png")
    said = []
    add_subject(tmp_path / "R.yaml", folder, "mira", "person", "person", on_warning=said.append, **CONSENT)
    assert [sentence.split()[1] for sentence in said] == splits
    assert main(["check", str(tmp_path / "R.yaml"), "--today", "2026-06-01"]) == 0
    assert [line.split()[2] for line in capsys.readouterr().err.splitlines() if "one picture only" in line] == splits


def test_a_bad_picture_of_a_folder_is_left_out_and_a_named_one_is_an_error(phone):
    (phone / "b.png").write_bytes((phone / "b.png").read_bytes()[:300])
    (phone / "c.jpeg").write_text("hello")
    files, left_out, count = select_pictures([phone])
    assert len(files) == 8 and count == 5
    assert left_out[0].startswith("3 other entries") and "b.png" in left_out[1] and "c.jpeg" in left_out[2]
    with pytest.raises(UserError) as caught:
        select_pictures([phone / "a.JPG", phone / "b.png", phone / "c.jpeg"])
    assert [("b.png" in line, "c.jpeg" in line) for line in str(caught.value).split("\n")] == [
        (True, False),
        (False, True),
    ]
    empty = phone / "notes"
    with pytest.raises(UserError, match=r"there is no picture in .*notes that can be used"):
        select_pictures([empty])


def test_cloak_goes_on_and_says_what_it_left_out(tmp_path, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(2):
        blobs(number).save(folder / f"{number}.png")
    (folder / "broken.png").write_text("hello")
    (folder / "._0.png").write_bytes(b"Mac OS X")
    (folder / "film.mov").write_bytes(b"x")
    code = main(["cloak", str(folder), "--output", str(tmp_path / "out"), "--class-noun", "person", "--method", "rid"])
    err = capsys.readouterr().err
    assert code == 0, err
    assert "broken.png is not a picture" in err and "(film.mov)" in err
    assert "wrote 2 pictures" in err and "2 entries were left out" in err
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["0.png", "1.png", "report"]
    left_out = json.loads((tmp_path / "out" / "report" / "cloak.json").read_text())["left_out"]
    assert len(left_out) == 2 and "broken.png" in left_out[1]


def test_negatives_go_on_without_a_bad_picture(tiny_v, tmp_path, capsys):
    folder = tmp_path / "others"
    folder.mkdir()
    for number in range(3):
        blobs(number).save(folder / f"{number}.png")
    whole, digest = load_negatives(tiny_v, str(folder))
    (folder / "1a.png").write_text("hello")
    (folder / "._1.png").write_bytes(b"Mac OS X")
    again, same = load_negatives(tiny_v, str(folder))
    assert torch.equal(whole, again) and digest == same
    err = capsys.readouterr().err
    assert err.count("warning") == 1 and "1a.png is not a picture" in err
    for number in range(3):
        (folder / f"{number}.png").write_text("hello")
    with pytest.raises(UserError, match="that can be used"):
        load_negatives(tiny_v, str(folder))


def test_negatives_may_not_show_a_protected_picture(tiny_v, tmp_path):
    folder = tmp_path / "others"
    folder.mkdir()
    blobs(1).save(tmp_path / "mira.png")
    blobs(1, 200).save(folder / "again.jpg", quality=60)
    blobs(2).save(folder / "other.png")
    load_negatives(tiny_v, str(folder), [])
    with pytest.raises(
        UserError, match=r"again\.jpg shows the same as .*mira.png, a picture of a protected subject"
    ) as caught:
        load_negatives(tiny_v, str(folder), [tmp_path / "mira.png"])
    assert_one_sentence(caught.value)


def test_references_may_not_be_copies_of_what_is_trained_on(tmp_path):
    blobs(1).save(tmp_path / "a.png")
    blobs(2).save(tmp_path / "b.png")
    blobs(1, 100).save(tmp_path / "copy.jpg", quality=70)
    check_references([tmp_path / "a.png"], [tmp_path / "b.png"])
    with pytest.raises(UserError, match=r"copy\.jpg shows the same as"):
        check_references([tmp_path / "a.png"], [tmp_path / "b.png", tmp_path / "copy.jpg"])
