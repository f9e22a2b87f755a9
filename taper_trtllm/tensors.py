"""The server's tensors: arrays to requests, outputs to arrays (names: triton_repo config.pbtxt)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from taper_trtllm.config import ServingConfig
from taper_trtllm.output import BranchOutput, RequestMetrics, RequestOutput, StepProgress
from taper_trtllm.request import (
    MAX_FAN_OUT,
    MAX_STOP_TOKEN_IDS,
    ForkJoinRequest,
    RequestError,
    build_request,
    check_limit,
    parse_stages,
)
from taper_trtllm.tokenizer import IncrementalDecoder, Tokenizer, encode_text, resolve_texts

Array = npt.NDArray[Any]

# Parsing a string tensor holds the interpreter, and with it the step loop.
MAX_STRING_BYTES = 1 << 20

_SAMPLING_FIELDS = {
    "temperature": "temperature",
    "runtime_top_k": "top_k",
    "runtime_top_p": "top_p",
    "seed": "seed",
    "end_id": "end_id",
    "ignore_eos": "ignore_eos",
}
_SLO_FIELDS = {"slo_ttft_ms": "ttft_ms", "slo_tpot_ms": "tpot_ms", "slo_stretch": "stretch"}
# Errors name what the client sent: the tensor, not the field that it became.
_TENSOR_OF_FIELD = {
    **{f"sampling.{field}": tensor for tensor, field in _SAMPLING_FIELDS.items()},
    **{f"slo.{field}": tensor for tensor, field in _SLO_FIELDS.items()},
}

INPUT_NAMES = (
    "input_ids",
    "text_input",
    "max_tokens",
    "stages",
    "streaming",
    "stop_token_ids",
    "cache_salt_id",
    "fork_format",
    "events",
    "join_mode",
    "cancel_request_id",
    "cancel_branch_paths",
    *_SAMPLING_FIELDS,
    *_SLO_FIELDS,
)


@dataclass(frozen=True, slots=True)
class DecodedRequest:
    """A request as it came in.

    Attributes:
        request: What to run.
        streaming: Answer as tokens come; otherwise once, at the end.
        is_text: It came as `text_input`; answers carry `text_output`, with the tags of a fork
            format in it.
    """

    request: ForkJoinRequest
    streaming: bool
    is_text: bool


@dataclass(frozen=True, slots=True)
class BranchCancel:
    """A control request: branches of another request that nobody wants any more."""

    request_id: str
    branch_paths: tuple[str, ...]


def decode_branch_cancel(tensors: Mapping[str, Array]) -> BranchCancel | None:
    """The control request that the tensors are; None if they are a request.

    Raises:
        RequestError: Names the tensor that is missing or does not belong to it.
    """
    if "cancel_request_id" not in tensors and "cancel_branch_paths" not in tensors:
        return None
    for name in ("cancel_request_id", "cancel_branch_paths"):
        if name not in tensors:
            raise RequestError(name, "required to cancel branches")
    others = tensors.keys() - {"cancel_request_id", "cancel_branch_paths"}
    if others:
        raise RequestError(min(others), "does not belong to a cancel of branches")
    paths = tensors["cancel_branch_paths"].reshape(-1)
    check_limit("cancel_branch_paths", paths.size, MAX_FAN_OUT, "branches")
    return BranchCancel(
        _scalar(tensors, "cancel_request_id"),
        tuple(_text("cancel_branch_paths", path) for path in paths),
    )


def decode_request(
    tensors: Mapping[str, Array],
    request_id: str,
    tokenizer: Tokenizer | None,
    config: ServingConfig,
) -> DecodedRequest:
    """Builds a request from its input tensors; the executor checks it against its limits.

    Args:
        tensors: The tensors that the client sent, by name.
        request_id: Id of the request.
        tokenizer: The model's, if it has one.
        config: Prompt limit and default objective.

    Raises:
        RequestError: Names the tensor, or the field inside `stages`, that is at fault.
    """
    fields: dict[str, Any] = {
        "request_id": request_id,
        "input_ids": _prompt_ids(tensors, tokenizer, config.limits.max_prompt_tokens),
        "sampling": _sampling(tensors, tokenizer),
        "slo": _slo(tensors, config),
        "max_tokens": _scalar(tensors, "max_tokens"),
        "cache_salt_id": _scalar(tensors, "cache_salt_id"),
        "fork_format": _scalar(tensors, "fork_format"),
    }
    for name in ("events", "join_mode"):
        if name in tensors:
            fields[name] = _scalar(tensors, name)
    stages = _scalar(tensors, "stages")
    if stages is not None:
        fields["stages"] = parse_stages(stages)
    try:
        request = build_request(**fields)
    except RequestError as error:
        tensor = _TENSOR_OF_FIELD.get(error.field, error.field.removeprefix("sampling."))
        raise RequestError(tensor, error.reason) from None
    streaming = _scalar(tensors, "streaming")
    return DecodedRequest(
        request=resolve_texts(request, tokenizer),
        streaming=True if streaming is None else streaming,
        is_text="text_input" in tensors,
    )


def encode_output(
    output: RequestOutput, texts: Sequence[str] | None, *, has_events: bool
) -> dict[str, Array]:
    """Output tensors of one response.

    Args:
        output: New tokens by branch; what ends the request if it is the last one.
        texts: New text of each entry of `output.branches`; None without text.
        has_events: The request asked for events.
    """
    branches = output.branches
    tensors = {
        "output_ids": _int32([token for branch in branches for token in branch.token_ids]),
        "branch_path": _strings([branch.branch_path for branch in branches]),
        "stage_index": _int32([branch.stage_index for branch in branches]),
        "branch_num_tokens": _int32([len(branch.token_ids) for branch in branches]),
        "branch_finish_reason": _strings([branch.finish_reason or "" for branch in branches]),
    }
    if texts is not None:
        tensors["text_output"] = _strings(texts)
    if output.progress is not None:
        tensors.update(_progress_tensors(output.progress))
    if has_events:
        tensors["branch_event"] = _strings([branch.event for branch in branches])
    if output.finish_reason is not None:
        tensors["finish_reason"] = _strings([output.finish_reason])
    if output.metrics is not None:
        tensors.update(_metric_tensors(output.metrics))
    return tensors


class TextDecoder:
    """Text of one request's branches as they stream."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._decoders: dict[tuple[str, int], IncrementalDecoder] = {}

    def decode(self, branches: Sequence[BranchOutput]) -> list[str]:
        """The text that the new tokens of each branch complete."""
        return [self._decode_one(branch) for branch in branches]

    def _decode_one(self, branch: BranchOutput) -> str:
        if branch.event:
            return self._new().push(branch.token_ids, last=True)
        key = (branch.branch_path, branch.stage_index)
        decoder = self._decoders.get(key)
        if decoder is None:
            decoder = self._decoders[key] = self._new()
        return decoder.push(branch.token_ids, last=branch.finish_reason is not None)

    def _new(self) -> IncrementalDecoder:
        return IncrementalDecoder(self._tokenizer, skip_special_tokens=self._skip_special_tokens)


def _prompt_ids(
    tensors: Mapping[str, Array], tokenizer: Tokenizer | None, max_prompt_tokens: int
) -> list[int]:
    if ("input_ids" in tensors) == ("text_input" in tensors):
        raise RequestError("input_ids", "give exactly one of input_ids and text_input")
    if "text_input" in tensors:
        text = _scalar(tensors, "text_input")
        if not text:
            raise RequestError("text_input", "must not be empty")
        ids = encode_text(tokenizer, "text_input", text, is_prompt=True)
        check_limit("text_input", len(ids), max_prompt_tokens, "prompt tokens")
        return ids
    return _ids(tensors, "input_ids", "prompt tokens", max_prompt_tokens)


def _ids(tensors: Mapping[str, Array], name: str, what: str, limit: int) -> list[int]:
    """A tensor as a list, if it is short enough to become Python objects."""
    check_limit(name, tensors[name].size, limit, what)
    ids: list[int] = tensors[name].tolist()
    return ids


def _sampling(tensors: Mapping[str, Array], tokenizer: Tokenizer | None) -> dict[str, Any]:
    sampling: dict[str, Any] = {"end_id": tokenizer.end_id if tokenizer is not None else None}
    sampling |= {
        field: value
        for tensor, field in _SAMPLING_FIELDS.items()
        if (value := _scalar(tensors, tensor)) is not None
    }
    if "stop_token_ids" in tensors:
        sampling["stop_token_ids"] = _ids(
            tensors, "stop_token_ids", "stop token ids", MAX_STOP_TOKEN_IDS
        )
    return sampling


def _slo(tensors: Mapping[str, Array], config: ServingConfig) -> dict[str, Any] | None:
    """The given objectives, completed by the configured ones; None if none is given."""
    slo = {
        field: value
        for tensor, field in _SLO_FIELDS.items()
        if (value := _scalar(tensors, tensor)) is not None
    }
    return {**config.slo.model_dump(), **slo} if slo else None


def _scalar(tensors: Mapping[str, Array], name: str) -> Any:
    """The value of a one-element tensor; None if it was not sent."""
    if name not in tensors:
        return None
    value = tensors[name].reshape(-1)[0]
    if isinstance(value, np.floating):
        return float(str(value))  # 0.7 as FP32 is the client's 0.7, not 0.699999988
    if isinstance(value, np.generic):
        return value.item()
    return _text(name, value)


def _text(name: str, value: bytes) -> str:
    check_limit(name, len(value), MAX_STRING_BYTES, "bytes")
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise RequestError(name, f"not valid UTF-8 ({error.reason})") from None


def _progress_tensors(progress: StepProgress) -> dict[str, Array]:
    tensors = {
        "step_ms": np.array([progress.step_ms], np.float32),
        "width": _int32([progress.width]),
        "batch_width": _int32([progress.batch_width]),
    }
    if progress.slack_ms is not None:
        tensors["slack_ms"] = np.array([progress.slack_ms], np.float32)
    return tensors


def _metric_tensors(metrics: RequestMetrics) -> dict[str, Array]:
    times_ns = {
        "arrival_time_ns": metrics.arrival_time_ns,
        "first_scheduled_time_ns": metrics.first_scheduled_time_ns,
        "first_token_time_ns": metrics.first_token_time_ns,
        "last_token_time_ns": metrics.last_token_time_ns,
    }
    return {
        **{name: np.array([ns], np.int64) for name, ns in times_ns.items() if ns is not None},
        "kv_cache_reused_block": _int32([metrics.num_reused_blocks]),
        "num_input_tokens": _int32([metrics.num_prompt_tokens]),
        "num_output_tokens": _int32([metrics.num_output_tokens]),
        "request_metrics": _strings([json.dumps(asdict(metrics))]),
    }


def _int32(values: Sequence[int]) -> Array:
    return np.array(values, np.int32)


def _strings(values: Sequence[str]) -> Array:
    return np.array([value.encode() for value in values], object)
