"""Captions: COCO's form of images and annotations, and Karpathy's splits."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from qvl_runtime.errors import DataError
from qvl_runtime.evaluate.readers.folder import DataFolder, Record
from qvl_runtime.evaluate.samples import Sample


def coco_captions(data: DataFolder, name: str, images: str) -> Iterator[Sample]:
    """A JSON object with "images" (id and image, or file_name) and "annotations" (image_id and caption)."""
    content = Record(data.json(name), str(data.path(name)))
    captions: dict[str, list[str]] = defaultdict(list)
    for number, entry in enumerate(content.get("annotations", list)):
        record = Record(entry, f"{content.where} annotation {number}")
        captions[str(record.id("image_id"))].append(record.text("caption"))
    for number, entry in enumerate(content.get("images", list)):
        record = Record(entry, f"{content.where} image {number}")
        image_id = record.id("id")
        if not captions[str(image_id)]:
            raise DataError(f"{record.where} has id {image_id}, which no annotation describes: fetch the file again")
        file = record.text("image" if "image" in record.values else "file_name")
        yield Sample(image_id, (data.image(file, images),), references=tuple(captions[str(image_id)]))


def karpathy(data: DataFolder, name: str, images: str, split: str = "test") -> Iterator[Sample]:
    """dataset_flickr30k.json: images with their split, file name and sentences."""
    for record in data.records(name, "images"):
        if record.text("split") != split:
            continue
        sentences = [Record(entry, record.where).text("raw") for entry in record.get("sentences", list)]
        file = record.text("filename")
        yield Sample(record.id("imgid"), (data.image(file, images),), references=tuple(sentences))
