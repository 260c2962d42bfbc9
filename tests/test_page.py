"""The page for people: what it shows, what it leaves out, and how it looks in a browser."""

import base64
import datetime
import html
import io
import json
import re
import shutil
from dataclasses import asdict

import numpy as np
import pytest
from PIL import Image
from reports import check as plain_check
from reports import demo_report, report_data

from guardsmith.evaluation.units import Unit
from guardsmith.gate.calibration import Levels
from guardsmith.gate.statistics import Interval
from guardsmith.registry.loader import Subject
from guardsmith.registry.types import Consent
from guardsmith.registry.types import Image as Photo
from guardsmith.reports import html as page_module
from guardsmith.reports import terminal
from guardsmith.reports.html import CURVE, Evidence, curve, heat, may_be_shown, page_data, save_page
from guardsmith.reports.report import Report
from guardsmith.reports.strips import drawn_strip
from guardsmith.reports.terminal import save_grid

LEVELS = Levels(chance=0.0, chance_high=0.15, genuine=0.6)
RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def plain(file, colour):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 64), colour).save(file)
    return file


def make_subject(folder, name="mira", kind="character", basis=None):
    photos = tuple(
        Photo(path=plain(folder / f"{name}-{split}-{i}.png", BLUE), sha256="0", split=split)
        for split in ("attack", "reference")
        for i in range(2)
    )
    given = None if basis is None else Consent(basis=basis, reference="x", granted_on=datetime.date(2026, 1, 1))
    return Subject(id=name, kind=kind, class_noun="person", consent=given, images=photos)


def make_unit(folder, subject="mira", side="base", identifier="zwx", scores=(0.5, 0.4, 0.3), points=None, colour=RED):
    points = {1.0: 10, 4.0: 40} if points is None else points
    unit = Unit(
        side=side, root=str(folder / side), model="m", model_digest="0", subject=subject, class_noun="person",
        attack_images=(), reference_images=(), images_digest="0", attack="lora", params={"steps": 40}, evaluation_points=points,
        label="lora-4", identifier=identifier, seed=0, images=len(scores), class_pictures="", class_images=0, sampling={},
    )  # fmt: skip
    for steps in points.values():
        for number in range(len(scores)):
            plain(unit.folder / "images" / str(steps) / f"{number:03d}.png", colour)
    told = {"identity": {str(steps): list(scores) for steps in points.values()}, "digest": unit.digest}
    (unit.folder / "scores.json").write_text(json.dumps(told))
    return unit


def level(mean):
    return Interval(mean, mean - 0.05, mean + 0.05, 3, 0)


def check(name, subject, attack, status, value, limit, sentence="a sentence"):
    return plain_check(name, subject, attack, status, value, value - 0.05, value + 0.05, limit, sentence)


@pytest.fixture
def case(tmp_path):
    """One protected subject that came back after four times the steps, and one control."""
    mira, nora = make_subject(tmp_path), make_subject(tmp_path, "nora")
    units = [
        make_unit(tmp_path, "mira", "base", points={1.0: 10}),
        make_unit(tmp_path, "mira", "hardened", scores=(0.1, None, 0.2), colour=GREEN),
        make_unit(tmp_path, "nora", "base", points={1.0: 10}),
        make_unit(tmp_path, "nora", "hardened", points={1.0: 10}),
    ]
    scores = [
        {"side": unit.side, "subject": unit.subject, "attack": "lora-4", "evaluation_point": point, "units": [],
         "interval": asdict(level(0.5 if (unit.side, point) == ("base", 1.0) else 0.1 * point))}
        for unit in units for point in unit.evaluation_points
    ]  # fmt: skip
    report = report_data(
        checks=[
            check("attack works on base", "mira", "lora-4", "pass", 0.5, 0.3),
            check("protected", "mira", "lora-4", "inconclusive", 0.1, 0.15),
            check("protected", "mira", "lora-4, 4 x steps", "fail", 0.4, 0.15, "it <script>came</script> back"),
            check("control learnable", "nora", "lora-4", "pass", 1.0, 0.9),
            check("benign prompts (KID)", "", "", "pass", 1.1, 2.0),
        ],
        scores=scores,
        failed_units={"base/mira/lora-4/zwx/0": "RuntimeError: no <b>memory</b>"},
        recipe={"verify": {"attacks": {"lora-4": {"name": "lora", "params": {"steps": 10}}}, "identifiers": ["zwx"],
                           "evaluation_points": [1.0, 4.0], "seeds": [0], "images_per_unit": 3}},
    )  # fmt: skip
    return report, units, [mira], [nora]


def made(case, tmp_path, include_images=False):
    report, units, protected, controls = case
    pair = ("a photo of <a> dog", Image.new("RGB", (64, 64), RED), Image.new("RGB", (64, 64), GREEN))
    file = tmp_path / "report.html"
    evidence = Evidence(Report.parse(report), units, include_images)
    save_page(file, page_data(evidence, protected, controls, [pair]))
    return file.read_text()


def colours(text):
    """Mean colour of every picture on a page, in order."""
    found = []
    for data in re.findall(r'<img src="data:image/webp;base64,([^"]*)"', text):
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"), float)
        found.append("RGB"[int(pixels.mean((0, 1)).argmax())])
    return "".join(found)


def test_a_page_of_many_subjects_has_pictures_of_the_first_and_numbers_of_all(case, tmp_path, monkeypatch):
    report, units, (mira,), controls = case
    more = [make_subject(tmp_path, f"s{number}") for number in range(5)]
    units = [*units, *(make_unit(tmp_path, subject.id, "hardened", colour=GREEN) for subject in more)]
    for number, subject in enumerate(more):
        report["checks"].append(
            check("protected", subject.id, "lora-4", "fail", 0.4, 0.15, f"number {number} came back")
        )
    case = report, units, [mira, *more], controls
    whole = made(case, tmp_path)
    assert "to keep this page small" not in whole
    monkeypatch.setattr(page_module, "MOST", 1)
    text = made(case, tmp_path)
    sections = {
        name: text[text.index(f'id="{name}"') :].split("</details>")[0] for name in ("mira", "s0", "s4", "nora")
    }
    for name, with_pictures in (("mira", True), ("s0", False), ("s4", False), ("nora", True)):
        assert ("<img" in sections[name]) == with_pictures, name
        assert ("Pictures are left out to keep this page small." in sections[name]) != with_pictures
    assert "Pictures of 5 more are left out to keep this page small; they are beside it" in text
    failed = text[text.index('id="failures"') : text.index('id="matrix"')]
    assert failed.count("<details") == 7 and all(f"number {number} came back" in failed for number in range(5))
    assert len(re.findall("<img", failed.split("<details")[1])) and not re.findall("<img", failed.split("<details")[2])
    assert len(text) < 0.7 * len(whole)


def test_the_grid_has_the_first_subjects_only(case, tmp_path, monkeypatch):
    _, units, protected, controls = case
    heights = []
    for most in (20, 1):
        monkeypatch.setattr(terminal, "MOST", most)
        save_grid(tmp_path / "grid.png", protected * 3, controls, units, 64)
        heights.append(Image.open(tmp_path / "grid.png").height)
    assert heights[0] > heights[1] > 0


@pytest.mark.parametrize(
    ("kind", "basis", "asked", "shown"),
    [
        ("person", "request", False, False),
        ("person", None, False, False),
        ("person", "request", True, True),
        ("person", "invented", False, True),
        ("character", None, False, True),
    ],
)
def test_a_real_person_is_shown_only_when_asked_for(tmp_path, kind, basis, asked, shown):
    assert may_be_shown(make_subject(tmp_path, kind=kind, basis=basis), asked) is shown


def test_the_verdict_comes_first_and_then_what_failed_worst_first(case, tmp_path):
    text = made(case, tmp_path)
    places = [text.index(part) for part in (
        "must not be released", "What did not pass", "protected: mira, lora-4, 4 x steps", "protected: mira, lora-4<",
        "How much of a protected subject comes back", "Subject by subject", ">Benign prompts", "How it was measured",
    )]  # fmt: skip
    assert places == sorted(places)
    assert (
        "attacks on protected subjects fail on the hardened model: 0 of 2 checks passed, 1 failed, 1 undecided" in text
    )
    assert "unprotected subjects can still be learnt: 1 of 1 checks passed<" in text


def test_pictures_stand_in_the_rows_they_belong_to(case, tmp_path):
    text = made(case, tmp_path)
    # At a glance: real, base, hardened, the control after the attack. Failed at 4 x: real, hardened. Undecided: real, base,
    # hardened. Then the sections of mira and nora; then the pair.
    failed, undecided = "BB" + "GGG", "BB" + "RRR" + "GGG"
    opening = "BB" + "RRR" + "GGG" + "RRR"
    assert colours(text) == opening + failed + undecided + "BB" + "RRR" + "GGG" + "BB" + "RRR" + "RRR" + "RG"
    assert text.count("<img ") == text.count(" alt=") == len(colours(text))
    assert "mira as drawn after lora-4 on the hardened model, similarity not scored" in text


def test_a_person_is_left_out_everywhere(case, tmp_path):
    report, units, _, controls = case
    case = report, units, [make_subject(tmp_path, kind="person", basis="request")], controls
    text = made(case, tmp_path)
    assert colours(text) == "BB" + "RRR" + "RRR" + "RG", "the control and the pair only"
    assert "Pictures of mira are left out" in text
    assert "G" in colours(made(case, tmp_path, include_images=True))[:-1]


def test_nothing_on_the_page_is_taken_for_markup_or_comes_from_elsewhere(case, tmp_path):
    text = made(case, tmp_path)
    assert "<script" not in text
    assert html.escape("it <script>came</script> back") in text
    assert html.escape("no <b>memory</b>") in text
    assert html.escape("a photo of <a> dog") in text
    assert not re.search(r'(?:src|href)="(?!data:|#)', text)
    assert "url(" not in text
    assert str(tmp_path) not in text, "no path of this machine"
    assert not list(tmp_path.glob(".report*")), "nothing half-written is left"


def test_an_attack_that_did_not_run_is_said_to_be_missing(case, tmp_path):
    report, units, protected, controls = case
    (units[1].folder / "scores.json").unlink()
    report["scores"] = [told for told in report["scores"] if (told["side"], told["subject"]) != ("hardened", "mira")]
    text = made((report, units, protected, controls), tmp_path)
    assert "no pictures: the attack did not run" in text
    assert text.count("not scored") == 2, "both cells of the matrix"


def test_a_strip_takes_the_first_pictures_of_every_unit_in_turn(tmp_path):
    units = [
        make_unit(tmp_path, identifier="zwx", scores=(0.9, 0.8, 0.7)),
        make_unit(tmp_path, identifier="olis", scores=(0.1, 0.2, 0.3)),
    ]
    assert [picture.caption for picture in drawn_strip(units, "t", 1.0, 4).pictures] == ["0.90", "0.80", "0.10", "0.20"]
    assert [picture.caption for picture in drawn_strip(units, "t", 1.0, 3).pictures] == ["0.90", "0.80", "0.10"]


def test_a_curve_by_hand():
    levels = {
        "base": {10: level(0.5)},
        "hardened": {1: level(0.0), 10: level(0.1), 100: level(0.2)},
    }
    found = curve(levels, LEVELS, "lora")
    # top of the drawing: the genuine level and 0.05 more; its bottom: -0.1; steps are on a logarithmic scale
    width, height = CURVE
    scale = height / (0.65 + 0.1)
    expected = [(0, 0.65), (width / 2, 0.55), (width, 0.45)]
    points = [tuple(map(float, point.split(","))) for point in found.lines["hardened"].split()]
    assert points == [pytest.approx((x, scale * below), abs=0.06) for x, below in expected]
    assert found.lines["base"] == f"{width / 2},{round(scale * 0.15, 1)}"
    assert found.limit == pytest.approx(scale * 0.5, abs=0.06)
    assert found.top == pytest.approx(scale * 0.05, abs=0.06)
    assert [steps for _, steps in found.ticks] == [1, 10, 100]
    assert "lora on the hardened model: 0.00 after 1 steps, 0.10 after 10 steps, 0.20 after 100 steps" in found.words
    assert curve({"base": {10: level(0.5)}}, LEVELS, "lora") is None


def test_what_is_beyond_the_claim_is_shown_and_not_judged(case, tmp_path):
    """And an attack at another rate has a column as soon as it is judged."""
    report, units, protected, controls = case
    name = "lora-4, 0.5 x rate"
    units.append(make_unit(tmp_path, "mira", "hardened", points={1.0: 10}))
    slow = {"side": "hardened", "subject": "mira", "attack": name, "evaluation_point": 1.0, "units": [],
            "interval": asdict(level(0.3))}  # fmt: skip
    checks = [each for each in report["checks"] if each["attack"] != "lora-4, 4 x steps"]
    report |= {
        "checks": [*checks, check("protected", "mira", name, "fail", 0.3, 0.15)], "scores": [*report["scores"], slow],
    }  # fmt: skip
    report["recipe"] |= {"gate": {"claimed_displacement": 0.02}}
    report["recipe"]["verify"]["displacement"] = {"attacks": ["lora-4"], "rates": [0.5, 0.25]}
    text = made((report, units, protected, controls), tmp_path)
    row = text.partition('<th scope="row">')[2].partition("</tr>")[0]
    assert row.count("<td") == 3 and row.count("beyond the claim") == 1
    assert (
        '0.40 <span class="quiet small">[0.35, 0.45]</span><br><span class="badge inconclusive">beyond the claim' in row
    )
    assert "(lora-4, 0.5 x rate): a sentence" in text, "with the other checks of the attack"
    assert "0.25 x rate" not in text
    assert "the claim goes up to attackers who change the weights by 2 % of their norm" in text


def test_heat_goes_from_chance_to_genuine():
    assert [heat(value, LEVELS) for value in (-0.3, 0.0, 0.15, 0.6, 0.9)] == [0, 0, 25, 100, 100]


def test_the_page_in_a_browser(case, tmp_path):
    """Needs the extra `browser` and an installed Chromium."""
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("there is no Chromium here")
    made(case, tmp_path)
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=flags)
        for width, scheme in ((1100, "light"), (360, "dark")):
            context = browser.new_context(viewport={"width": width, "height": 700}, color_scheme=scheme)
            page, said, asked = context.new_page(), [], []
            page.on("console", lambda message, said=said: said.append(message.text))
            page.on("pageerror", lambda error, said=said: said.append(str(error)))
            page.on("request", lambda request, asked=asked: asked.append(request.url))
            page.goto((tmp_path / "report.html").as_uri())
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing sticks out"
            dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 28)"
            assert dark is (scheme == "dark")
            page.keyboard.press("Tab")  # the first failure, which is open; Enter closes it
            page.keyboard.press("Enter")
            assert page.evaluate("document.activeElement.tagName") == "SUMMARY"
            assert page.evaluate("document.activeElement.parentElement.open") is False
            assert said == []
            assert [url for url in asked if not url.startswith(("data:", "file:"))] == []
            assert page.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
        browser.close()


def test_a_check_of_a_rule_that_was_added_is_on_the_page(case, tmp_path):
    """Of the whole model, of a subject, and of a subject under an attack; whether or not this version has the rule."""
    case[0]["checks"] += [
        plain_check("held in video", "", "", "fail", sentence="moves too much"),
        plain_check("held in video", "mira", "", "fail", sentence="mira moves"),
        plain_check("held in video", "mira", "lora-4", "pass", sentence="it is a still picture"),
    ]
    text = made(case, tmp_path)
    assert "held in video: 1 of 3 checks passed, 2 failed" in text
    assert "moves too much" in text and text.count("mira moves") == 2 and "it is a still picture" in text


def test_a_rule_that_failed_to_run_does_not_end_the_page(case, tmp_path):
    case[0]["checks"] = [plain_check("protected", "", "", "inconclusive", sentence="the rule failed to run (KeyError)")]
    text = made(case, tmp_path)
    assert "the rule failed to run (KeyError)" in text
    assert text.count('<span class="badge inconclusive">') >= 2, "and the cells of the matrix are undecided"


def test_the_page_of_a_report_of_the_first_schema(tmp_path):
    """Reports of earlier versions can be shown again."""
    report = demo_report()
    mira, nora = make_subject(tmp_path), make_subject(tmp_path, "nora")
    save_page(tmp_path / "report.html", page_data(Evidence(report, [], False), [mira], [nora], []))
    text = (tmp_path / "report.html").read_text()
    assert "attacks on protected subjects fail on the hardened model: 2 of 2 checks passed" in text
