"""A second run of nano: it starts from a checkpoint, practices what was weak, and resumes after a stop."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from qvl_runtime.config.model import ModelConfig
from qvl_runtime.engine.engine import NANO
from qvl_runtime.errors import ConfigError
from tools.nano.network import random_network
from tools.nano.practice import crowded, practice
from tools.nano.scenes import SceneConfig, Thing, check_fonts, draw_scene
from tools.nano.team import Team
from tools.nano.trainer import Recipe, Trainer, parameters
from tools.nano.warm import take_weights
from tools.train_nano import CONFIG, prepare

pytestmark = pytest.mark.unit
THINGS = [
    Thing("circle", "red", (0.1, 0.1, 0.3, 0.3)),
    Thing("number", "plate", (0.3, 0.7, 0.5, 0.8), "407"),
    Thing("star", "blue", (0.6, 0.5, 0.9, 0.8)),
]


@pytest.fixture
def fonts() -> None:
    try:
        check_fonts()
    except SystemExit as missing:
        pytest.skip(str(missing))


def test_practice_boxes_every_thing_and_asks_no_question_twice() -> None:
    for seed, chinese in ((s, c) for s in range(30) for c in (False, True)):
        said = practice(np.random.default_rng(seed), THINGS, chinese)
        boxed = [t.answer for t in said if t.sort == "box"]
        assert sorted(boxed) == sorted(set(boxed)) and len(boxed) == len(THINGS)
        assert sum(t.sort == "color" for t in said) == 2 and sum(t.sort == "shape" for t in said) == 2
        asked = [t.question for t in said]
        assert len(asked) == len(set(asked))


def test_a_crowded_picture_holds_as_much_as_fits(fonts: None) -> None:
    config = SceneConfig()
    sizes = {least: [len(draw_scene(np.random.default_rng(s), c)[1]) for s in range(40)]
             for least, c in ((1, config), (3, crowded(config)))}  # fmt: skip
    assert max(sizes[3]) == 3 and sum(sizes[3]) > 1.2 * sum(sizes[1])


def test_a_run_starts_from_the_weights_of_a_checkpoint() -> None:
    model = random_network(ModelConfig.from_folder(NANO)).bfloat16()
    take_weights(model, NANO)
    kept = load_file(NANO / "model.safetensors")
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(ConfigError, match="nano_int4 is quantized; a run starts from the bfloat16 checkpoint"):
        take_weights(model, NANO.with_name("nano_int4"))
    narrow = ModelConfig.from_dict({**CONFIG, "num_hidden_layers": 3})
    with pytest.raises(ConfigError, match=r"does not fit the config of tools\.train_nano: transformer\.h\.3"):
        take_weights(random_network(narrow), NANO)


def test_a_second_run_resumes_where_it_stopped(fonts: None, tmp_path: Path) -> None:
    tokenizer, config = prepare(tmp_path, NANO), ModelConfig.from_dict(CONFIG)
    assert (tmp_path / "qwen.tiktoken").read_bytes() == (NANO / "qwen.tiktoken").read_bytes()
    recipe = Recipe(minutes=1e-4, images=2, processes=1, probe=0.0, weak=0.5, chinese=0.5, score_scenes=1)
    kept = load_file(NANO / "model.safetensors")
    threads = torch.get_num_threads()
    try:
        first = Trainer(tmp_path, config, tokenizer, recipe, Team(1, parameters(config)), NANO)
        head = first.average.tensors["lm_head.weight"]
        assert torch.equal(head, kept["lm_head.weight"].float()), "the average starts from the checkpoint too"
        first.run()
        again = Trainer(tmp_path, config, tokenizer, replace(recipe, minutes=1), Team(1, parameters(config)), NANO)
    finally:
        torch.set_num_threads(threads)
    assert again.step == first.step >= 1, "a state on disk goes before --from"
    resumed, stopped = (t.optimizer.slots[0].master for t in (again, first))
    assert torch.equal(resumed, stopped) and not torch.equal(resumed, kept["transformer.wte.weight"].float())
