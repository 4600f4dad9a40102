"""The embedding table in the host's memory while the model is on a device: here torch's meta device, or the CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qvl_runtime import Engine, SamplingParams
from qvl_runtime.config.model import ModelConfig
from qvl_runtime.engine.engine import NANO
from qvl_runtime.errors import ConfigError
from qvl_runtime.model.qwen_vl import QwenVL
from qvl_runtime.schedule.decode_graphs import HostEmbedding
from qvl_runtime.weights.loader import load_weights

pytestmark = pytest.mark.cpu
META = torch.device("meta")


def test_it_alone_stays_on_the_host() -> None:
    config = ModelConfig.from_folder(NANO)
    state, *_ = load_weights(NANO, config, torch.float16, META, embedding_on_host=True)
    assert {name for name, tensor in state.items() if tensor.device != META} == {"transformer.wte.weight"}
    table = state["transformer.wte.weight"]
    model = QwenVL(config, state, embedding_on_host=True)
    assert model.device == META and model.bytes_by_part["embedding"] == 0 < model.bytes_by_part["head"]
    assert model.kernels["embedding"] == "rows sent from the host"
    rows = model.embed_tokens(torch.tensor([3, 1, 3]))
    assert rows.device == META and rows.shape == (3, config.hidden_size) and rows.dtype == table.dtype


def test_rows_arrive_where_a_graph_reads_them() -> None:
    table = torch.randn(9, 4).half()
    rows = HostEmbedding(table, 3, torch.device("cpu"))
    where = rows.rows(2)
    for ids in ([8, 0], [1, 1]):
        rows.send(torch.tensor(ids))
        assert torch.equal(where, table[ids]) and where.data_ptr() == rows.rows(2).data_ptr()


@pytest.mark.parametrize("kernels", ["", "reference"])
def test_the_same_tokens(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefill, decoding together by recorded steps of several sizes, and an image among the rows."""
    monkeypatch.setenv("QVL_KERNELS", kernels)
    image = torch.arange(3 * 32 * 32, dtype=torch.uint8).view(32, 32, 3).numpy()
    prompts = [[{"text": "What is it?"}], [{"image": image}, {"text": "Name the color."}], [{"text": "Hello"}]]
    params = [SamplingParams(temperature=0, max_tokens=count, ignore_eos=True) for count in (4, 9, 14)]
    found = []
    for on_host in (False, True):
        engine = Engine(NANO, device="cpu", max_model_len=512, embedding_on_host=on_host)
        found.append([answer.token_ids for answer in engine.generate(prompts, params)])
        graphs = engine.core.runner.graphs
        assert kernels or (graphs is not None and graphs.replays > 5 and graphs.report()["refused"] == {})
    assert found[0] == found[1]


def test_a_head_that_is_the_table_is_refused() -> None:
    config = replace(ModelConfig.from_folder(NANO), tie_word_embeddings=True)
    state, *_ = load_weights(NANO, config, torch.float16, META, embedding_on_host=True)
    with pytest.raises(
        ConfigError, match=r"this model's head is its embedding table .*leave it out, or convert .* --head int8"
    ):
        QwenVL(config, state, embedding_on_host=True)
