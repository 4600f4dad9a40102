"""The keys of `generation_config.json` that this runtime does not implement, and their values without effect.

A key that would change an answer is refused with any other value; one that would not is read over. The names are those
of transformers' `GenerationConfig`, of versions 4 and 5.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qvl_runtime.errors import ConfigError, quoted

# Other values change answers. null, [], {}, "" and false have no effect in any of them.
_NEUTRAL: dict[str, tuple[float, ...]] = {
    "num_beams": (1,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "penalty_alpha": (0,),
    "guidance_scale": (1,),
    "dola_layers": (),
    "begin_suppress_tokens": (),
    "forced_bos_token_id": (),
    "forced_decoder_ids": (),
    "force_words_ids": (),
    "constraints": (),
    "exponential_decay_length_penalty": (),
    "sequence_bias": (),
    "token_healing": (),
    "watermarking_config": (),
}
_NEUTRAL_SAMPLING: dict[str, tuple[float, ...]] = {  # without effect on greedy answers
    "min_p": (0,),
    "top_h": (1,),
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
}
_NO_EFFECT = (  # on one answer: names and sizes, speed, what is returned, and settings of beam search
    "_commit_hash _from_model_config assistant_confidence_threshold assistant_early_exit assistant_ensemble_weight "
    "assistant_lookbehind bos_token_id cache_config cache_implementation compile_config continuous_batching_config "
    "decoder_start_token_id disable_compile diversity_penalty early_stopping forced_eos_token_id generation_kwargs "
    "is_assistant length_penalty low_memory max_cache_len max_matching_ngram_size num_assistant_tokens "
    "num_assistant_tokens_schedule num_beam_groups output_attentions output_hidden_states output_logits output_scores "
    "prefill_chunk_size prompt_lookup_num_tokens remove_invalid_values renormalize_logits return_dict_in_generate "
    "return_legacy_cache speculation_type target_lookbehind transformers_version trust_remote_code use_cache use_mtp"
)
_UNUSED: dict[str, tuple[tuple[float, ...], str]] = {  # key: values without effect, what counts here
    "max_length": ((20,), "max_new_tokens"),
    "num_return_sequences": ((1,), "n of the sampling parameters"),
}


def refuse_unsupported(raw: Mapping[str, Any], sampling: bool) -> None:
    """Raise `ConfigError` for a key that would change answers and is not implemented. sampling: the file's default."""
    for key, neutral in (_NEUTRAL | _NEUTRAL_SAMPLING if sampling else _NEUTRAL).items():
        value = raw.get(key)
        if value and value not in neutral:
            raise ConfigError(
                f"generation_config.json has {key} {quoted(value)}, which is not supported and would change the "
                "answers: remove the key from the file to get them without it"
            )


def unused_keys(raw: Mapping[str, Any], known: frozenset[str]) -> list[str]:
    """What to tell about keys that are not used: "max_length 4096 (max_new_tokens counts)"; `known`: those that are."""
    told, silent = [], {*known, *_NO_EFFECT.split(), *_NEUTRAL, *_NEUTRAL_SAMPLING}
    for key, value in raw.items():
        neutral, counts = _UNUSED.get(key, ((), ""))
        if not value or value in neutral or key in silent:
            continue
        told.append(f"{quoted(key)} {quoted(value)}" + (f" ({counts} counts)" if counts else " (unknown)"))
    return told
