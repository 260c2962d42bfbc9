"""Units of the attack matrix: one attack on one model each, what decides its result, and where the result is kept.

    <root>/<subject>/<attack>/<identifier>/<seed>/<digest>/
        attack.json       settings, digests, training loss
        images/<steps>/   pictures drawn by the personalized model after so many steps
        scores.json       one score per picture and evaluation point; written last, so its presence says that the unit is complete

A unit is a pure function of its settings, which its digest stands for: a killed verification goes on with the units that are
missing, and several verifications can share those of the base.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from guardsmith.attacks import find_attack
from guardsmith.attacks.displacement import Movement
from guardsmith.core.atomic_io import folder_digest
from guardsmith.core.console import warn
from guardsmith.core.images import is_whole_png
from guardsmith.gate.evidence import Side

FIRST_NAMES = {
    "evaluation_points": "looks",
    "attacker_noun": "called",
}  # of fields in settings and digests of kept units


@dataclass(frozen=True)
class Unit:
    """One attack on one model: everything that decides its result.

    Attributes:
        class_noun: the registry's word for the subject's class, whose levels count.
        evaluation_points: share of the attack's usual steps -> number of steps; pictures are drawn then.
        change: what the attacker does to the pictures before (`attacks.data.CHANGES`).
        first: whom the attacker trains on before: images, their digest, class_noun, class_pictures.
        trained_on: where the adapters are trained that this model is to draw with: model and its digest.
        judge: who measures, where it is not the embedded encoder: name, model, level of similarity that counts as personalized.
        attacker_noun: the attacker's word for the class, where it is another one.
        precision: how the attacker's denoiser computes, where it is not float32.
        evasion: how the attacker transforms the pictures: names; images and digest of another subject's, where one needs them;
            of_references: which of them the real pictures go through too before they are compared.
        drawing: how the personalized model draws, where that is not as usual: name and, where it hands over, hand_over.
        removal: how the attacker edits the weights before: name and params.
        public: the public base, where drawing or removal needs it: model and digest.
    """

    side: Side
    root: str
    model: str
    model_digest: str
    subject: str
    class_noun: str
    attack_images: tuple[str, ...]
    reference_images: tuple[str, ...]
    images_digest: str
    attack: str
    params: dict[str, Any]
    evaluation_points: dict[float, int]
    label: str
    identifier: str
    seed: int
    images: int
    class_pictures: str
    class_images: int
    sampling: dict[str, Any]
    change: str | None = None
    first: dict[str, Any] | None = None
    trained_on: dict[str, str] | None = None
    judge: dict[str, Any] | None = None
    attacker_noun: str | None = None
    precision: str | None = None
    evasion: dict[str, Any] | None = None
    drawing: dict[str, Any] | None = None
    removal: dict[str, Any] | None = None
    public: dict[str, str] | None = None

    @property
    def noun(self) -> str:
        """What the attacker calls the class."""
        return self.attacker_noun or self.class_noun

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.side}/{self.subject}/{self.label}/{self.identifier}/{self.seed}"

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides the result: paths and the label do not. Renamed fields keep their first name here."""
        settings = {FIRST_NAMES.get(key, key): value for key, value in asdict(self).items()}
        for key in ("side", "root", "label", "model", "attack_images", "reference_images", "class_pictures"):
            settings.pop(key)
        # Left out where they are not used, so that units of versions that did not have them stay what they were.
        first, trained_on = (settings.pop(key) for key in ("first", "trained_on"))
        evasion, public = (settings.pop(key) for key in ("evasion", "public"))
        settings |= {"evasion": {key: value for key, value in evasion.items() if key != "images"}} if evasion else {}
        settings |= {"public": public["digest"]} if public else {}
        keys = ("change", "judge", "called", "precision", "drawing", "removal")
        options = {key: settings.pop(key) for key in keys}
        settings |= {key: value for key, value in options.items() if value}
        if self.judge is not None:
            settings["judge"] = {"learnt" if key == "level" else key: value for key, value in self.judge.items()}
        revision = find_attack(self.attack).revision
        settings |= {"revision": revision} if revision > 1 else {}
        settings |= {"first": {key: first[key] for key in ("digest", "class_noun")}} if first else {}
        return settings | ({"trained_on": trained_on["digest"]} if trained_on else {})

    @property
    def digest(self) -> str:
        """Of the settings."""
        return folder_digest(self.settings)

    @property
    def folder(self) -> Path:
        """Where its result is, or will be."""
        label = self.label.replace(", ", "_").replace(" ", "-")
        return Path(self.root) / self.subject / label / _safe(self.identifier) / str(self.seed) / self.digest

    def renamed(self, subject: str) -> Unit:
        """The same under another id of its subject."""
        return replace(self, subject=subject)

    def scores(self) -> dict[float, list[float | None]] | None:
        """Scores at every evaluation point, one per picture; `None` unless this unit's complete result is there."""
        return scores_of(self)

    def pictures(self, point: float) -> list[Path]:
        """What was drawn at an evaluation point, or at the end of an attack that succeeded before."""
        steps = self.evaluation_points[point]
        folders = [folder for folder in (self.folder / "images").glob("*") if int(folder.name) <= steps]
        return sorted(max(folders, key=lambda folder: int(folder.name)).glob("*.png")) if folders else []


def _safe(identifier: str) -> str:
    return "".join(c if c.isalnum() else f"%{ord(c):x}" for c in identifier)


def scores_of(unit: Unit) -> dict[float, list[float | None]] | None:
    """Scores at every evaluation point, one per picture; `None` unless the complete result of exactly this unit is there.

    Points after the end of an attack that succeeded early have the scores of its end.
    """
    try:
        record = json.loads((unit.folder / "scores.json").read_text())
        if record["digest"] != unit.digest:
            return None
        by_steps, last = record["identity"], max(map(int, record["identity"]))
        if last < unit.evaluation_points[1]:
            return None
        scores = {point: by_steps[str(min(steps, last))] for point, steps in unit.evaluation_points.items()}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return scores if all(len(values) == unit.images for values in scores.values()) else None


def damaged_pictures(unit: Unit) -> bool:
    """Whether a complete unit has lost pictures, to a power loss or otherwise; a warning names the first one."""
    for point in unit.evaluation_points:
        files = unit.pictures(point)
        unreadable = [file for file in files if not is_whole_png(file)]
        if unreadable or len(files) < unit.images:
            which = f"{unreadable[0]} cannot be read" if unreadable else f"{unit.folder / 'images'} lacks pictures"
            warn(f"{which}; the attack {unit.name} runs again")
            return True
    return False


def removal_cost(unit: Unit) -> dict[str, Any] | None:
    """What editing the weights cost in a complete unit (`RemovalCost`); `None` where it did not run, or edited nothing."""
    try:
        cost = json.loads((unit.folder / "attack.json").read_text())["removal_cost"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return dict(cost)


def movements_of(unit: Unit) -> dict[float, tuple[int, Movement]]:
    """Steps, and how far a complete unit had moved its model, at every evaluation point, as far as it is on record.

    Units of versions that did not measure it have none. Points after the end of an attack that succeeded early have its end's.
    """
    try:
        record = json.loads((unit.folder / "attack.json").read_text())
        by_steps = {int(steps): Movement(**values) for steps, values in record["movement"].items()}
        ends = {point: min(steps, max(by_steps)) for point, steps in unit.evaluation_points.items()}
        return {point: (steps, by_steps[steps]) for point, steps in ends.items()}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
