"""The language of answers with boxes, exact over token ids: whatever the model prefers, each box is one that parses.

`<ref>label</ref><box>(x1,y1),(x2,y2)</box>`, with x1 < x2 and y1 < y2 on the grid, or a `<quad>` of four points; in the
spelling of the tokenizer, without spaces and leading zeros; always closed, whatever `max_tokens` is. A digit may be
written if some number that begins so lies in the interval of its coordinate, which no context-free grammar can say.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from qvl_runtime.errors import ConstraintError
from qvl_runtime.prompt.box_rules import BoxRules
from qvl_runtime.prompt.box_spelling import BoxSpelling, Ids, Shape, interval, next_digits
from qvl_runtime.prompt.token_mask import Mask, add, first_of, holds, mask_of, remove

LABEL_TOKENS = 64  # of a label, at most


class State(NamedTuple):
    """Where an answer stands. Within a shape: the coordinates so far, the one begun, and fixed ids that follow."""

    used: int = 0  # tokens of the answer
    boxes: int = 0  # complete ones
    label: int | None = None  # tokens of the label that is open
    labeled: bool = False  # since the last label there is nothing but its boxes
    owed: bool = False  # that label has no box yet
    text: bool = False  # there is text since the last box, or before the first
    tail: bytes = b""  # the end of this text that may become a tag
    shape: Shape | None = None
    values: Ids = ()
    value: int = 0
    digits: int = 0
    pending: Ids = ()


class BoxGrammar:
    """A constraint on one answer: which tokens may come next, given the rules and those before."""

    def __init__(
        self,
        spelling: BoxSpelling,
        rules: BoxRules,
        vocab: int,
        end_ids: Iterable[int],
        limit: int,
        prompt_ids: Sequence[int] = (),
    ) -> None:
        """end_ids: tokens that end the answer; limit: tokens that it may have; prompt_ids: may end within a box.

        Raises `ConstraintError` if the limit is too small for the boxes that the rules require.
        """
        self.spelling, self.rules, self._vocab, self._limit = spelling, rules, vocab, limit
        self._ends = tuple(sorted(end for end in set(end_ids) if end < vocab and end not in spelling.tags))
        self._is_end = frozenset(self._ends)
        self._texts: dict[tuple[bool, bytes, Ids], Mask] = {}
        self._masks: dict[Ids, Mask] = {}  # of text and single tokens
        self._longest = max(spelling.box.longest, spelling.quad.longest if rules.quads else 0)
        self._states = [State()]
        self._known: tuple[State, tuple[Ids, Mask | None]] | None = None
        self._continue(prompt_ids)
        self._known = None  # it was found with another limit
        needed = self._reserve(self._state) - (0 if self._state.shape is None else 1)
        if needed > limit:
            raise ConstraintError(
                f"the answer may have {limit} tokens, but its boxes need up to {needed}: raise max_tokens, or ask for "
                "fewer boxes"
            )

    @property
    def done(self) -> bool:
        """Whether nothing may follow but the end."""
        state = self._state
        if state.shape is not None or not self._may_end(state):
            return False
        ids, text = self._legal(state)
        return text is None and self._is_end.issuperset(ids)

    def mask(self, out: Mask) -> None:
        """Fill a bitset with the tokens that may come next."""
        ids, text = self._legal(self._state)
        masks = self.spelling.masks if text is None else self._masks
        key = ids if text is None else (*ids, -id(text))
        if (mask := masks.get(key)) is None:
            mask = masks[key] = mask_of(ids, self._vocab) if text is None else text.copy()
            add(mask, ids)
        out[:] = mask

    def advance(self, token: int) -> bool:
        """Append a token; False, and nothing changes, if it may not come next."""
        state = self._state
        ids, text = self._legal(state)
        if token not in ids and not (text is not None and 0 <= token < self._vocab and holds(text, token)):
            return False
        self._states.append(self._after(state, token))
        return True

    def accepts(self, tokens: Iterable[int]) -> int:
        """How many of these tokens may come next, in order."""
        count = 0
        for token in tokens:
            if not self.advance(token):
                break
            count += 1
        self.rollback(count)
        return count

    def rollback(self, count: int) -> None:
        """Take the last `count` tokens back."""
        del self._states[len(self._states) - count :]

    def fork(self) -> BoxGrammar:
        """A copy that is continued independently."""
        copy = BoxGrammar.__new__(BoxGrammar)
        copy.__dict__.update(self.__dict__)
        copy._states = self._states.copy()
        return copy

    def forced(self) -> list[int]:
        """The tokens that must come next, as long as there is only one that may."""
        state, tokens = self._state, list[int]()
        while True:
            ids, text = self._legal(state)
            if text is not None or len(ids) != 1 or ids[0] in self._is_end:
                return tokens
            tokens.append(ids[0])
            state = self._after(state, ids[0])

    def shape_tokens(self) -> Ids:
        """The tokens that may come next within a box or quad; empty elsewhere."""
        shape = self._state.shape
        return () if shape is None else self._in_shape(self._state, shape)

    def place(self, token: int) -> Ids:
        """Roughly where a box is, with one more token: its coordinates in hundreds, of the last one the first digit."""
        state = self._state
        hundreds = tuple(value // 100 for value in state.values)
        digit = self.spelling.digit_of.get(token)
        if digit is None:
            return (*hundreds, state.value // 100)
        return (*hundreds, int(str(state.value)[0]) if state.digits else digit)

    @property
    def digits(self) -> int:
        """How many digits the coordinate has that is begun."""
        return self._state.digits

    @property
    def _state(self) -> State:
        return self._states[-1]

    def _continue(self, prompt_ids: Sequence[int]) -> None:
        """Begin within the label or box that the prompt has begun, or after its label."""
        tokens, spelling = self.spelling.tokenizer, self.spelling
        starts, ends = {tokens.ref_start, *spelling.shapes}, {tokens.box_end, tokens.quad_end}
        window = range(len(prompt_ids) - 1, max(-1, len(prompt_ids) - 1 - self._longest - LABEL_TOKENS), -1)
        begin = next((i for i in window if prompt_ids[i] in starts or prompt_ids[i] in ends), None)
        if begin is None or prompt_ids[begin] in ends:
            return
        state = self._after(State(), prompt_ids[begin])
        if state.shape is not None and begin and prompt_ids[begin - 1] == tokens.ref_end:
            state = state._replace(labeled=True)
        limit, self._limit = self._limit, 1 << 40
        self._states = [state]
        complete = all(map(self.advance, prompt_ids[begin + 1 :]))
        state, self._limit = self._state, limit
        in_place = state.shape is not None or state.label is not None or state.owed
        # otherwise it was a part of the question
        self._states = [state._replace(used=0) if complete and in_place else State()]

    def _legal(self, state: State) -> tuple[Ids, Mask | None]:
        """Single tokens that may come next, and the set of text tokens that may, or None; kept for the last state."""
        if self._known is None or self._known[0] is not state:
            self._known = state, self._find_legal(state)
        return self._known[1]

    def _find_legal(self, state: State) -> tuple[Ids, Mask | None]:
        if state.shape is not None:
            return self._in_shape(state, state.shape), None
        if state.label is not None:
            return self._in_label(state, state.label)
        ids = self._starts(state)
        if self._may_end(state):
            ids += self._ends
        return ids, self._text(state, plain=False) if self._text_allowed(state) else None

    def _in_shape(self, state: State, shape: Shape) -> Ids:
        if state.pending:
            return state.pending[:1]
        number, count = len(state.values), len(shape.pieces) - 1
        low, high = interval(number, state.values, count)
        digits, may_end = next_digits(state.value, state.digits > 0, low, high)
        ids = tuple([self.spelling.digits[digit] for digit in digits])
        return (*ids, shape.pieces[number + 1][0]) if may_end else ids

    def _in_label(self, state: State, count: int) -> tuple[Ids, Mask | None]:
        end = (self.spelling.tokenizer.ref_end,)
        rest = self._limit - state.used - 2 - self._box_after_label(state)
        return end if count else (), self._text(state, plain=True) if count < LABEL_TOKENS and rest >= 0 else None

    def _box_after_label(self, state: State) -> int:
        """Tokens that must be left for boxes once the label is closed."""
        return self._reserve(state._replace(label=None, labeled=True, owed=True, text=False))

    def _starts(self, state: State) -> Ids:
        """The start tags that may come next, where no label or shape is open."""
        rules, spelling = self.rules, self.spelling
        if rules.most is not None and state.boxes >= rules.most:
            return ()
        if state.text and not (rules.between if state.boxes else rules.before):
            return ()
        left, ids = self._limit - state.used, list[int]()
        if rules.labels != "none" and not (state.owed and not rules.bare_labels):
            opened = state._replace(used=0, label=0, labeled=False, text=False)
            if left >= 3 + self._box_after_label(opened):
                ids.append(spelling.tokenizer.ref_start)
        if rules.labels != "required" or state.labeled:
            for shape in (spelling.box, spelling.quad) if rules.quads else (spelling.box,):
                after = state._replace(boxes=state.boxes + 1, owed=False, text=False)
                if left >= shape.longest + self._reserve(after):
                    ids.append(shape.start)
        return tuple(ids)

    def _may_end(self, state: State) -> bool:
        rules = self.rules
        if state.shape is not None or state.label is not None or (state.owed and not rules.bare_labels):
            return False
        stray = state.text and not (rules.after if state.boxes else rules.before or rules.after)
        return state.boxes >= rules.least and not stray

    def _text_allowed(self, state: State) -> bool:
        rules = self.rules
        if state.owed and not rules.bare_labels:
            return False
        full = rules.most is not None and state.boxes >= rules.most
        zone = (rules.after or (rules.between and not full)) if state.boxes else rules.before
        after = state._replace(text=True, labeled=False, owed=False)
        return zone and self._limit - state.used - 1 >= self._reserve(after)

    def _reserve(self, state: State) -> int:
        """Tokens that must be left so that the answer can end as the rules demand."""
        rules = self.rules
        missing = max(0, rules.least - state.boxes - (state.shape is not None))
        stray = state.text and state.boxes > 0 and not rules.after
        if missing == 0 and ((state.owed and not rules.bare_labels) or stray):
            missing = 1
        labels = 0
        if missing and rules.labels == "required" and not state.labeled and state.shape is None:
            labels = 3 - (0 if state.label is None else 1 + min(1, state.label))
        needed = missing * self.spelling.box.longest + labels
        return needed + (0 if state.shape is None else state.shape.longest)

    def _text(self, state: State, plain: bool) -> Mask:
        """The tokens of free text, or of a label (`plain`: no special ones), but for those that would spell a tag."""
        forbidden = self.spelling.completes_tag(state.tail)
        key = (plain, state.tail, forbidden)
        if key not in self._texts:
            mask = first_of(self.spelling.tokenizer.n_ranks if plain else self._vocab, self._vocab)
            remove(mask, (*self.spelling.tags, *self._ends, *forbidden))
            self._texts[key] = mask
        return self._texts[key]

    def _after(self, state: State, token: int) -> State:
        used, spelling = state.used + 1, self.spelling
        if state.shape is not None:
            return self._after_in_shape(state._replace(used=used), state.shape, token)
        if state.label is not None:
            if token == spelling.tokenizer.ref_end:
                return state._replace(used=used, label=None, labeled=True, owed=True, text=False, tail=b"")
            return state._replace(used=used, label=state.label + 1, tail=spelling.tail(state.tail, token))
        if token == spelling.tokenizer.ref_start:
            return state._replace(used=used, label=0, labeled=False, tail=b"")
        if (shape := spelling.shapes.get(token)) is not None:
            return state._replace(used=used, shape=shape, values=(), pending=shape.pieces[0], tail=b"")
        tail = spelling.tail(state.tail, token)
        return state._replace(used=used, text=True, labeled=False, owed=False, tail=tail)

    def _after_in_shape(self, state: State, shape: Shape, token: int) -> State:
        """The state after a token of a shape; `used` counts it already."""
        if state.pending:
            pending = state.pending[1:]
            if pending or len(state.values) < len(shape.pieces) - 1:
                return state._replace(pending=pending)
        elif (digit := self.spelling.digit_of.get(token)) is not None:
            return state._replace(value=10 * state.value + digit, digits=state.digits + 1)
        else:
            values = (*state.values, state.value)
            pending = shape.pieces[len(values)][1:]
            if pending or len(values) < len(shape.pieces) - 1:
                return state._replace(values=values, value=0, digits=0, pending=pending)
        return State(state.used, state.boxes + 1, labeled=state.labeled)
