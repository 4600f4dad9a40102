"""How much of the JSON Schema Test Suite answers can be held to: `python -m tools.schema_suite FOLDER`.

FOLDER is `json/tests/draft2020-12` of the suite, which the source distribution of jsonschema carries:
`pip download jsonschema==4.26.0 --no-binary jsonschema --no-deps`. A schema is either refused, with the reason, or held
to: then each valid instance of the suite must be writable and no invalid one. Instances are written as `json.dumps`
does, and with the properties in the schema's order. The last column is llguidance by itself, with its own options.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

from qvl_runtime.engine.engine import NANO
from qvl_runtime.engine.guided import Guides
from qvl_runtime.errors import ConstraintError
from qvl_runtime.prompt.tokenizer import Tokenizer
from qvl_runtime.schedule.guide_checks import Guide

VOCAB = 1152  # nano's rows of logits
KINDS = ("exact", "too strict", "too loose", "refused")


def ordered(instance: Any, schema: Any) -> Any:
    """The instance with the properties of its top level in the schema's order."""
    if not isinstance(instance, dict) or not isinstance(schema, dict):
        return instance
    first = [key for key in schema.get("properties", {}) if key in instance]
    return {key: instance[key] for key in (*first, *(key for key in instance if key not in first))}


def accepted(matcher: Any, tokenizer: Tokenizer, schema: Any, instance: Any) -> bool:
    """Whether an instance can be written under a compiled schema."""
    for one in (instance, ordered(instance, schema)):
        copy = matcher.deep_copy()
        ids = tokenizer.encode(json.dumps(one, ensure_ascii=False), "none")
        if copy.try_consume_tokens(ids) == len(ids) and copy.is_accepting():
            return True
    return False


def judge(matcher: Any, tokenizer: Tokenizer, group: Any) -> str:
    """How a compiled schema treats the suite's instances."""
    verdicts = {(test["valid"], accepted(matcher, tokenizer, group["schema"], test["data"])) for test in group["tests"]}
    return "too loose" if (False, True) in verdicts else "too strict" if (True, False) in verdicts else "exact"


def alone(tokenizer: Any, schema: Any) -> Any | None:
    """llguidance's own matcher with its own options; None if it refuses the schema."""
    from llguidance import LLMatcher

    try:
        matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_json_schema(json.dumps(schema)), log_level=0)
    except ValueError:
        return None
    return None if matcher.is_error() else matcher


def row(name: str, ours: Counter[str], theirs: Counter[str]) -> str:
    """A row of the table."""
    return f"| {name} | {ours.total()} | {' | '.join(str(ours[kind]) for kind in KINDS)} | {theirs['exact']} |"


def main() -> None:
    """Print one row a file of the suite."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--show", action="store_true", help="name the schemas that are not held to exactly")
    args = parser.parse_args()
    tokenizer = Tokenizer.from_folder(NANO)
    guides = Guides(tokenizer, VOCAB)
    totals, totals_alone = Counter[str](), Counter[str]()
    print("| keyword | schemas | exact | too strict | too loose | refused | exact, llguidance alone |")
    print("|---" * 7 + "|")
    for path in sorted(args.folder.glob("*.json")):
        ours, theirs = Counter[str](), Counter[str]()
        for group in json.loads(path.read_text("utf-8")):
            try:
                compiled = guides.compile(Guide("json", json.dumps(group["schema"]), "json_schema"))
                verdict = judge(compiled, tokenizer, group)
            except ConstraintError as error:
                verdict = "refused"
                if args.show:
                    print(f"    {path.stem}: {group['description']}: {error}")
            ours[verdict] += 1
            if args.show and verdict in ("too loose", "too strict"):
                print(f"    {path.stem}: {group['description']}: {verdict}")
            matcher = alone(guides._ll_tokenizer(), group["schema"])
            theirs["refused" if matcher is None else judge(matcher, tokenizer, group)] += 1
        totals += ours
        totals_alone += theirs
        print(f"| {path.stem} | {ours.total()} | {' | '.join(str(ours[kind]) for kind in KINDS)} | {theirs['exact']} |")
    print(
        f"| **all** | {totals.total()} | {' | '.join(str(totals[kind]) for kind in KINDS)} | {totals_alone['exact']} |"
    )
    print(f"llguidance alone: {', '.join(f'{totals_alone[kind]} {kind}' for kind in KINDS)}")


if __name__ == "__main__":
    main()
