"""A whole fine-tuning run: read the data, open the model, train, evaluate, and write the result."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from qvl_runtime.config.generation import GenerationDefaults
from qvl_runtime.config.model import ModelConfig
from qvl_runtime.finetune.curve import draw_curve, tensorboard_sink
from qvl_runtime.finetune.data import Dataset, read_dataset
from qvl_runtime.finetune.evaluation import Evaluation
from qvl_runtime.finetune.features import FeatureStore
from qvl_runtime.finetune.learner import Learner
from qvl_runtime.finetune.opening import open_network, training_dtype
from qvl_runtime.finetune.optimizer import Optimizer
from qvl_runtime.finetune.options import FinetuneOptions
from qvl_runtime.finetune.parallel import Team
from qvl_runtime.finetune.result import result_tensors, write_result
from qvl_runtime.finetune.run_folder import RunFolder
from qvl_runtime.finetune.sharded import shard
from qvl_runtime.finetune.trainer import Trainer, schedule_of
from qvl_runtime.prompt.tokenizer import Tokenizer

SAVED_OF_BASE = ("wte", "lm_head")  # what the original's LoRA trains whole on a base checkpoint


@dataclass(frozen=True, slots=True, eq=False)
class Finetuning:
    """One run, checked and ready: everything that can be refused has been."""

    source: Path
    destination: Path
    options: FinetuneOptions
    config: ModelConfig
    tokenizer: Tokenizer
    data: Dataset
    held_out: Dataset | None
    device: torch.device

    @classmethod
    def open(
        cls,
        source: Path,
        data: Path,
        destination: Path,
        options: FinetuneOptions,
        held_out: Path | None = None,
        skip_bad: bool = False,
        device: torch.device | str = "cpu",
        keep: Path | None = None,
    ) -> Finetuning:
        """Read and check model and data.

        held_out: conversations to evaluate on; keep: conversations whose answers are to stay as they are. Raises
        `ConfigError`, `CheckpointError` or `FaultyDataError`.
        """
        source = Path(source)
        config = ModelConfig.from_folder(source)
        options.check_model(config)
        tokenizer = Tokenizer.from_folder(source, config.visual.n_queries, config.visual.image_start_id)
        limit = min(options.max_length, config.seq_length)

        def read(path: Path) -> Dataset:
            return read_dataset(path, tokenizer, limit, options.labels, skip_bad)

        own = replace(options, lora=replace(options.lora, base_model_name_or_path=source.resolve().name))
        return cls(
            source,
            Path(destination),
            own,
            config,
            tokenizer,
            read(data) if keep is None else read(data).joined(read(keep)),
            None if held_out is None else read(held_out),
            torch.device(device),
        )

    @property
    def num_steps(self) -> int:
        """Steps of the whole run."""
        return len(schedule_of(self.data, self.options).steps())

    def key(self) -> dict[str, Any]:
        """What decides the result: only a run with the same key resumes another's work."""
        files = sorted([*self.source.glob("*.safetensors"), *self.source.glob("*.bin")])
        weights = [[path.name, path.stat().st_size] for path in files]
        config = hashlib.sha256((self.source / "config.json").read_bytes()).hexdigest()
        rows = {"rows": "first fit"} if self.options.pack else {}
        return self.options.key() | rows | {"data": self.data.digest(), "weights": weights, "config": config}

    def run(
        self,
        team: Team | None = None,
        progress: Callable[[int, int], None] = lambda done, total: None,
        on_start: Callable[[Trainer], None] = lambda trainer: None,
        on_kept: Callable[[], None] = lambda: None,
    ) -> list[dict[str, Any]]:
        """Train, or continue, and publish the result; returns the log.

        progress: called with the steps that are done and their total. on_start: called before the first step.
        on_kept: called after each conversation to keep whose predictions are made, before that.
        """
        team = team or Team()
        with RunFolder(self.destination, self.key(), self.options.keep, team.leads) as folder:
            team.wait()
            network = open_network(self.source, self.config, self.options, self.device)
            if self.options.shards:
                shard(network, self.options, training_dtype(self.options, self.config))
            learner = Learner(network, FeatureStore(network, self.options.feature_bytes))
            optimizer = Optimizer(network.named_parameters(), self.options)
            evaluation = None
            if self.held_out is not None:
                evaluation = Evaluation(learner, self.tokenizer, self.held_out, self.source, self.options)
            trainer = Trainer(learner, optimizer, self.data, self.options, folder, team, evaluation)
            learner.remember(self.data.samples, on_kept)  # before a state is loaded: what the base predicts
            trainer.resume()
            if team.leads and (sink := tensorboard_sink(folder.home, trainer.step)) is not None:
                trainer.add_sink(sink)
            on_start(trainer)
            trainer.run(lambda done: progress(done, len(trainer.steps)))
            entries = folder.entries()
            tensors = result_tensors(network, self.options, team.leads)
            if team.leads:
                write_result(network, tensors, self.options, self.source, folder.partial.model)
                draw_curve(entries, folder.partial.model / "curve.png")
                folder.publish()
            team.wait()
        return entries


def with_defaults_of(
    options: FinetuneOptions, source: Path, choose_modules: bool = True, choose_masters: bool = True
) -> FinetuneOptions:
    """The options with the original's choice of modules to save: wte and lm_head for LoRA on a base checkpoint.

    These two are 1.2 billion weights, so they are trained without float32 masters, unless the caller chooses.
    """
    if choose_modules and options.method == "lora" and GenerationDefaults.from_folder(source).chat_format == "raw":
        options = replace(options, lora=replace(options.lora, modules_to_save=SAVED_OF_BASE))
    if choose_masters and options.uses_lora and options.lora.modules_to_save:
        options = replace(options, masters="bfloat16")
    return options
