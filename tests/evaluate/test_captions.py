"""CIDEr-D and its tokens against the COCO caption tool, whose tokenizer is a Java program."""

from __future__ import annotations

import random
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

from qvl_runtime.evaluate.metrics.cider import cider_d
from qvl_runtime.evaluate.metrics.ptb import ptb_tokens

pytestmark = pytest.mark.unit
needs_tool = pytest.mark.skipif(find_spec("pycocoevalcap") is None, reason="needs pycocoevalcap: pip install it")
needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="needs java, for the COCO tool's tokenizer")

CAPTIONS = """
A man's dog isn't here; he can't, cannot and won't come.
The U.S. flag (red, white & blue) costs $3.50 or 50% off.
A t-shirt with "quoted" text and a 'stop' sign.
Mr. Smith vs. Mrs. Jones at St. John's on 12/25/2014 at 10:30 a.m.
Two men's bikes' wheels -- and more ... dots.
A black-and-white x-ray of 3D glasses, 2nd row, 20-year-old.
It's 5' 6" tall, and/or 1,000.5 people; 3-4 dogs!!
They’re “smart” ‘quotes’: don’t panic…
A café naïve 北京 menu at 25°C for £5.
AT&T and R&B on the o'clock news, ma'am.
I've got a gonna-be; I'd've, they'll, we're, y'all.
a red,white and blue kite [in] {the} sky
Who is it ?! hey
a man wearing a number 7. he is running
tv tray w/ food, 10 ft. away
""".strip().splitlines()

FEW_WORDS = "a the dog cat man runs sits on grass near red small big ball"


@needs_tool
@needs_java
def test_tokens_are_those_of_the_java_tokenizer(tmp_path: Path) -> None:
    from pycocoevalcap.tokenizer import ptbtokenizer

    (tmp_path / "captions").write_text("\n".join(CAPTIONS), encoding="utf-8")
    jar = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
    command = ["java", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    ran = subprocess.run([*command, str(tmp_path / "captions")], capture_output=True, check=True, timeout=60)
    lines = ran.stdout.decode().split("\n")
    for caption, line in zip(CAPTIONS, lines, strict=False):
        expected = [word for word in line.split() if word not in ptbtokenizer.PUNCTUATIONS]
        assert ptb_tokens(caption) == expected


def drawn(images: int) -> tuple[list[str], list[list[str]]]:
    """Candidates and one to five references each, of a small vocabulary, so that n-grams are shared."""
    rng, words = random.Random(3), FEW_WORDS.split()

    def sentence() -> str:
        return " ".join(rng.choice(words) for _ in range(rng.randint(0, 14)))

    references = [[sentence() for _ in range(rng.randint(1, 5))] for _ in range(images)]
    return [rng.choice([sentence(), references[i][0]]) for i in range(images)], references


@needs_tool
@pytest.mark.parametrize("images", [1, 2, 7, 60])
def test_scores_are_those_of_the_tool(images: int) -> None:
    from pycocoevalcap.cider.cider import Cider

    candidates, references = drawn(images)
    expected = Cider().compute_score(dict(enumerate(references)), {i: [c] for i, c in enumerate(candidates)})[1]
    assert cider_d(candidates, references) == pytest.approx(list(expected), abs=1e-9)


def test_a_hand_worked_score() -> None:
    # Two images, log 2 to each word of one of them: "red" and "dog" weigh log 2, "a", in both, nothing. The candidate
    # equals its reference: 1 for n = 1 and 2 ("a red", "red dog"), 1 for n = 3 ("a red dog"); none for n = 4.
    scores = cider_d(["a red dog", "zebra"], [["a red dog"], ["a cat"]])
    assert scores == pytest.approx([7.5, 0.0])


def test_a_single_image_scores_nothing() -> None:
    assert cider_d(["a dog runs on grass"], [["a dog runs on grass"]]) == [0.0]  # log 1: every n-gram weighs nothing


def test_brackets_stay_as_in_the_tool() -> None:
    assert ptb_tokens("A (red) dog.") == ["a", "-lrb-", "red", "-rrb-", "dog"]
