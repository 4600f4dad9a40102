"""TouchStone: another model marks each answer against a reference, in both orders, over any OpenAI-compatible server.

The judge sees no image, only a person's description of it. Prompt, temperature and marks are those of TouchStone's own
script (https://github.com/OFA-Sys/TouchStone, Apache-2.0), whose published figures were judged by gpt-4 in 2023:
another judge gives other marks, and none of them can be compared with those.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from qvl_runtime.errors import DownloadError, QVLError, quoted
from qvl_runtime.evaluate.http_client import Client
from qvl_runtime.evaluate.records import Records
from qvl_runtime.evaluate.scoring import Answer, Mark, Metric

RECORDS = "judged.jsonl"
SCORE, REFERENCE = "score", "reference answers"
AT_ONCE = 8
_SYSTEM = "You are a helpful and precise assistant for checking the quality of the answer."
_QUERY = """[Detailed Image Description]
{description}

[Question]
{question}

[The Start of Assistant 1's Answer]
{first}

[The End of Assistant 1's Answer]

[The Start of Assistant 2's Answer]
{second}

[The End of Assistant 2's Answer]

[System]
We would like to request your feedback on the performance of two AI assistants in response to the user question and \
image description displayed above. AI assistants are provided with detailed image description and questions.
Please rate the helpfulness, relevance, accuracy, comprehensiveness of their responses. Each assistant receives an \
overall score on a scale of 1 to 10, where a higher score indicates better overall performance.
Please first output a single line containing only two values indicating the scores for Assistant 1 and 2, \
respectively. The two scores are separated by a space. In the subsequent line, please provide a comprehensive \
explanation of your evaluation, avoiding any potential bias and ensuring that the order in which the responses were \
presented does not affect your judgment.

"""

# Marks of 1 to 10, times 100; each category of the questions alone, too.
JUDGED = Metric(SCORE, lambda answers, context: [], out_of=1000.0)


class Judge(NamedTuple):
    """Another model that marks answers."""

    client: Client
    model: str


class Judged(NamedTuple):
    """The marks of all answers that the judge has marked."""

    marks: list[Mark]
    failed: int  # judgments without two marks, which are left out


def judge_answers(
    answers: Sequence[Answer], judge: Judge, folder: Path, progress: Callable[[int, int], None] | None = None
) -> Judged:
    """Have each answer marked twice, as second and as first of two, into FOLDER/judged.jsonl, which is resumed.

    An answer that is an error is not judged. Raises `DataError` where the file belongs to other answers or another
    judge.
    """
    good = [answer for answer in answers if answer.error is None]
    texts = "\n".join(f"{answer.number}\t{answer.text}" for answer in good)
    settings = {
        "judge": judge.model,
        "url": judge.client.url,
        "answers": hashlib.sha256(texts.encode("utf-8", "surrogatepass")).hexdigest(),
    }
    rounds = [(2 * answer.number + order, answer, order) for answer in good for order in (0, 1)]
    with Records(folder / RECORDS, settings) as records, ThreadPoolExecutor(AT_ONCE) as pool:
        left = [one for one in rounds if one[0] not in records.entries]
        results = pool.map(lambda one: _judgment(judge, one[1], one[2]), left)
        for (number, answer, order), result in zip(left, results, strict=True):
            records.add({"number": number, "id": answer.sample.id, "order": order, **result})
            if progress is not None:
                progress(len(records.entries), len(rounds))
        entries = records.entries
    marks = [mark for number, answer, _ in rounds for mark in _marks(answer, entries[number])]
    return Judged(marks, sum("error" in entries[number] for number, _, _ in rounds))


def _judgment(judge: Judge, answer: Answer, order: int) -> dict[str, Any]:
    """The marks of one round: of the model, and of the reference. Order 0: the reference is first."""
    facts = answer.sample.facts
    both = [str(facts["gpt4_ha_answer"]), answer.text]
    first, second = both if order == 0 else reversed(both)
    query = _QUERY.format(
        description=facts["human_annotation"], question=answer.sample.question, first=first, second=second
    )
    messages = [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": query}]
    body = {"model": judge.model, "messages": messages, "temperature": 0, "stop": ["\n"]}
    try:
        found = judge.client.post("/chat/completions", body)
        text = str(found["choices"][0]["message"]["content"])
        values = [float(value) for value in text.strip().split(" ")]
        if len(values) != 2 or not all(0 <= value <= 10 for value in values):
            raise DownloadError(f"the judge wrote {quoted(text)}; expected two marks from 1 to 10")
    except (QVLError, KeyError, IndexError, TypeError, ValueError) as error:
        return {"error": str(error)}
    reference, own = values if order == 0 else reversed(values)
    return {"mark": own, "reference": reference}


def _marks(answer: Answer, entry: Mapping[str, Any]) -> list[Mark]:
    if "error" in entry:
        return []
    picture, number = f"{answer.sample.id}", answer.number
    categories = str(answer.sample.facts["category"]).split(",")
    marks = [Mark(SCORE, picture, entry["mark"], number), Mark(REFERENCE, picture, entry["reference"], number)]
    return marks + [Mark(category.strip(), picture, entry["mark"], number) for category in categories]
