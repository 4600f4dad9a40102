"""What an answer with boxes may have besides them."""

from __future__ import annotations

from dataclasses import dataclass

from qvl_runtime.errors import ConstraintError, quoted


@dataclass(frozen=True, slots=True)
class BoxRules:
    """What an answer with boxes may have besides them. Raises `ConstraintError` for numbers that contradict."""

    before: bool = False  # text before the first box or label
    between: bool = False  # text between boxes, or between a box and the next label
    after: bool = False  # text after the last box
    labels: str = "optional"  # "required": every box has a label before it; "none": no <ref> at all
    bare_labels: bool = False  # a label may have no box after it
    quads: bool = True  # <quad> as well as <box>
    least: int = 1  # boxes
    most: int | None = None

    def __post_init__(self) -> None:
        if self.labels not in ("optional", "required", "none"):
            raise ConstraintError(f"labels is {quoted(self.labels)}; expected 'optional', 'required' or 'none'")
        if not (type(self.least) is int and self.least >= 0):
            raise ConstraintError(f"least is {quoted(self.least)}; expected a whole number of boxes, 0 or more")
        if self.most is not None and not (type(self.most) is int and self.most >= max(1, self.least)):
            raise ConstraintError(f"most is {quoted(self.most)}; expected None, or at least 1 and at least `least`")


FORCE = BoxRules()
ALLOW = BoxRules(before=True, between=True, after=True, bare_labels=True, least=0)
RULES = {"force": FORCE, "allow": ALLOW}


def rules_of(value: object) -> BoxRules:
    """Rules by their name, "force" or "allow", or as they are. Raises `ConstraintError` for anything else."""
    if isinstance(value, BoxRules):
        return value
    if isinstance(value, str) and value in RULES:
        return RULES[value]
    raise ConstraintError(f"boxes is {quoted(value)}; expected 'force', 'allow' or BoxRules")
