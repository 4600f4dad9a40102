"""Qwen's tokenizer: byte-level BPE over `qwen.tiktoken`, with special tokens for chat, images and boxes.

The vocabulary file may hold any number of ranks R; the special tokens have the ids from R on, in a fixed order. The
source between `<img>` and `</img>` becomes `n_queries` pad ids, whatever it is. Source: docs/model.md section 7.
"""

from __future__ import annotations

import base64
import binascii
import codecs
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from qvl_runtime.errors import CheckpointError, PromptError, quoted
from qvl_runtime.prompt.segment import ImageSlot, Segment
from qvl_runtime.reading.regular_files import read_regular

if TYPE_CHECKING:
    import tiktoken

    from qvl_runtime.prompt.images import ImageSource

VOCABULARY_FILE = "qwen.tiktoken"
LARGEST_FILE = 16 << 20  # bytes: the published vocabulary has 2.7 million
LONGEST_TOKEN = 4096  # characters of base64: the longest published token has 128 bytes

Allowed = Literal["all", "image_tags", "grounding", "none"]
"""Which special strings in a text become special tokens; the others stay plain text."""

GROUNDING_TAGS = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>")
IMAGE_TAGS = (*GROUNDING_TAGS, "<img>", "</img>", "<imgpad>")
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{n}|>" for n in range(205)), *IMAGE_TAGS)

_ALLOWED: Mapping[Allowed, frozenset[str]] = {
    "all": frozenset(SPECIAL_TOKENS),
    "image_tags": frozenset(IMAGE_TAGS),
    "grounding": frozenset(GROUNDING_TAGS),
    "none": frozenset(),
}

# Splits text into words before the merges; the order of the alternatives matters.
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
    """Converts text to token ids and back.

    `ranks` maps the bytes of each token to its id, 0 to R-1; `n_queries` is the number of pad ids per image. The ids
    of the special tokens are attributes: `endoftext`, `im_start`, `im_end`, `ref_start`, ... `img_pad`.
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

    @property
    def encoding(self) -> tiktoken.Encoding:
        """The vocabulary in tiktoken's form, for libraries that read it."""
        return self._bpe

    @classmethod
    def from_folder(cls, folder: str | Path, n_queries: int = 256, image_start_id: int | None = None) -> Tokenizer:
        """Read `qwen.tiktoken` from a model folder.

        `image_start_id`, if given, is the id of `<img>` in the model's configuration; a vocabulary in which it differs
        belongs to another model and raises `CheckpointError`, as a damaged file does.
        """
        path = Path(folder) / VOCABULARY_FILE
        tokenizer = cls(read_ranks(path), n_queries)
        if image_start_id is not None and image_start_id != tokenizer.img_start:
            raise CheckpointError(
                f"{path} holds {tokenizer.n_ranks} ranks, which makes <img> id {tokenizer.img_start}, but config.json"
                f" has visual.image_start_id {image_start_id}: take both files from one checkpoint"
            )
        return tokenizer

    def encode(self, text: str, allowed: Allowed = "all") -> list[int]:
        """Token ids of a text, NFC-normalized; no begin or end token is added.

        If `allowed` includes `<img>`, an image in the text becomes a span of pad ids. Raises `PromptError` for an
        unclosed `<img>` or a tag inside one.
        """
        return self.encode_tagged(text, allowed).ids

    def encode_tagged(self, text: str, allowed: Allowed = "all") -> Segment:
        """Like `encode`, but keeps the verbatim text between `<img>` and `</img>` as image sources."""
        segment, position, tags = Segment(), 0, _ALLOWED[allowed]
        while "<img>" in tags and (start := text.find("<img>", position)) >= 0:
            content = start + len("<img>")
            end = text.find("</img>", content)
            if end < 0:
                raise PromptError(f"<img> before {text[content : content + 60]!r} is not closed: write <img>path</img>")
            source = text[content:end]
            if "<" in source and any(tag in source for tag in tags):  # a data URL, megabytes long, has no "<"
                raise PromptError(f"<img>{source[:60]}</img> has a special tag inside; expected a path or a URL")
            segment.extend(self._encode_text(text[position:start], allowed), self.image_span(source))
            position = end + len("</img>")
        return segment.extend(self._encode_text(text[position:], allowed))

    def image_span(self, source: ImageSource) -> Segment:
        """`<img>`, `n_queries` pad ids and `</img>`: the n_queries + 2 ids of one image."""
        ids = [self.img_start, *[self.img_pad] * self.n_queries, self.img_end]
        return Segment(ids, [ImageSlot(1, source)])

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token. Raises `PromptError` for an id past the vocabulary (a padding row of the model)."""
        if not 0 <= token_id < self.n_vocab:
            raise PromptError(f"token id {token_id} has no text; the ids of this vocabulary end at {self.n_vocab - 1}")
        return self._bpe.decode_single_token_bytes(token_id)

    def decode(self, ids: Sequence[int], errors: str = "replace", skip_special_tokens: bool = False) -> str:
        """The text of a complete list of ids; `errors` is that of `bytes.decode`.

        An image span becomes `<img>path</img>`, where the path is the bytes before the first pad; spans of this
        package have none. `skip_special_tokens` drops every id from `<|endoftext|>` on, padding rows included. Raises
        `PromptError` for an id without a token or a malformed span. To decode while generating, use `StreamDecoder`.
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
                text += self._image_path(ids[position:end])
                position = end
        return text.decode("utf-8", errors)

    def _image_path(self, span: Sequence[int]) -> bytes:
        end = _find(span, self.img_pad, 0)
        if end is None or not all(0 <= value < 256 for value in span[:end]):
            raise PromptError(f"an image span starts with ids {list(span[:8])}; expected bytes of a path, then pad ids")
        path = bytes(span[:end])
        path.decode("utf-8")  # raises UnicodeDecodeError whatever `errors` is: a partial path is useless
        return path

    def _encode_text(self, text: str, allowed: Allowed) -> list[int]:
        normal = unicodedata.normalize("NFC", text)
        try:
            return self._bpe.encode(normal, allowed_special=set(_ALLOWED[allowed]), disallowed_special=())
        except ValueError as error:  # the word pattern backtracks: some 100,000 spaces in a row exhaust its stack
            raise PromptError(
                f"{text[:60]!r}... ({len(text)} characters) cannot be split into words ({error}): "
                "shorten its longest run of white space"
            ) from error


def read_ranks(path: Path) -> dict[bytes, int]:
    """Read a vocabulary file, lines of `base64(token bytes) rank` with every byte and every rank exactly once."""
    try:
        lines = read_regular(path, CheckpointError, LARGEST_FILE).removeprefix(codecs.BOM_UTF8).splitlines()
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist: copy {VOCABULARY_FILE} from the published model") from None
    if lines and (lines[0].startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in lines[0]):
        raise CheckpointError(f"{path} is text in UTF-16; expected ASCII: copy {VOCABULARY_FILE} as a binary file")
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            if len(token) > LONGEST_TOKEN:
                raise ValueError
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise CheckpointError(
                f"{path} line {number} is {quoted(line[:40])}; expected base64(token) and a rank"
            ) from None
    if set(ranks.values()) != set(range(len(ranks))) or any(bytes([byte]) not in ranks for byte in range(256)):
        raise CheckpointError(
            f"{path} holds {len(ranks)} tokens; expected all 256 single bytes and the ranks 0 to {len(ranks) - 1}, "
            "each once: the file is truncated or damaged, download it again"
        )
    return ranks


def _find(ids: Sequence[int], token: int, start: int) -> int | None:
    return next((index for index in range(start, len(ids)) if ids[index] == token), None)
