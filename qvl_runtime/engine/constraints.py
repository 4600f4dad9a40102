"""The constraints of requests: from sampling parameters to what begins a constraint for each answer."""

from __future__ import annotations

from collections.abc import Sequence

from qvl_runtime.engine.guided import Guides
from qvl_runtime.prompt.box_grammar import BoxGrammar
from qvl_runtime.prompt.box_rules import rules_of
from qvl_runtime.prompt.box_spelling import BoxSpelling
from qvl_runtime.schedule.api import SamplingParams
from qvl_runtime.schedule.constraint import Constrain, Constraint
from qvl_runtime.schedule.guide_checks import guide_of


class Constraints:
    """Makes constraints for one checkpoint. Safe in any thread."""

    def __init__(self, spelling: BoxSpelling, vocab: int) -> None:
        """vocab: rows of logits, which may be more than the tokenizer has tokens."""
        self.spelling, self._vocab = spelling, vocab
        self._guides = Guides(spelling.tokenizer, vocab)

    def prepare(self, params: SamplingParams) -> None:
        """Compile what `of` will need, so that it takes no time there. Raises `ConstraintError`."""
        if (guide := guide_of(params)) is not None:
            self._guides.compile(guide)

    def of(self, params: SamplingParams, prompt_ids: Sequence[int]) -> Constrain | None:
        """What begins the constraint of each answer to a prompt; None if nothing constrains it.

        Raises `ConstraintError` for what cannot be followed, after at most 5 seconds.
        """
        if (guide := guide_of(params)) is not None:
            self._guides.compile(guide)  # here rather than in the step of all requests
            return lambda end_ids, limit: self._guides.begin(guide, end_ids)
        if params.boxes is None:
            return None
        rules = rules_of(params.boxes)

        def begin(end_ids: frozenset[int], limit: int) -> Constraint:
            return BoxGrammar(self.spelling, rules, self._vocab, end_ids, limit, prompt_ids)

        return begin
