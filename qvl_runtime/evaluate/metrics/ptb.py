"""Split a caption into words as the COCO caption tool does: Penn Treebank tokens, lower case, no punctuation.

The tool runs Stanford's PTBTokenizer of CoreNLP 3.4.1 (Java) with `-lowerCase`; this follows what it does to the text
of captions. Its quirk is kept: brackets become `-lrb-` and the like, which the list of punctuation, written in capital
letters, does not remove.
"""

from __future__ import annotations

import re

# Each is a token of its own, as are all other single characters that no rule joins.
_PUNCTUATION = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_AS_ASCII = {
    "£": "#",
    "€": "$",
    "’": "'",
    "‘": "`",
    "“": "``",
    "”": "''",
    "–": "--",
    "—": "--",
    "…": "...",
    "¢": "cents",
}
_ENTITIES = {"&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": '"', "&apos;": "'", "&nbsp;": " "}
_TITLES = (
    "mr|mrs|ms|mz|dr|prof|gen|rep|sen|gov|sgt|col|capt|lt|cmdr|maj|st|mt|ft|messrs|drs|rev|hon|"
    "jan|feb|mar|apr|jun|jul|aug|sep|sept|oct|nov|dec|mon|tue|tues|wed|thu|thurs|fri|"
    "inc|co|corp|ltd|bros|cos|dept|univ|jr|sr|bldg|ave|blvd|rd|vs|etc|al|seq|alex|wm|jos|cie|ph\\.d"
)
_WORD = re.compile(
    rf"""
      https?://[^\s"<>|()]+(?<![.,;:!?'])                # addresses
    | www\.[^\s"<>|()]+(?<![.,;:!?'])
    | [\w.+-]+@[\w-]+(?:\.[\w-]+)+
    | (?:[a-z0-9-]+\.)+(?:com|net|org|edu)\b
    | [@#][a-z]\w*                                       # names and tags
    | can(?=not\b) | (?:gon|wan)(?=na(?![\w-])) | got(?=ta(?![\w-])) | (?:lem|gim)(?=me(?![\w-]))
    | (?<![^\W_])d'ye\b
    | (?<![^\W_])'t(?=(?:is|was)\b)
    | '(?:n'|(?:em|til|till|cause|n|\d\ds?)(?!\w))        # words and years without their beginning
    | y'(?=all\b) | [:;]-?[()]
    | n't\b
    | '(?:s|m|d|ll|re|ve)\b
    | (?:[a-z]\.)+[a-z]\.?(?![a-z]) (?<=\.) | (?:[a-z]\.){{2,}} | (?<![^\W_])[a-z]\.(?=\s|$)   # u.s., b.
    | (?<![^\W_])(?:{_TITLES})\.(?!\w)
    | (?<![^\W_])(?:nos?|fig|figs|art|vol|pp?|ex)\.(?=\s*\d)
    | [+-]?(?:\d+|\.\d+)(?:[.,:/-]\d+)*(?:st|nd|rd|th|s)?(?![^\W_]|-[^\W\d_])  # 1,000.5, 10:30, 1/2, 3-4
    | c\+\+ | c\#
    | [^\W_]+(?=n't\b)
    | (?:[^\W\d_]'(?!(?:ve|ll|re)\b)(?=[^\W\d_]{{2}}))?[^\W_]+   # words, o'clock, t-shirt, at&t, and/or
      (?: -[^\W_]+
        | (?:&|'(?!(?:s|m|d|t|ll|re|ve|all)\b|n'))(?=[^\W\d_])[^\W_]+
        | \.(?=[^\W\d_]{{2}})[^\W_]+
        | /(?=[^\W\d_])[^\W_]+
      )*
    | \.{{2,}} | -{{2,}} | `` | '' | [?!]+ | \S
    """,
    re.VERBOSE,
)


def ptb_tokens(text: str) -> list[str]:
    """Return the lower-case words of a caption, without punctuation, in order."""
    text = text.replace("\n", " ").lower()
    for entity, character in _ENTITIES.items():
        text = text.replace(entity, character)
    text = "".join(_AS_ASCII.get(character, character) for character in text)
    return [token for match in _WORD.finditer(text) if (token := _written(match[0])) not in _PUNCTUATION]


def _written(token: str) -> str:
    """A token as the tool writes it; quotation marks and runs of dots or dashes all count as punctuation."""
    if token == '"':
        return "''"
    if token[:2] == "..":
        return "..."
    if token[:2] == "--" and len(token) <= 5:
        return "--"
    return "".join(_BRACKETS.get(character, character) for character in token)
