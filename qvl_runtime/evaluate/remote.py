"""Ask a server the questions of a run: `qvl serve`, or another that has OpenAI's API.

Prompts in the original's style need `/v1/completions` of `qvl serve`, which reads `<img>data:...</img>` in a prompt;
chat turns need only `/v1/chat/completions`. Images are sent as data URLs, since a server reads no files.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from pathlib import Path
from typing import Any

from qvl_runtime.errors import ConfigError, DownloadError, ImageError, QVLError
from qvl_runtime.evaluate.asking import Numbered, Reply, interleaved
from qvl_runtime.evaluate.http_client import Client
from qvl_runtime.evaluate.prompts import Question
from qvl_runtime.evaluate.readers.choices import data_url
from qvl_runtime.prompt.tokenizer import SPECIAL_TOKENS

AT_ONCE = 32  # requests that are open
_SPECIAL = re.compile("|".join(map(re.escape, SPECIAL_TOKENS)))
_IMAGE = re.compile("<img>(.*?)</img>", re.DOTALL)
_END = "<|endoftext|>"


class ServerAsker:
    """A server, to which many requests are open at a time."""

    def __init__(self, client: Client, model: str | None = None, at_once: int = AT_ONCE) -> None:
        """model: by default the first that the server has. Raises `DownloadError` where it cannot be reached."""
        self._client, self._at_once = client, at_once
        self.model = model or self._first_model()
        name = self.model.rsplit("/", 1)[-1].lower()
        self.chat_format = "raw" if name == "qwen-vl" else "chatml"
        self._end_ids: list[int] | None = None

    def identity(self) -> Mapping[str, Any]:
        """The server's address and model; what checkpoint that is, the server does not tell."""
        return {"url": self._client.url, "model": self.model}

    def answers(self, questions: Iterable[Numbered]) -> Iterator[tuple[int, Reply | QVLError]]:
        """Answer all, in the order that answers come in."""
        waiting, open_requests = interleaved(questions), dict[Future[Reply], int]()
        with ThreadPoolExecutor(self._at_once, thread_name_prefix="qvl-ask") as pool:
            try:
                while True:
                    for number, question in islice(waiting, self._at_once - len(open_requests)):
                        open_requests[pool.submit(self._answer, question)] = number
                    if not open_requests:
                        return
                    for future in wait(open_requests, return_when=FIRST_COMPLETED).done:
                        number = open_requests.pop(future)
                        error = future.exception()
                        if error is not None and not isinstance(error, QVLError):
                            raise error
                        yield number, future.result() if error is None else error
            finally:
                for future in open_requests:
                    future.cancel()

    def _answer(self, question: Question) -> Reply:
        if isinstance(question.prompt, str):
            prompt = _IMAGE.sub(lambda match: f"<img>{_data_url(match[1])}</img>", question.prompt)
            return self._chosen(prompt, question) if question.choices else self._continued(prompt, question)
        if question.choices:
            raise ConfigError("a choice by likelihood through a server needs style='original': chat turns have no echo")
        body = {"messages": [_message(message) for message in question.prompt], "max_tokens": question.max_tokens}
        answer = self._post("/chat/completions", body)
        return Reply(str(answer["message"]["content"] or ""), answer["tokens"])

    def _continued(self, prompt: str, question: Question) -> Reply:
        body: dict[str, Any] = {"prompt": prompt, "max_tokens": question.max_tokens, "min_tokens": question.min_tokens}
        if question.raw:
            body |= {"ignore_eos": True, "stop": [_END], "stop_token_ids": self._end_of_text()}
        answer = self._post("/completions", body)
        text = str(answer["text"])
        return Reply(_SPECIAL.sub("", text) if question.raw else text, answer["tokens"])

    def _chosen(self, prompt: str, question: Question) -> Reply:
        """Each option after the prompt, whose tokens the server scores."""
        body = {
            "prompt": [prompt + choice for choice in question.choices],
            "max_tokens": 0,
            "echo": True,
            "logprobs": 0,
        }
        found = self._client.post("/completions", {"model": self.model, "temperature": 0, **body})
        try:
            scored = [choice["logprobs"] for choice in found["choices"]]
            means = tuple(_mean_of_end(s, choice) for s, choice in zip(scored, question.choices, strict=True))
        except (KeyError, TypeError, ValueError) as error:
            raise DownloadError(f"{self._client.url} gave no log probabilities of the prompt ({error})") from None
        best = max(range(len(means)), key=means.__getitem__)
        return Reply(question.choices[best].strip(), 0, means)

    def _post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The first choice of an answer, with the number of its tokens."""
        found = self._client.post(path, {"model": self.model, "temperature": 0, **body})
        try:
            return {**found["choices"][0], "tokens": int((found.get("usage") or {}).get("completion_tokens", 0))}
        except (KeyError, IndexError, TypeError) as error:
            raise DownloadError(f"{self._client.url} gave an answer without choices ({error})") from None

    def _first_model(self) -> str:
        models = self._client.get("/models").get("data")
        if not isinstance(models, list) or not models or not isinstance(models[0], dict):
            raise DownloadError(f"{self._client.url} has no models: name one")
        return str(models[0].get("id"))

    def _end_of_text(self) -> list[int]:
        """The id of `<|endoftext|>`, where the server tells; otherwise its text alone ends an answer."""
        if self._end_ids is None:
            root = Client(self._client.url.rstrip("/").removesuffix("/v1"), self._client.key)
            try:
                ids = root.post("/tokenize", {"prompt": _END}, retries=0).get("tokens")
            except DownloadError:
                ids = None
            self._end_ids = ids if isinstance(ids, list) and len(ids) == 1 else []
        return self._end_ids


def _mean_of_end(logprobs: Mapping[str, Any], text: str) -> float:
    """Mean log probability of the last tokens, whose texts together are `text`."""
    tokens, values, at = logprobs["tokens"], logprobs["token_logprobs"], 0
    while "".join(tokens[len(tokens) - at :]) != text:
        at += 1
        if at > len(tokens) or len("".join(tokens[len(tokens) - at :])) > len(text):
            raise ValueError(f"the option {text!r} is not tokens of its own")
    return float(sum(values[len(values) - at :])) / at


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A chat message in OpenAI's form."""
    parts = [
        {"type": "image_url", "image_url": {"url": _data_url(part["image"])}}
        if "image" in part
        else {"type": "text", "text": part["text"]}
        for part in message["content"]
    ]
    return {"role": message["role"], "content": parts}


def _data_url(image: str) -> str:
    if image.startswith("data:"):
        return image
    try:
        return data_url(base64.b64encode(Path(image).read_bytes()).decode())
    except OSError as error:
        raise ImageError(f"{image} cannot be read: {error.strerror}") from None
