"""Qwen's tokenizer: byte-level BPE over `qwen.tiktoken`, with the chat and image tags after the ranks.

The vocabulary file may hold any number of ranks R; the special tokens take the ids from R on, in a fixed order. What
stands between `<img>` and `</img>` becomes `n_queries` pad ids, whatever the image is called.
Source: docs/model.md section 7.
"""

from __future__ import annotations

import base64
import binascii
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from qvl_runtime.errors import CheckpointError, PromptError
from qvl_runtime.prompt.segment import ImageSlot, Segment

if TYPE_CHECKING:
    import tiktoken

    from qvl_runtime.prompt.images import ImageSource

VOCABULARY_FILE = "qwen.tiktoken"

Allowed = Literal["all", "image_tags", "grounding", "none"]
"""Which special strings in a text become special tokens; the rest stays plain text."""

GROUNDING_TAGS = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>")
IMAGE_TAGS = (*GROUNDING_TAGS, "<img>", "</img>", "<imgpad>")
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{n}|>" for n in range(205)), *IMAGE_TAGS)

_ALLOWED: Mapping[Allowed, frozenset[str]] = {
    "all": frozenset(SPECIAL_TOKENS),
    "image_tags": frozenset(IMAGE_TAGS),
    "grounding": frozenset(GROUNDING_TAGS),
    "none": frozenset(),
}

# How text is cut into words before the merges; the order of the alternatives matters.
WORD_PATTERN = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)


class Tokenizer:
    """Text to token ids and back.

    `ranks` maps the bytes of each token to its id, 0 to R-1; `n_queries` is how many pad ids an image takes. The
    ids of the special tokens are attributes: `endoftext`, `im_start`, `im_end`, `ref_start`, ... `img_pad`.
    """

    def __init__(self, ranks: Mapping[bytes, int], n_queries: int = 256) -> None:
        import tiktoken

        self.n_queries = n_queries
        self.n_ranks = len(ranks)
        self.special_tokens = {token: self.n_ranks + n for n, token in enumerate(SPECIAL_TOKENS)}
        self.n_vocab = self.n_ranks + len(SPECIAL_TOKENS)
        self._bpe: tiktoken.Encoding = tiktoken.Encoding(
            "qwen", pat_str=WORD_PATTERN, mergeable_ranks=dict(ranks), special_tokens=self.special_tokens
        )
        special = self.special_tokens
        self.endoftext = special["<|endoftext|>"]
        self.im_start, self.im_end = special["<|im_start|>"], special["<|im_end|>"]
        self.ref_start, self.ref_end = special["<ref>"], special["</ref>"]
        self.box_start, self.box_end = special["<box>"], special["</box>"]
        self.quad_start, self.quad_end = special["<quad>"], special["</quad>"]
        self.img_start, self.img_end, self.img_pad = special["<img>"], special["</img>"], special["<imgpad>"]

    @classmethod
    def from_folder(cls, folder: str | Path, n_queries: int = 256, image_start_id: int | None = None) -> Tokenizer:
        """Read `qwen.tiktoken` from a model folder.

        `image_start_id`, where given, is what the model's configuration says the id of `<img>` is; a vocabulary that
        puts it elsewhere belongs to another model and raises `CheckpointError`, as a damaged file does.
        """
        path = Path(folder) / VOCABULARY_FILE
        tokenizer = cls(read_ranks(path), n_queries)
        if image_start_id is not None and image_start_id != tokenizer.img_start:
            raise CheckpointError(
                f"{path} holds {tokenizer.n_ranks} ranks, which puts <img> at id {tokenizer.img_start}, but config.json"
                f" has visual.image_start_id {image_start_id}: take both files from one checkpoint"
            )
        return tokenizer

    def encode(self, text: str, allowed: Allowed = "all") -> list[int]:
        """Token ids of a text, NFC-normalized; no begin or end token is added.

        An image in the text (where `allowed` honours `<img>`) becomes its span of pad ids; raises `PromptError` for
        an unclosed `<img>` or a tag inside one.
        """
        return self.encode_tagged(text, allowed).ids

    def encode_tagged(self, text: str, allowed: Allowed = "all") -> Segment:
        """Like `encode`, and keeps what stands between `<img>` and `</img>`, letter for letter, as image sources."""
        segment, rest, tags = Segment(), text, _ALLOWED[allowed]
        while "<img>" in tags and "<img>" in rest:
            before, _, after = rest.partition("<img>")
            source, end, rest = after.partition("</img>")
            if not end:
                raise PromptError(f"<img> before {after[:60]!r} is not closed: write <img>path</img>")
            if "<" in source and any(tag in source for tag in tags):  # a data URL, megabytes long, has no "<"
                raise PromptError(f"<img>{source[:60]}</img> has a special tag inside; expected a path or a URL")
            segment.extend(self._encode_text(before, allowed), self.image_span(source))
        return segment.extend(self._encode_text(rest, allowed))

    def image_span(self, source: ImageSource) -> Segment:
        """`<img>`, `n_queries` pad ids, `</img>`: the place of one image, n_queries + 2 ids."""
        ids = [self.img_start, *[self.img_pad] * self.n_queries, self.img_end]
        return Segment(ids, [ImageSlot(1, source)])

    def spell_path(self, path: str) -> list[int]:
        """The ids that the *original* puts inside an image span: the bytes of the path, then pads up to n_queries.

        Nothing in this package feeds them to the model; they serve to compare with ids made by the original, and
        `decode` reads them back. Raises `PromptError` for a path of more than n_queries bytes, as the original does.
        """
        spelled = unicodedata.normalize("NFC", path).encode("utf-8")
        if len(spelled) > self.n_queries:
            raise PromptError(f"{path[:60]!r} has {len(spelled)} bytes; the original spells at most {self.n_queries}")
        return [*spelled, *[self.img_pad] * (self.n_queries - len(spelled))]

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one id stands for; an id beyond the vocabulary (a padding row of the model) raises."""
        if not 0 <= token_id < self.n_vocab:
            raise PromptError(f"token id {token_id} stands for no text; this vocabulary ends at {self.n_vocab - 1}")
        return self._bpe.decode_single_token_bytes(token_id)

    def decode(self, ids: Sequence[int], errors: str = "replace", skip_special_tokens: bool = False) -> str:
        """Text of complete ids; `errors` is that of `bytes.decode`.

        An image span is written `<img>path</img>`, where the path is the bytes before the first pad: none in spans
        of ours. `skip_special_tokens` drops every id from `<|endoftext|>` on, padding rows too. Raises `PromptError`
        for an id without a token or a malformed span. For ids as they come out of the model use `StreamDecoder`.
        """
        text, position = bytearray(), 0
        while position < len(ids):
            token = ids[position]
            if not (skip_special_tokens and token >= self.n_ranks):
                text += self.token_bytes(token)
            position += 1
            if token == self.img_start:
                end = _find(ids, self.img_end, position)
                if end is None:
                    raise PromptError(f"the image span at index {position - 1} has no </img> (id {self.img_end})")
                text += self._spelled_path(ids[position:end])
                position = end
        return text.decode("utf-8", errors)

    def _spelled_path(self, span: Sequence[int]) -> bytes:
        end = _find(span, self.img_pad, 0)
        if end is None or not all(0 <= value < 256 for value in span[:end]):
            raise PromptError(f"an image span starts with ids {list(span[:8])}; expected bytes of a path, then pad ids")
        spelled = bytes(span[:end])
        spelled.decode("utf-8")  # raises UnicodeDecodeError whatever `errors` says: half a path names nothing
        return spelled

    def _encode_text(self, text: str, allowed: Allowed) -> list[int]:
        normal = unicodedata.normalize("NFC", text)
        try:
            return self._bpe.encode(normal, allowed_special=set(_ALLOWED[allowed]), disallowed_special=())
        except ValueError as error:  # the word pattern backtracks: a few 100,000 spaces in a row exhaust its stack
            raise PromptError(
                f"{text[:60]!r}... ({len(text)} characters) cannot be cut into words ({error}): "
                "shorten its longest run of white space"
            ) from error


def read_ranks(path: Path) -> dict[bytes, int]:
    """Read a vocabulary file, lines of `base64(token bytes) rank`; every byte and every rank must be there once."""
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist: copy {VOCABULARY_FILE} from the published model") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise CheckpointError(f"{path} line {number} is {line[:40]!r}; expected base64(token) and a rank") from None
    if set(ranks.values()) != set(range(len(ranks))) or any(bytes([byte]) not in ranks for byte in range(256)):
        raise CheckpointError(
            f"{path} holds {len(ranks)} tokens; expected all 256 single bytes and the ranks 0 to {len(ranks) - 1}, "
            "each once: the file is cut or damaged, fetch it again"
        )
    return ranks


def _find(ids: Sequence[int], wanted: int, start: int) -> int | None:
    return next((index for index in range(start, len(ids)) if ids[index] == wanted), None)
