"""POST /v1/locate: the boxes of what a phrase names in an image, likeliest first, or scores of given boxes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from qvl_runtime.errors import DownloadError, ImageError, PromptError
from qvl_runtime.server.answers import Json, box_json, pictures_json
from qvl_runtime.server.errors import invalid
from qvl_runtime.server.fields import LOCATE, REQUIRED
from qvl_runtime.server.requests import Exchange, check_model, checked
from qvl_runtime.server.service import Service


async def locate(service: Service, body: Any, exchange: Exchange) -> Json:
    """Answer as `Engine.locate` does, or with `boxes` as `Engine.score_boxes`; between the steps of other requests."""
    request = checked(body, LOCATE, REQUIRED["locate"])
    check_model(request, service.config)
    if request.get("model") in service.config.adapters:
        raise invalid("boxes are located by the base model, without an adapter", "model", "unsupported_field")
    image, phrase, question = request["image_url"]["url"], request["phrase"], request.get("question")
    answer: Json = {"object": "locate", "model": service.config.model_names[0], "phrase": phrase}
    if (given := request.get("boxes")) is not None:
        if "k" in request:
            raise invalid("boxes are scored as they are: leave k out", "k", "invalid_value")
        from qvl_runtime.engine.locating import spelled_boxes

        corners = [tuple(int(number) for number in box) for box in given]
        with _named("boxes", "invalid_value", PromptError):
            spelled_boxes(service.engine.engine.tokenizer, corners)
        with _named("image_url", "invalid_image", ImageError, DownloadError):
            scored = await service.engine.score_boxes(image, phrase, corners, question)
        return {**answer, "boxes": [box_json(box, ()) for box in scored], "presence": None, "pictures": []}
    with _named("image_url", "invalid_image", ImageError, DownloadError):
        found = await service.engine.locate(image, phrase, int(request.get("k", 1)), question)
    boxes = [
        {**box_json(box, (found.image,)), "mass": mass} for box, mass in zip(found.boxes, found.masses, strict=True)
    ]
    return {**answer, "boxes": boxes, "presence": found.presence, "pictures": pictures_json((found.image,))}


@contextmanager
def _named(field: str, code: str, *kinds: type[Exception]) -> Iterator[None]:
    """Say of some errors that they are of this field, and not of the phrase."""
    try:
        yield
    except kinds as error:
        raise invalid(str(error), field, code) from None
