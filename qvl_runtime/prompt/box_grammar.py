"""The language of answers with boxes, exact over token ids: whatever the model prefers, each box is one that parses.

`<ref>label</ref><box>(x1,y1),(x2,y2)</box>`, with x1 < x2 and y1 < y2 on the grid, or a `<quad>` of four points; in the
spelling of the tokenizer, without spaces and leading zeros; always closed, whatever `max_tokens` is. A digit may be
written if some number that begins so lies in the interval of its coordinate, which no context-free grammar can say.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from qvl_runtime.errors import ConstraintError
from qvl_runtime.prompt.box_places import Places
from qvl_runtime.prompt.box_rules import BoxRules
from qvl_runtime.prompt.box_spelling import BoxSpelling, Ids
from qvl_runtime.prompt.box_states import STATES, Legal, State, Table
from qvl_runtime.prompt.token_mask import Mask, add, first_of, holds, mask_of, remove

LABEL_TOKENS = 64  # of a label, at most


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
        self._places = spelling.shared("places", lambda: Places(spelling))
        self._table = spelling.shared((rules, self._ends, vocab), lambda: Table(spelling, rules, self._ends))
        self._states = [State()]
        self._known: tuple[State, Legal] | None = None
        self._continue(prompt_ids)
        self._known = None  # it was found with another limit
        needed = self._reserve(self._state) - (0 if self._state.within is None else 1)
        if needed > limit:
            raise ConstraintError(
                f"the answer may have {limit} tokens, but its boxes need up to {needed}: raise max_tokens, or ask for "
                "fewer boxes"
            )

    @property
    def done(self) -> bool:
        """Whether nothing may follow but the end."""
        state = self._states[-1]
        return state.within is None and self._legal(state).done

    def mask(self) -> Mask:
        """The tokens that may come next."""
        state = self._states[-1]
        if state.within is None:
            return self._legal(state).mask
        masks, ids = self.spelling.masks, state.within.place.ids
        if (mask := masks.get(ids)) is None:
            mask = masks[ids] = mask_of(ids, self._vocab)
            mask.flags.writeable = False
        return mask

    def advance(self, token: int) -> bool:
        """Append a token; False, and nothing changes, if it may not come next."""
        state = self._states[-1]
        if state.within is not None:
            legal = token in state.within.place.ids
        else:
            legal = 0 <= token < self._vocab and holds(self._legal(state).mask, token)
        if legal:
            self._states.append(self._after(state, token))
        return legal

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
        state, tokens = self._states[-1], list[int]()
        while True:
            if state.within is not None:
                ids, text = state.within.place.ids, False
            else:
                ids, text, _, _ = self._legal(state)
            if text or len(ids) != 1 or ids[0] in self._table.is_end:
                return tokens
            tokens.append(ids[0])
            state = self._after(state, ids[0])

    def shape_tokens(self) -> Ids:
        """The tokens that may come next within a box or quad; empty elsewhere."""
        within = self._state.within
        return () if within is None else within.place.ids

    def place(self, token: int) -> Ids:
        """Roughly where a box is, with one more token: its coordinates in hundreds, of the last one the first digit."""
        within = self._state.within
        if within is None:
            return ()
        place, hundreds = within.place, tuple(value // 100 for value in within.values)
        digit = self.spelling.digit_of.get(token)
        if digit is None:
            return (*hundreds, place.value // 100)
        return (*hundreds, int(str(place.value)[0]) if place.digits else digit)

    @property
    def digits(self) -> int:
        """How many digits the coordinate has that is begun."""
        within = self._state.within
        return 0 if within is None else within.place.digits

    @property
    def _state(self) -> State:
        return self._states[-1]

    def _continue(self, prompt_ids: Sequence[int]) -> None:
        """Begin within the label or box that the prompt has begun, or after its label."""
        tokens, spelling = self.spelling.tokenizer, self.spelling
        starts, ends = {tokens.ref_start, *spelling.shapes}, {tokens.box_end, tokens.quad_end}
        window = range(len(prompt_ids) - 1, max(-1, len(prompt_ids) - 1 - self._table.longest - LABEL_TOKENS), -1)
        begin = next((i for i in window if prompt_ids[i] in starts or prompt_ids[i] in ends), None)
        if begin is None or prompt_ids[begin] in ends:
            return
        state = self._after(State(), prompt_ids[begin])
        if state.within is not None and begin and prompt_ids[begin - 1] == tokens.ref_end:
            state = state._replace(labeled=True)
        limit, self._limit = self._limit, 1 << 40
        self._states = [state]
        complete = all(map(self.advance, prompt_ids[begin + 1 :]))
        state, self._limit = self._state, limit
        in_place = state.within is not None or state.label is not None or state.owed
        # otherwise it was a part of the question
        self._states = [state._replace(used=0) if complete and in_place else State()]

    def _legal(self, state: State) -> Legal:
        """What may come next outside a shape; found once for all answers, and kept for the last state."""
        if self._known is None or self._known[0] is not state:
            self._known = state, self._find_legal(state)
        return self._known[1]

    def _find_legal(self, state: State) -> Legal:
        table = self._table
        left, boxes = min(self._limit - state.used, table.far + 1), min(state.boxes, table.enough + 1)
        key = State(left, boxes, *state[2:])
        if (found := table.legal.get(key)) is None:
            if len(table.legal) >= STATES:
                table.legal.clear()
            found = table.legal[key] = self._compute_legal(state)
        return found

    def _compute_legal(self, state: State) -> Legal:
        ids, text = self._outside(state) if state.label is None else self._in_label(state, state.label)
        masks, key = self._table.masks, (ids, text is not None, state.label is not None, state.tail)
        if (mask := masks.get(key)) is None:
            mask = masks[key] = mask_of((), self._vocab) if text is None else text.copy()
            add(mask, ids)
            mask.flags.writeable = not mask.any()
        done = text is None and self._may_end(state) and self._table.is_end.issuperset(ids)
        return Legal(ids, text is not None, mask, done)

    def _outside(self, state: State) -> tuple[Ids, Mask | None]:
        """Single tokens that may come next outside labels, and the set of text tokens that may, or None."""
        ids = self._starts(state)
        if self._may_end(state):
            ids += self._ends
        return ids, self._text(state, plain=False) if self._text_allowed(state) else None

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
        if state.within is not None or state.label is not None or (state.owed and not rules.bare_labels):
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
        missing = max(0, rules.least - state.boxes - (state.within is not None))
        stray = state.text and state.boxes > 0 and not rules.after
        if missing == 0 and ((state.owed and not rules.bare_labels) or stray):
            missing = 1
        labels = 0
        if missing and rules.labels == "required" and not state.labeled and state.within is None:
            labels = 3 - (0 if state.label is None else 1 + min(1, state.label))
        needed = missing * self.spelling.box.longest + labels
        return needed + (0 if state.within is None else state.within.place.shape.longest)

    def _text(self, state: State, plain: bool) -> Mask:
        """The tokens of free text, or of a label (`plain`: no special ones), but for those that would spell a tag."""
        texts, key = self._table.texts, (plain, state.tail)
        if key not in texts:
            forbidden = self.spelling.completes_tag(state.tail)
            mask = first_of(self.spelling.tokenizer.n_ranks if plain else self._vocab, self._vocab)
            remove(mask, (*self.spelling.tags, *self._ends, *forbidden))
            texts[key] = mask
        return texts[key]

    def _after(self, state: State, token: int) -> State:
        used, spelling = state.used + 1, self.spelling
        _, boxes, label, labeled, owed, text, tail, within = state
        if within is not None:
            if (further := self._places.after(within, token)) is None:
                return State(used, boxes + 1, labeled=labeled)
            return State(used, boxes, label, labeled, owed, text, tail, further)
        if label is not None:
            if token == spelling.tokenizer.ref_end:
                return State(used, boxes, None, True, True)
            return State(used, boxes, label + 1, labeled, owed, text, spelling.tail(tail, token))
        if token == spelling.tokenizer.ref_start:
            return State(used, boxes, 0, False, owed, text)
        if (shape := spelling.shapes.get(token)) is not None:
            return State(used, boxes, label, labeled, owed, text, b"", self._places.begin(shape))
        return State(used, boxes, label, False, False, True, spelling.tail(tail, token))
