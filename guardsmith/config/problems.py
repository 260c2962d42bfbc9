"""What is wrong with a recipe's values, in sentences, and where each of them came from: the recipe's file or a change to it."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError

from guardsmith.config.deployability import ADAPTERS
from guardsmith.config.recipe import MethodSpec, Recipe
from guardsmith.config.renamed import RECIPE_KEYS
from guardsmith.core.errors import UserError, did_you_mean
from guardsmith.core.yaml_text import odd_numbers


class Change(str):
    """`dotted.key=VALUE`, a change to a recipe, that knows what the user wrote, e.g. `--seed -1`."""

    origin: str

    def __new__(cls, text: str, origin: str) -> Change:
        """A change that stands for an option or an argument; a plain string stands for `--set`."""
        change = super().__new__(cls, text)
        change.origin = origin
        return change


def as_changes(values: Mapping[str, Any]) -> list[str]:
    """The changes that a mapping of dotted keys to values stands for."""
    return [Change(f"{key}={json.dumps(value)}", f"{key}={value!r}") for key, value in values.items()]


def origin_of(change: str) -> str:
    """What the user wrote for a change, for messages; long values are shortened."""
    origin = change.origin if isinstance(change, Change) else f"--set {change.strip()}"
    return origin if len(origin) <= 100 else f"{origin[:97]}..."


def key_of(change: str) -> str:
    """The dotted key of a change, by its present name."""
    key = change.partition("=")[0].strip()
    return RECIPE_KEYS.get(key, key)


class Finding(NamedTuple):
    """Something wrong with a value.

    Attributes:
        place: its dotted key.
        kind: what is wrong, the same for every value of which it is wrong.
        sentence: for people; it names the place.
    """

    place: str
    kind: str
    sentence: str


def culprit(finding: Finding, changes: Sequence[str], of_file: Sequence[Finding]) -> str | None:
    """What the user wrote that is to blame for a finding; `None` for the recipe's file.

    Args:
        finding: of the recipe with the changes.
        changes: in the order in which they were applied.
        of_file: findings of the same recipe without the changes.
    """
    for change in reversed(changes):
        key = key_of(change)
        if finding.place == key or finding.place.startswith(f"{key}."):
            return origin_of(change)
    if not changes or finding[:2] in [each[:2] for each in of_file]:
        return None
    # The value is the file's, and fits no longer: such as parameters of an attack that a change replaced.
    return origin_of(max(reversed(changes), key=lambda change: _common(key_of(change), finding.place)))


def _common(one: str, other: str) -> int:
    parts = 0
    for mine, theirs in zip(one.split("."), other.split("."), strict=False):
        if mine != theirs:
            break
        parts += 1
    return parts


def attributed(
    findings: Sequence[Finding], where: str, changes: Sequence[str], of_file: Sequence[Finding]
) -> Iterator[str]:
    """The sentence of each finding after what is to blame for it; see `culprit`."""
    for finding in findings:
        origin = culprit(finding, changes, of_file)
        keys = [f"{key_of(change)}: " for change in changes if origin_of(change) == origin]
        sentence = finding.sentence
        for key in keys:  # it stands in the origin already
            sentence = sentence.removeprefix(key)
        yield f"{origin or where}: {sentence}"


def findings_of(error: ValidationError, keys: Sequence[str], parent: str = "") -> list[Finding]:
    """Pydantic's findings as sentences, with a near word for unknown keys.

    Args:
        error: pydantic's.
        keys: all that are known, dotted where they are nested, below `parent`.
        parent: dotted key of what was validated.
    """
    findings = []
    for problem in error.errors():
        inside = ".".join(str(part) for part in problem["loc"])
        place = ".".join(part for part in (parent, inside) if part)
        if problem["type"] == "extra_forbidden":
            hint = _near(str(problem["loc"][-1]), inside.rpartition(".")[0], keys) or "; remove it"
            sentence = f"{place!r} is not a known key{hint}"
        else:
            reason = f"{problem['msg'][:1].lower()}{problem['msg'][1:]}"
            sentence = f"{place}: {reason} (found {reprlib.repr(problem['input'])})"
        findings.append(Finding(place, problem["type"], sentence))
    return findings


def explain(error: ValidationError, where: str, keys: Sequence[str]) -> list[str]:
    """Pydantic's findings about a file or an option, as sentences that name it."""
    return [f"{where}: {finding.sentence}" for finding in findings_of(error, keys)]


def _near(word: str, parent: str, keys: Sequence[str]) -> str:
    """The end of a sentence about an unknown key: one spelt nearly like it in the same place, or the place of one elsewhere."""
    here = [key.rpartition(".")[2] for key in keys if key.rpartition(".")[0] == parent]
    elsewhere = {key.rpartition(".")[2]: key for key in reversed(keys)}
    if hint := did_you_mean(word, here):
        return hint
    return f"; did you mean {elsewhere[word]!r}?" if word in elsewhere else did_you_mean(word, keys)


def _known_keys(model: type[BaseModel], parent: str = "") -> list[str]:
    keys: list[str] = []
    for name, field in model.model_fields.items():
        keys.append(f"{parent}{name}")
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += _known_keys(field.annotation, f"{parent}{name}.")
    return keys


def recipe_findings(data: Mapping[str, Any]) -> list[Finding]:
    """Everything that is wrong with the values of a recipe, and with the parameters of its method and attacks.

    Args:
        data: keys and values of a recipe.
    """
    findings: list[Finding] = []
    try:
        findings += _odd(data, Recipe.model_validate(data))
    except ValidationError as error:
        findings += findings_of(error, _known_keys(Recipe))
    findings += _parameter_findings(data)
    return findings or _threat_model_findings(data)


def _threat_model_findings(data: Mapping[str, Any]) -> list[Finding]:
    from guardsmith.config.threat_model import threat_model_of

    try:
        threat_model_of(Recipe.model_validate(data).verify)
    except UserError as error:
        return [Finding("verify.threat_model", "threat_model", str(error))]
    return []


def _odd(raw: Any, checked: Any, parent: str = "") -> list[Finding]:
    sentences = odd_numbers(raw, checked, parent)
    return [Finding(sentence.partition(":")[0], "odd_number", sentence) for sentence in sentences]


def _parameter_findings(data: Mapping[str, Any]) -> list[Finding]:
    """What is wrong with names and parameters of method and attacks, by the tables of methods and attacks.

    Reads the raw data, so that one wrong key elsewhere does not hide the other problems.
    """
    from guardsmith.cloaks.rid import RidTraining

    verify = data.get("verify")
    attacks = verify.get("attacks") if isinstance(verify, dict) else None
    findings = _evasion_findings(attacks) if isinstance(attacks, dict) else []
    if isinstance(data.get("defender"), dict):
        try:
            RidTraining.model_validate(data["defender"])
        except ValidationError as error:
            findings += findings_of(error, list(RidTraining.model_fields), "defender")
    for place, spec, find in _sections(data):
        mapping = spec if isinstance(spec, dict) else {}
        name, params = mapping.get("name", MethodSpec().name if place == "method" else None), mapping.get("params", {})
        if not isinstance(name, str) or not isinstance(params, dict):
            continue  # the recipe's own types refuse it
        try:
            config = find(name).config
            checked = config.model_validate(params)
            findings += _odd(params, checked, f"{place}.params")
        except UserError as error:
            findings.append(Finding(f"{place}.name", str(error), f"{place}: {error}"))
        except ValidationError as error:
            findings += findings_of(error, list(config.model_fields), f"{place}.params")
    return findings


def _sections(data: Mapping[str, Any]) -> list[tuple[str, Any, Callable[[str], Any]]]:
    """Dotted key, value and table of everything in a recipe that has a name and parameters."""
    from guardsmith.attacks import find_attack
    from guardsmith.attacks.adaptive.removals import find_removal
    from guardsmith.cloaks import find_cloak
    from guardsmith.methods import find_method
    from guardsmith.purifiers import find_purifier

    verify = data.get("verify")
    attacks = verify.get("attacks") if isinstance(verify, dict) else None
    sections: list[tuple[str, Any, Callable[[str], Any]]] = [("method", data.get("method"), find_method)]
    for label, spec in attacks.items() if isinstance(attacks, dict) else ():
        sections.append((f"verify.attacks.{label}", spec, find_attack))
        if isinstance(spec, dict) and isinstance(spec.get("removal"), dict):
            sections.append((f"verify.attacks.{label}.removal", spec["removal"], find_removal))
    everyday = verify.get("deployability") if isinstance(verify, dict) else None
    adapters = everyday.get("adapters") if isinstance(everyday, dict) else None
    for kind, params in adapters.items() if isinstance(adapters, dict) else ():
        if kind in ADAPTERS:
            spec = {"name": ADAPTERS[kind][0], "params": params}
            sections.append((f"verify.deployability.adapters.{kind}", spec, find_attack))
    pixels: tuple[tuple[str, Callable[[str], Any]], ...] = (("cloaks", find_cloak), ("purifiers", find_purifier))
    for table, find_pixels in pixels:
        specs = data.get(table)
        for label, spec in specs.items() if isinstance(specs, dict) else ():
            sections.append((f"{table}.{label}", spec, find_pixels))
    return sections


def _evasion_findings(attacks: dict[str, Any]) -> list[Finding]:
    """Names of transformations that do not exist."""
    from guardsmith.attacks.evasion import find_evasion

    findings = []
    for label, spec in attacks.items():
        names = spec.get("evasion", ()) if isinstance(spec, dict) else ()
        for name in (names,) if isinstance(names, str) else names if isinstance(names, list) else ():
            try:
                find_evasion(str(name))
            except UserError as error:
                place = f"verify.attacks.{label}.evasion"
                findings.append(Finding(place, str(error), f"{place}: {error}"))
    return findings
