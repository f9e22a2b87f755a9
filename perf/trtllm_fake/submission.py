"""Reads what the executor's request objects ask for; refuses what the fake does not do."""

from __future__ import annotations

from typing import Any

from perf.trtllm_fake.active_request import Sampling, Submission
from perf.trtllm_fake.block_tree import DEFAULT_RETENTION, Retention, TokenRange

_NOT_MADE = (
    "position_ids",
    "bad_words",
    "embedding_bias",
    "external_draft_tokens_config",
    "prompt_tuning_config",
    "multimodal_input",
    "multimodal_embedding",
    "mrope_config",
    "lookahead_config",
    "logits_post_processor_name",
    "logits_post_processor",
    "encoder_input_token_ids",
    "context_phase_params",
    "encoder_input_features",
    "cross_attention_mask",
    "eagle_config",
    "skip_cross_attn_blocks",
    "guided_decoding_params",
)
_NOT_MADE_SAMPLING = (
    "top_p_min",
    "top_p_reset_ids",
    "top_p_decay",
    "beam_search_diversity_rate",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "length_penalty",
    "early_stopping",
    "no_repeat_ngram_size",
    "min_p",
    "beam_width_array",
)


def read_request(request: Any, priority: float) -> Submission:
    """Reads a `Request`.

    Args:
        request: The bindings' object.
        priority: The constructor argument: the class has no property for it.

    Raises:
        NotImplementedError: It asks for what the fake does not do.
    """
    for name in _NOT_MADE:
        if getattr(request, name) is not None:
            raise NotImplementedError(f"the fake executor does not do Request.{name}")
    output, lora = request.output_config, request.lora_config
    allotted = request.allotted_time_ms
    return Submission(
        token_ids=request.input_token_ids,
        max_new_tokens=request.max_tokens,
        streaming=request.streaming,
        exclude_input=output.exclude_input_from_output,
        return_all_generated=request.return_all_generated_tokens,
        return_perf_metrics=output.return_perf_metrics,
        client_id=request.client_id,
        priority=priority,
        end_id=request.end_id,
        stop_words=tuple(tuple(word) for word in request.stop_words or ()),
        sampling=_sampling(request.sampling_config),
        retention=_retention(request.kv_cache_retention_config),
        lora_id=None if lora is None else lora.task_id,
        cache_salt_id=request.cache_salt_id,
        allotted_s=None if allotted is None else allotted.total_seconds(),
    )


def _sampling(config: Any) -> Sampling:
    """Fills in what a `SamplingConfig` leaves out, as the sampling layers do.

    Without top_k and top_p, or with top_k 1, the best token is taken; top_k without top_p means
    top_p 1, and the temperature is 1 (layers/topKSamplingLayer.cu, defaultDecodingParams.h).
    """
    for name in _NOT_MADE_SAMPLING:
        if getattr(config, name) is not None:
            raise NotImplementedError(f"the fake executor does not do SamplingConfig.{name}")
    if config.beam_width != 1 or (config.num_return_sequences or 1) != 1:
        raise NotImplementedError("the fake executor has one beam and one sequence per request")
    top_k, top_p, temperature = config.top_k or 0, config.top_p or 0.0, config.temperature
    return Sampling(
        greedy=top_k == 1 or (top_k == 0 and top_p == 0.0) or temperature == 0.0,
        temperature=1.0 if temperature is None else temperature,
        top_k=top_k,
        top_p=top_p or 1.0,
        seed=config.seed or 0,
        min_tokens=config.min_tokens or 0,
    )


def _retention(config: Any) -> Retention:
    if config is None:
        return DEFAULT_RETENTION
    parts = sorted(config.token_range_retention_configs, key=lambda part: part.token_start)
    return Retention(
        tuple(
            TokenRange(p.token_start, p.token_end, p.priority, _seconds(p.duration_ms))
            for p in parts
        ),
        config.decode_retention_priority,
        _seconds(config.decode_duration_ms),
    )


def _seconds(duration: Any) -> float | None:
    return None if duration is None else duration.total_seconds()
