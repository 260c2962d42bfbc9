"""Pictures must fit benign prompts as well as the base's do, by CLIP-T."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from guardsmith.config.recipe import GateSpec
from guardsmith.gate.checks import Check, bounded, enough, too_few
from guardsmith.gate.evidence import Evidence
from guardsmith.gate.rules.rule import Rule
from guardsmith.gate.statistics import interval


def check_clip_t(base: Sequence[float | None], hardened: Sequence[float | None], spec: GateSpec) -> Check:
    """What the hardened model's pictures lose, pair by pair: of the same prompts from the same noise."""
    limit = spec.clip_t_drop
    pairs = list(zip(base, hardened, strict=True))
    drop = interval([[None if before is None or now is None else before - now for before, now in pairs]])
    if drop is None or not enough(drop, spec):
        return Check(
            RULE.title, "", "", "inconclusive", too_few(drop, limit, spec, "verify.benign_images"), limit=limit
        )
    before, now = (float(np.mean([value for value in side if value is not None])) for side in (base, hardened))
    sentence = f"pictures fit their prompts {now:.3f}; the base's {before:.3f}"
    return bounded(RULE.title, "", "", sentence, drop, limit, at_most=True)


def evaluate(evidence: Evidence) -> Iterator[Check]:
    """One check, where the policy names a CLIP."""
    base, hardened = evidence.utility.clip_t_base, evidence.utility.clip_t_hardened
    if base is not None or hardened is not None:
        yield check_clip_t(base or [], hardened or [], evidence.spec)


RULE = Rule(
    "benign-prompts-clip-t", "benign prompts (CLIP-T)", "pictures of benign prompts fit their prompts", evaluate
)
