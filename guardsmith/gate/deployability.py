"""What was measured of a hardened model's everyday use, beside its base, and which check of the gate that makes."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from guardsmith.config.deployability import CheckName, DeployabilityLimits
from guardsmith.core.redaction import Reason, SubjectId
from guardsmith.gate.checks import Check, Status, undecided
from guardsmith.gate.statistics import Interval

Measure = Literal["difference", "faults", "collapsed", "control", "retention"]


class Measurement(BaseModel):
    """One case of one check."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    check: CheckName
    """Which check it belongs to."""
    case: str
    """What was tried, e.g. "float16" or "DDIM, 20 steps"."""
    measure: Measure
    """What `value` is. `difference`: mean difference from the model's own pictures in float32, in units of the base's; of a
    merge, from the base's pictures, in units of the unmerged model's. `faults`: things that must not be (black or NaN pictures,
    values beyond float16, files in another precision), beyond the base's own. `collapsed`: share of collapsed pictures beyond the
    base's. `control`: share of the base's response to a control. `retention`: share of what an adapter made and used on the base
    reaches."""
    value: float | None = None
    """What was measured; null if it failed to run or has no value."""
    low: float | None = None
    """Lower end of its 95 % interval; null for `faults`, which are counted."""
    high: float | None = None
    """Upper end."""
    base: float | None = None
    """What the base has by itself: a difference of 255, a count, a share, a correlation or a similarity."""
    hardened: float | None = None
    """The same of the hardened model."""
    n: int = 0
    """Pictures, files or values on either side."""
    part: bool = False
    """Whether it is one of several settings that are judged together: by itself it may fail, and need not pass."""
    how: str = ""
    """How it was tried, where that is not what its name says (emulated, own implementation, other backend)."""
    pictures: str | None = None
    """File with pictures of both sides, under the folder of the verification; null where there are none."""
    subject: SubjectId | None = None
    """Id of the subject that the pictures show, where they show one."""
    error: Reason | None = None
    """Why it failed to run; null where it ran."""

    @property
    def at_most(self) -> bool:
        """Whether small values are good ones."""
        return self.measure in ("difference", "faults", "collapsed")

    def limit(self, limits: DeployabilityLimits) -> float:
        """What its unfavourable end is compared with."""
        return {
            "difference": limits.difference_ratio, "faults": 0.0, "collapsed": limits.more_collapsed,
            "control": limits.control_followed, "retention": limits.adapter_retention,
        }[self.measure]  # fmt: skip

    def status(self, limits: DeployabilityLimits) -> Status:
        """Pass if the whole interval is on the right side of the limit, fail if on the wrong one, inconclusive otherwise."""
        if self.error is not None or self.value is None:
            return "inconclusive"
        low, high = (self.value if end is None else end for end in (self.low, self.high))
        limit = self.limit(limits)
        if high <= limit if self.at_most else low >= limit:
            return "pass"
        if low > limit if self.at_most else high < limit:
            return "fail"
        return "pass" if self.part else "inconclusive"

    def sentence(self) -> str:
        """What was measured, in words."""
        if self.error is not None or self.value is None:
            # The reason may name paths of this machine: it stands in `error`, which the public does not read.
            return f"failed to run ({(self.error or 'nothing measured').partition(':')[0]})"
        base, hardened = self.base or 0.0, self.hardened or 0.0
        words = {
            "difference": f"differs by {hardened:.2f} of 255, where {base:.2f} is usual: {self.value:.1f} times as much",
            "faults": f"{hardened:.0f} of {self.n}, the base {base:.0f}",
            "collapsed": f"{100 * hardened:.0f} % of {self.n} pictures collapse, of the base's {100 * base:.0f} %",
            "control": f"follows the control {100 * self.value:.0f} % as well as the base",
            "retention": f"similarity above benign pictures {hardened:z.2f}, made and used on the base {base:z.2f}",
        }[self.measure]
        return f"{words} ({self.how})" if self.how else words

    def check_of(self, title: str, limits: DeployabilityLimits) -> Check:
        """The gate's check of this case, under the title of its rule."""
        status, limit, sentence = self.status(limits), self.limit(limits), self.sentence()
        value, low, high = self.value, self.low, self.high
        if (
            self.error is None
            and value is not None
            and low is not None
            and high is not None
            and status == "inconclusive"
        ):
            sentence += undecided(Interval(value, low, high, self.n, 0), limit)
        return Check(title, "", self.case, status, sentence, value, low, high, limit)
