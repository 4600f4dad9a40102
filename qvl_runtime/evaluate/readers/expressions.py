"""Referring expressions: RefCOCO, RefCOCO+ and RefCOCOg as the original converted them, and GRIT's own file."""

from __future__ import annotations

from collections.abc import Iterator

from qvl_runtime.evaluate.readers.folder import DataFolder
from qvl_runtime.evaluate.samples import Sample


def refcoco(data: DataFolder, name: str) -> Iterator[Sample]:
    """Lines of image, sent, bbox (x1, y1, x2, y2 in pixels), width and height."""
    for number, record in enumerate(data.lines(name)):
        size = {side: record.get(side, int, float) for side in ("width", "height")}
        yield Sample(
            number,
            (data.image(record.text("image")),),
            record.text("sent"),
            references=(record.numbers("bbox", 4),),
            facts=size,
        )


def grit(data: DataFolder, name: str) -> Iterator[Sample]:
    """samples of GRIT's refexp: example_id, image_id and task_query; the boxes are kept secret."""
    for record in data.records(name):
        image = data.image(record.text("image_id"), "GRIT/images")
        yield Sample(record.id("example_id"), (image,), record.text("task_query"))
