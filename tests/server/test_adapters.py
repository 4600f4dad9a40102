"""Each LoRA adapter of an engine is a model of the server."""

from __future__ import annotations

import pytest

from qvl_runtime import Engine, SamplingParams
from qvl_runtime.cli.serve import ServeOptions
from qvl_runtime.errors import ConfigError
from qvl_runtime.server.config import ServerConfig
from tests.engine.test_adapters import ADAPTERS
from tests.server.conftest import serving

pytestmark = pytest.mark.cpu


def test_a_request_names_an_adapter_as_its_model() -> None:
    engine = Engine(adapters=ADAPTERS, max_model_len=256, allow_files=False)
    messages = [{"role": "user", "content": "Who are you?"}]
    wanted = {
        name: engine.generate([messages], SamplingParams(temperature=0, max_tokens=6, adapter=adapter))[0].text
        for name, adapter in (("nano", None), ("first", "first"), ("second", "second"))
    }
    assert len(set(wanted.values())) > 1
    with serving(lambda: engine, model_names=("nano",), adapters=engine.adapter_names) as live:
        client = live.openai()
        assert [model.id for model in client.models.list()] == ["nano", "first", "second"]
        for name, text in wanted.items():
            answer = client.chat.completions.create(model=name, messages=messages, temperature=0, max_tokens=6)
            assert (answer.model, answer.choices[0].message.content) == (name, text)
        chunks = list(client.chat.completions.create(model="second", messages=messages, max_tokens=6, stream=True))
        assert {chunk.model for chunk in chunks} == {"second"}
        assert client.completions.create(model="first", prompt="a", max_tokens=2).model == "first"
        refused = live.post("/v1/chat/completions", {"model": "third", "messages": messages})
        assert refused.status == 404 and "nano, first, second" in refused.json()["error"]["message"]


def test_names_of_adapters_are_checked() -> None:
    with pytest.raises(ConfigError, match="'nano' is the name of the model and of an adapter"):
        ServerConfig(adapters=("nano",))
    for texts in (["mine"], ["=folder"], ["a=b", "a=c"]):
        with pytest.raises(ConfigError, match="expected NAME=DIR"):
            ServeOptions(adapter=texts).adapters()
    assert list(ServeOptions(adapter=["a=b", "c=d=e"]).adapters()) == ["a", "c"]
