"""The metrics by name, as tasks use them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence

from qvl_runtime.evaluate.metrics.anls import anls
from qvl_runtime.evaluate.metrics.boxes import box_accuracy
from qvl_runtime.evaluate.metrics.cider import cider_d
from qvl_runtime.evaluate.metrics.exact import exact_match, gqa_answer, mme_answer
from qvl_runtime.evaluate.metrics.relaxed import relaxed_accuracy
from qvl_runtime.evaluate.metrics.vqa import normalized_answer, vqa_score
from qvl_runtime.evaluate.readers.dialogues import COGNITION, PERCEPTION
from qvl_runtime.evaluate.samples import LETTERS
from qvl_runtime.evaluate.scoring import Answer, Context, Mark, Metric, Totals, each

ROTATION = 1_000_000  # MMBench numbers the rotations of a question: index, index + a million, ...


def _captions(answers: Sequence[Answer], context: Context) -> list[Mark]:
    scores = cider_d([a.text for a in answers], [a.sample.references for a in answers])
    return [Mark("CIDEr-D", a.sample.picture, score, a.number) for a, score in zip(answers, scores, strict=True)]


def _vqa(answer: Answer, context: Context) -> dict[str, float]:
    score = vqa_score(answer.text, answer.sample.references)
    kind = answer.sample.facts.get("answer_type")
    return {"VQA score": score, **({f"of type {kind}": score} if kind else {})}


def _relaxed(answer: Answer, context: Context) -> dict[str, float]:
    return {answer.sample.part or "relaxed accuracy": relaxed_accuracy(answer.text, answer.sample.references)}


def _mean_of_parts(names: Collection[str]) -> Totals:
    """The mean of the parts' rates, whatever their sizes, then each part."""
    mean = {name: 100.0 / len(names) for name in names}
    alone = {name: {name: 100.0} for name in sorted(names) if len(names) > 1}
    return {"relaxed accuracy": mean, **alone}


def _box(answer: Answer, context: Context) -> dict[str, float]:
    facts, (box,) = answer.sample.facts, answer.sample.references
    return {"IoU >= 0.5": box_accuracy(answer.text, tuple(box), facts["width"], facts["height"], context.scale)}


def _chosen(answer: Answer) -> float:
    (right,) = answer.sample.references
    return float(answer.text.strip() == LETTERS[right])


def _choice(answer: Answer, context: Context) -> dict[str, float]:
    part = answer.sample.part
    return {"accuracy": _chosen(answer), **({part: _chosen(answer)} if part else {})}


def _rotations(answers: Sequence[Answer], context: Context) -> list[Mark]:
    """A question is right when it is right in every rotation; a rotation that the run lacks does not count."""
    marks, right = [], defaultdict(list)
    for answer in answers:
        marks.append(Mark("one rotation", answer.sample.picture, _chosen(answer), answer.number))
        right[int(answer.sample.id) % ROTATION].append(marks[-1])
    whole = [Mark("all rotations", m[0].picture, min(x.value for x in m), m[0].number) for m in right.values()]
    return whole + marks


def _rotation_totals(names: Collection[str]) -> Totals:
    return {name: {name: 100.0} for name in ("all rotations", "one rotation") if name in names}


def _mme(answers: Sequence[Answer], context: Context) -> list[Mark]:
    """Accuracy of each subtask's questions, and accuracy+ of its pictures, whose questions must all be right."""
    marks, by_picture = [], defaultdict(list)
    for answer in answers:
        right = float(mme_answer(answer.text) == answer.sample.references[0])
        mark = Mark(f"{answer.sample.part}: accuracy", answer.sample.picture, right, answer.number)
        marks.append(mark)
        by_picture[answer.sample.part, answer.sample.picture].append(mark)
    for (part, picture), of_picture in by_picture.items():
        value = min(mark.value for mark in of_picture)
        marks.append(Mark(f"{part}: accuracy+", picture, value, of_picture[0].number))
    return marks


def _mme_totals(names: Collection[str]) -> Totals:
    """Perception and cognition, sums over their subtasks, then each subtask: 200 at most."""
    parts = {name.partition(":")[0] for name in names}

    def total(subtasks: Sequence[str]) -> dict[str, float]:
        return {f"{part}: {kind}": 100.0 for part in subtasks if part in parts for kind in ("accuracy", "accuracy+")}

    whole = {"perception": PERCEPTION.split(), "cognition": COGNITION.split()}
    totals = {name: total(subtasks) for name, subtasks in whole.items()}
    totals |= {part: total([part]) for subtasks in whole.values() for part in subtasks}
    return {name: weights for name, weights in totals.items() if weights}


def _exact(answer: Answer, context: Context) -> dict[str, float]:
    return {"accuracy": exact_match(answer.text, answer.sample.references)}


def _gqa(answer: Answer, context: Context) -> dict[str, float]:
    return {"accuracy": exact_match(gqa_answer(answer.text), answer.sample.references)}


def _anls(answer: Answer, context: Context) -> dict[str, float]:
    return {"ANLS": anls(answer.text, answer.sample.references)}


CIDER = Metric("CIDEr-D", _captions, whole_set=True, out_of=1000.0)
VQA = Metric("VQA score", each(_vqa), normalized_answer)
ANLS = Metric("ANLS", each(_anls))
RELAXED = Metric("relaxed accuracy", each(_relaxed), totals=_mean_of_parts)
EXACT = Metric("accuracy", each(_exact), lambda text: text.strip().lower())
GQA = Metric("accuracy", each(_gqa), gqa_answer)
BOXES = Metric("IoU >= 0.5", each(_box), str)
CHOICE = Metric("accuracy", each(_choice))
MMBENCH = Metric("all rotations", _rotations, totals=_rotation_totals)
MME = Metric("perception", _mme, mme_answer, _mme_totals, out_of=2000.0)
