"""A data set of two samples for every reader, in each layout that it knows."""

from __future__ import annotations

from qvl_runtime.evaluate.readers.dialogues import SUBTASKS
from tests.evaluate.data_files import (
    ANNOTATIONS,
    BOXES,
    CAPTIONS,
    COCO,
    KARPATHY,
    MMBENCH,
    MMBENCH_TSV,
    MME_IDS,
    MME_TEXT,
    OFFICIAL,
    RED,
    REFCOCO,
    SCIENCE,
    SEED_IMAGES,
    SEED_QUESTIONS,
    TOUCHSTONE,
    TWO,
    WITHOUT_CONFIDENCE,
    Files,
    of_lines,
    seed_line,
    with_people,
)

CASES = [
    Files(
        "flickr", {"flickr30k/flickr30k_karpathy_test.json": COCO}, ("f/0.png", "f/1.png"), (5, 6), CAPTIONS, "images"
    ),
    Files(
        "flickr",
        {"flickr30k/dataset_flickr30k.json": KARPATHY},
        ("flickr30k/flickr30k-images/0.png", "flickr30k/flickr30k-images/1.png"),
        (5, 6),
        CAPTIONS,
        "images",
        "karpathy",
    ),
    Files("nocaps", {"nocaps/nocaps_val.json": COCO}, ("f/0.png", "f/1.png"), (5, 6), CAPTIONS, "annotations"),
    with_people("vqav2_val", "vqav2/vqav2_val.jsonl", "vqav2/v2_mscoco_val2014_annotations.json"),
    Files(
        "vqav2_val",
        {
            "vqav2/v2_OpenEnded_mscoco_val2014_questions.json": OFFICIAL,
            "vqav2/v2_mscoco_val2014_annotations.json": ANNOTATIONS,
        },
        ("coco/val2014/COCO_val2014_000000000007.jpg", "coco/val2014/COCO_val2014_000000000008.jpg"),
        (11, 12),
        (tuple(RED), tuple(TWO)),
        "questions",
        "official",
    ),
    of_lines("vqav2_testdev", "vqav2/vqav2_testdev.jsonl", "x"),
    with_people("okvqa_val", "okvqa/okvqa_val.jsonl", "okvqa/mscoco_val2014_annotations.json"),
    with_people("textvqa_val", "textvqa/textvqa_val.jsonl", "textvqa/textvqa_val_annotations.json"),
    Files(
        "textvqa_val",
        {
            "textvqa/TextVQA_0.5.1_val.json": {
                "data": [
                    {"question_id": 11, "image_id": "a", "question": "Q?", "answers": ["red"] * 10},
                    {"question_id": 12, "image_id": "b", "question": "Q?", "answers": ["2"] * 9 + ["3"]},
                ]
            }
        },
        ("textvqa/train_images/a.jpg", "textvqa/train_images/b.jpg"),
        (11, 12),
        WITHOUT_CONFIDENCE,
        "data",
        "official",
    ),
    with_people("vizwiz_val", "vizwiz/vizwiz_val.jsonl", "vizwiz/vizwiz_val_annotations.json"),
    Files(
        "vizwiz_test",
        {"vizwiz/test.json": [{"image": "a.jpg", "question": "Q?"}, {"image": "b.jpg", "question": "Q?"}]},
        ("vizwiz/test/a.jpg", "vizwiz/test/b.jpg"),
        ("a.jpg", "b.jpg"),
        ((), ()),
        "0",
        "official",
    ),
    of_lines("gqa_testdev", "gqa/testdev_balanced.jsonl", "g", "red", "two"),
    Files(
        "gqa_testdev",
        {
            "gqa/testdev_balanced_questions.json": {
                "q1": {"imageId": "n1", "question": "Q?", "answer": "red"},
                "q2": {"imageId": "n2", "question": "Q?", "answer": "two"},
            }
        },
        ("gqa/images/n1.jpg", "gqa/images/n2.jpg"),
        ("q1", "q2"),
        (("red",), ("two",)),
        "q1",
        "official",
    ),
    of_lines("ai2diagram", "ai2diagram/test.jsonl", "d", "red", "two"),
    of_lines("docvqa_val", "docvqa/val.jsonl", "docvqa/val", ["red", "Red"], "two"),
    Files(
        "docvqa_val",
        {
            "docvqa/val/val_v1.0.json": {
                "dataset_name": "docvqa",
                "data": [
                    {"questionId": 11, "question": "Q?", "image": "documents/a.png", "answers": ["red", "Red"]},
                    {"questionId": 12, "question": "Q?", "image": "documents/b.png", "answers": ["two"]},
                ],
            }
        },
        ("docvqa/val/documents/a.png", "docvqa/val/documents/b.png"),
        (11, 12),
        (("red", "Red"), ("two",)),
        "data",
        "official",
    ),
    of_lines("docvqa_test", "docvqa/test.jsonl", "docvqa/test"),
    of_lines("chartqa_test_human", "chartqa/test_human.jsonl", "c", "red", "2"),
    Files(
        "chartqa_test_augmented",
        {
            "chartqa/test/test_augmented.json": [
                {"imgname": "a.png", "query": "Q?", "label": "red"},
                {"imgname": "b.png", "query": "Q?", "label": "2"},
            ]
        },
        ("chartqa/test/png/a.png", "chartqa/test/png/b.png"),
        (0, 1),
        (("red",), ("2",)),
        "0",
        "official",
    ),
    of_lines("ocrvqa_test", "ocrvqa/ocrvqa_test.jsonl", "o", "red", "two"),
    Files(
        "ocrvqa_test",
        {
            "ocrvqa/dataset.json": {
                "b0": {"split": 1, "imageURL": "http://x/0.jpg", "questions": ["Q?"], "answers": ["no"]},
                "b1": {"split": 3, "imageURL": "http://x/1.jpg", "questions": ["Q?", "R?"], "answers": ["red", "two"]},
            }
        },
        ("ocrvqa/images/b1.jpg",),
        ("b1_0", "b1_1"),
        (("red",), ("two",)),
        "b1",
        "official",
    ),
    Files(
        "scienceqa_test_img",
        {"scienceqa/scienceqa_test_img.jsonl": SCIENCE},
        ("s/0.png", "s/1.png"),
        (0, 1),
        ((1,), (4,)),
        "choices",
    ),
    Files(
        "scienceqa_test_img",
        {
            "scienceqa/problems.json": {
                "1": {"split": "train", "image": "image.png", "question": "", "choices": [], "answer": 0},
                "2": {
                    "split": "test",
                    "image": "image.png",
                    "hint": "",
                    "question": "Q",
                    "choices": ["a", "b"],
                    "answer": 1,
                },
                "3": {"split": "test", "image": None, "question": "Q", "choices": ["a", "b"], "answer": 1},
                "4": {
                    "split": "test",
                    "image": "image.png",
                    "hint": "",
                    "question": "Q",
                    "choices": ["a", "b"],
                    "answer": 0,
                },
            }
        },
        ("scienceqa/images/test/2/image.png", "scienceqa/images/test/4/image.png"),
        ("2", "4"),
        ((1,), (0,)),
        "2",
        "official",
    ),
    Files(
        "mmbench_dev_20230712",
        {"mmbench/mmbench_dev_20230712/mmbench_dev_20230712.jsonl": MMBENCH},
        ("s/0.png",),
        (3, 1_000_003),
        ((1,), (1,)),
        "index",
    ),
    Files(
        "mmbench_dev_20230712",
        {"mmbench/mmbench_dev_20230712.tsv": MMBENCH_TSV},
        (),
        (3, 1_000_003),
        ((1,), (0,)),
        "question",
        "tsv",
    ),
    Files(
        "seed_bench",
        {
            "seed_bench/image_input.jsonl": [seed_line("1", 1)],
            "seed_bench/video_input_4.jsonl": [seed_line("v1", 4, "A")],
        },
        SEED_IMAGES,
        ("1", "v1"),
        ((2,), (0,)),
        "prompt",
    ),
    Files(
        "seed_bench",
        {"seed_bench/SEED-Bench.json": SEED_QUESTIONS},
        ("seed_bench/seed_bench_image/x.png", *(f"seed_bench/video_imgs_4/v0_{i}.jpg" for i in range(4))),
        ("q", "v0"),
        ((0,), (3,)),
        "questions",
        "official",
    ),
    Files("refcoco_val", {"refcoco/refcoco_val.jsonl": REFCOCO}, ("coco/0.png", "coco/1.png"), (0, 1), BOXES, "bbox"),
    Files(
        "refcoco+_testA",
        {"refcoco+/refcoco+_testA.jsonl": REFCOCO},
        ("coco/0.png", "coco/1.png"),
        (0, 1),
        BOXES,
        "width",
    ),
    Files(
        "refcocog_test", {"refcocog/refcocog_test.jsonl": REFCOCO}, ("coco/0.png", "coco/1.png"), (0, 1), BOXES, "sent"
    ),
    Files(
        "grit_refexp",
        {
            "GRIT/samples/test/refexp.json": [
                {"example_id": "r1", "image_id": "a.png", "task_query": "left dog"},
                {"example_id": "r2", "image_id": "a.png", "task_query": "cat"},
            ]
        },
        ("GRIT/images/a.png",),
        ("r1", "r2"),
        ((), ()),
        "0",
    ),
    Files(
        "mme",
        {f"mme/Your_Results/{subtask}.txt": MME_TEXT for subtask in SUBTASKS},
        tuple(f"mme/images/{subtask}/0.png" for subtask in SUBTASKS),
        MME_IDS,
        (("yes",), ("no",)) * len(SUBTASKS),
        "",
    ),
    Files(
        "mme",
        {
            f"MME_Benchmark_release/{subtask}/{'questions_answers_YN/' if subtask == 'scene' else ''}0.txt": (
                "Is there a dog?\tYes\nIs there a cat?\tNo\n"
            )
            for subtask in SUBTASKS
        },
        tuple(
            f"MME_Benchmark_release/{subtask}/{'images/' if subtask == 'scene' else ''}0.png" for subtask in SUBTASKS
        ),
        MME_IDS,
        (("yes",), ("no",)) * len(SUBTASKS),
        "",
        "release",
    ),
    Files("touchstone_en", {"touchstone/touchstone_20230831.tsv": TOUCHSTONE}, (), ("0", "1"), ((), ()), "question"),
    Files(
        "scenes",
        {
            "scenes/scenes.jsonl": [{"image": "data/p/0.png", "sort": "count", "question": "How many?", "answer": "2"}]
            * 2
        },
        ("p/0.png",),
        (0, 1),
        (("2",), ("2",)),
        "sort",
    ),
]
