"""Answers that follow a JSON Schema, a regular expression or a Lark grammar, by llguidance (extra `guided`).

llguidance computes which tokens may come next as it goes, so that a new schema is ready in a millisecond or two, and it
has limits on time and memory. What is asked for may come from a stranger: it is compiled in a thread that has
`COMPILE_S` seconds, nothing is fetched, and what cannot be followed exactly is refused with its place.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from qvl_runtime.engine.schema_paths import paths_of, remote_references, subschemas
from qvl_runtime.errors import ConfigError, ConstraintError, escaped, quoted, shortened
from qvl_runtime.prompt.token_mask import Mask, add, none_of, remove
from qvl_runtime.prompt.tokenizer import Tokenizer
from qvl_runtime.schedule.guide_checks import Guide

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

COMPILE_S = 5.0  # seconds for a grammar to compile
MAX_COMPILING = 4  # grammars at a time, those included that were given up on
CACHED = 64  # grammars that are kept compiled
# One space, or one line break with an indentation: a model that is unsure would write white space without end.
_WHITE_SPACE = r" |\n[ \t]{0,32}"
_LIMITS = {
    "initial_lexer_fuel": 100_000,  # also bounds what is forced in a row: 0.2 s for a repetition of a million
    "step_lexer_fuel": 200_000,  # 14 ms a token at most
    "step_max_items": 50_000,  # 3 ms a token at most
    "max_lexer_states": 50_000,  # about 100 MB
    "max_grammar_size": 200_000,
}


class GuidedConstraint:
    """One answer that follows a compiled grammar; its end tokens are allowed where the grammar accepts."""

    def __init__(self, matcher: LLMatcher, vocab: int, end_ids: Iterable[int], own_ends: Iterable[int]) -> None:
        """end_ids: those of the answer; own_ends: the tokens that stand for the end in the grammar's masks."""
        self._matcher, self._vocab, self._ends, self._own_ends = matcher, vocab, tuple(end_ids), tuple(own_ends)

    @property
    def done(self) -> bool:
        """Whether the grammar accepts what there is, and no continuation."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def mask(self) -> Mask:
        """The tokens that may come next. Raises `ConstraintError` beyond the limits."""
        matcher, out = self._matcher, none_of(self._vocab)
        matcher.unsafe_compute_mask_ptr(out.ctypes.data, out.nbytes)
        self._check()
        remove(out, self._own_ends)
        if matcher.is_accepting():
            add(out, self._ends)
        return out

    def advance(self, token: int) -> bool:
        """Append a token; False if it may not come next. Raises `ConstraintError` beyond the limits."""
        if not self._matcher.validate_tokens([token]):
            return False
        self._matcher.consume_token(token)
        self._check()
        return True

    def accepts(self, tokens: Iterable[int]) -> int:
        """How many of these tokens may come next, in order."""
        return self._matcher.validate_tokens(list(tokens))

    def rollback(self, count: int) -> None:
        """Take the last `count` tokens back."""
        if count:
            self._matcher.rollback(count)

    def fork(self) -> GuidedConstraint:
        """Return a copy that is continued independently."""
        return GuidedConstraint(self._matcher.deep_copy(), self._vocab, self._ends, self._own_ends)

    def forced(self) -> list[int]:
        """The tokens that must come next, in the tokenizer's own split."""
        return self._matcher.compute_ff_tokens()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ConstraintError(
                f"the answer cannot follow its grammar any further: {_reason(self._matcher)}; make it simpler"
            )


class Guides:
    """Compiles what answers are asked to follow, for one tokenizer, and keeps the latest. Safe in any thread."""

    def __init__(self, tokenizer: Tokenizer, vocab: int) -> None:
        """vocab: rows of logits; those without a token are never allowed."""
        self._tokenizer, self._vocab = tokenizer, vocab
        self._compiled: OrderedDict[Guide, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()
        self._wrapped: LLTokenizer | None = None
        self._slots = threading.BoundedSemaphore(MAX_COMPILING)

    def begin(self, guide: Guide, end_ids: Iterable[int]) -> GuidedConstraint:
        """Begin an answer that follows a guide, compiled now if need be. Raises as `compile` does."""
        ends = (self._tokenizer.im_end, self._tokenizer.endoftext)
        own = [end for end in end_ids if end < self._vocab]
        return GuidedConstraint(self.compile(guide).deep_copy(), self._vocab, own, ends)

    def compile(self, guide: Guide) -> LLMatcher:
        """Compile a guide, or find it compiled.

        Raises `ConstraintError` if it is malformed or not supported, or takes longer than `COMPILE_S`, and
        `ConfigError` without llguidance.
        """
        with self._lock:
            if (found := self._compiled.get(guide)) is not None:
                self._compiled.move_to_end(guide)
                return found
        matcher = self._in_time(guide)
        with self._lock:
            self._compiled[guide] = matcher
            while len(self._compiled) > CACHED:
                self._compiled.popitem(last=False)
        return matcher

    def _in_time(self, guide: Guide) -> LLMatcher:
        """Compile in a thread, which is left behind when its time is over: it ends by llguidance's own limits."""
        if not self._slots.acquire(timeout=COMPILE_S):
            raise ConstraintError(f"{MAX_COMPILING} grammars are still being compiled: try again later")
        result: list[LLMatcher | BaseException] = []
        wrapped = self._ll_tokenizer()

        def work() -> None:
            try:
                result.append(_compile(guide, wrapped))
            except BaseException as error:
                result.append(error)
            finally:
                self._slots.release()

        thread = threading.Thread(target=work, name="qvl-grammar", daemon=True)
        thread.start()
        thread.join(COMPILE_S)
        if not result:
            raise ConstraintError(f"{guide.name} takes more than {COMPILE_S:g} seconds to compile: make it simpler")
        if isinstance(result[0], BaseException):
            raise result[0]
        return result[0]

    def _ll_tokenizer(self) -> LLTokenizer:
        """The vocabulary in llguidance's form, made on first use in about a second for the published one."""
        with self._lock:
            if self._wrapped is None:
                try:
                    from llguidance.tiktoken import lltokenizer_from_encoding
                except ImportError as error:
                    raise ConfigError(
                        f"llguidance is not installed ({error}): pip install 'qvl-runtime[guided]', which json_schema, "
                        "json_object, regex, choice and grammar need"
                    ) from None
                ends = [self._tokenizer.im_end, self._tokenizer.endoftext]
                self._wrapped = lltokenizer_from_encoding(self._tokenizer.encoding, n_vocab=self._vocab, eos_token=ends)
            return self._wrapped


def _compile(guide: Guide, tokenizer: LLTokenizer) -> LLMatcher:
    from llguidance import LLMatcher, LLParserLimits, regex_to_lark

    if guide.kind == "json":
        options: Any = {"whitespace_pattern": _WHITE_SPACE, "lenient": False, "coerce_one_of": False}
        try:
            grammar = LLMatcher.grammar_from_json_schema(guide.text, overrides=options)
        except ValueError as error:
            raise ConstraintError(f"{guide.name} cannot be used: {_line(str(error))}") from None
    elif guide.kind == "regex":
        grammar = LLMatcher.grammar_from_lark(f"start: /{regex_to_lark(guide.text, 'd')}/")  # \d is 0 to 9
    else:
        grammar = LLMatcher.grammar_from_lark(guide.text)
    limits = LLParserLimits(**_LIMITS, verbose_errors=False)  # type: ignore[arg-type]
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
    if matcher.is_error():
        raise _error_of(guide, _reason(matcher))
    return matcher


def _error_of(guide: Guide, reason: str) -> ConstraintError:
    """Why a guide cannot be used, with the place of a keyword that is not supported."""
    if guide.kind == "json":
        schema = json.loads(guide.text)
        if "not present in a registry" in reason and (remote := remote_references(schema)):  # nothing is fetched
            return ConstraintError(f"{guide.name} refers to another document at {remote[0]}: put it into $defs")
        unsupported = re.match(r"Unimplemented keys: (\[.*\])", reason)
        keywords = json.loads(unsupported[1]) if unsupported else ["oneOf"] if reason.startswith("oneOf") else []
        if places := paths_of(schema, keywords):
            return ConstraintError(f"{guide.name} has keywords that are not supported: {', '.join(places[:5])}")
        named = re.match(r"Unknown (format): (.*)|Invalid (type): (.*)", reason)
        if named is not None:
            key, value = named[1] or named[3], named[2] or named[4]
            found = [path for path, within in subschemas(schema) if value in _listed(within.get(key))]
            return ConstraintError(f"{guide.name} has the {key} {quoted(value)}, which does not exist, at {found[:3]}")
    if guide.kind == "regex":  # shown as a grammar around it, which the user did not write
        _, _, reason = reason.rpartition("error: ")
        reason = reason.split("; 1 |")[0]
    return ConstraintError(f"{guide.name} {quoted(guide.text, 60)} cannot be used: {reason}")


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _reason(matcher: LLMatcher) -> str:
    return _line(matcher.get_error())


def _line(text: str) -> str:
    """An error of llguidance in one line, without its drawings of the place."""
    lines = [line.strip() for line in text.splitlines()]
    return shortened(escaped("; ".join(line for line in lines if line.strip("^ |") and line != "<non-verbose/>")), 300)
