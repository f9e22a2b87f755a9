"""The wire: values to input tensors, responses to outputs.

The one place on the client's side that knows the tensors' names and types (triton_repo's
config.pbtxt); the server's is `taper_trtllm.tensors`.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from tritonclient.grpc import InferInput, InferResult

from taper_trtllm.output import BranchOutput, RequestMetrics, RequestOutput, StepProgress
from taper_trtllm.request import RequestError

INPUT_TYPES: dict[str, tuple[str, Any]] = {
    "input_ids": ("INT32", np.int32),
    "text_input": ("BYTES", np.object_),
    "max_tokens": ("INT32", np.int32),
    "stages": ("BYTES", np.object_),
    "streaming": ("BOOL", np.bool_),
    "temperature": ("FP32", np.float32),
    "runtime_top_k": ("INT32", np.int32),
    "runtime_top_p": ("FP32", np.float32),
    "seed": ("UINT64", np.uint64),
    "end_id": ("INT32", np.int32),
    "stop_token_ids": ("INT32", np.int32),
    "ignore_eos": ("BOOL", np.bool_),
    "slo_ttft_ms": ("FP32", np.float32),
    "slo_tpot_ms": ("FP32", np.float32),
    "slo_stretch": ("FP32", np.float32),
    "cache_salt_id": ("INT64", np.int64),
    "fork_format": ("BYTES", np.object_),
    "events": ("BOOL", np.bool_),
    "join_mode": ("BYTES", np.object_),
    "cancel_request_id": ("BYTES", np.object_),
    "cancel_branch_paths": ("BYTES", np.object_),
}
OPTION_NAMES = {"runtime_top_k": "top_k", "runtime_top_p": "top_p"}  # what requests call them
_METRIC_FIELDS = {field.name for field in dataclasses.fields(RequestMetrics)}


@dataclass(frozen=True, slots=True)
class Response:
    """One response.

    Attributes:
        output: As the executor gave it; `output.error` is never set (errors have a way of their
            own).
        texts: Text of each entry of `output.branches`; empty ones if the prompt came as ids.
    """

    output: RequestOutput
    texts: tuple[str, ...]


def input_tensors(**values: Any) -> list[InferInput]:
    """Input tensors by name; what is None is left out.

    Args:
        values: A scalar, a list or an array for each name of `INPUT_TYPES`.

    Raises:
        RequestError: A value does not fit its type.
    """
    return [_tensor(name, value) for name, value in values.items() if value is not None]


def _tensor(name: str, value: Any) -> InferInput:
    datatype, numpy_type = INPUT_TYPES[name]
    given = np.atleast_1d(np.asarray(value, np.object_ if datatype == "BYTES" else None))
    try:
        array = given.astype(numpy_type)
        is_same = not np.issubdtype(numpy_type, np.integer) or np.array_equal(array, given)
        tensor = InferInput(name, list(array.shape), datatype)
        tensor.set_data_from_numpy(array)
    except (OverflowError, TypeError, ValueError):  # such as a surrogate without its pair
        is_same = False
    if not is_same:
        name = OPTION_NAMES.get(name, name)
        raise RequestError(name, f"cannot be sent as {datatype} (got {value!r:.80})")
    return tensor


def is_final(result: InferResult) -> bool:
    """No response of this request follows."""
    return result.get_output("finish_reason") is not None


def decode_response(result: InferResult) -> Response:
    """What one response says; the inverse of `taper_trtllm.tensors.encode_output`."""
    paths = _strings(result, "branch_path")
    reasons: list[Any] = _strings(result, "branch_finish_reason")
    stages = result.as_numpy("stage_index").tolist()
    ids = result.as_numpy("output_ids").tolist()
    counts = result.as_numpy("branch_num_tokens")
    ends = np.cumsum(counts)
    events = _strings(result, "branch_event") or [""] * len(paths)
    branches = tuple(
        BranchOutput(path, stage, tuple(ids[end - count : end]), reason or None, event)
        for path, stage, count, end, reason, event in zip(
            paths, stages, counts, ends, reasons, events, strict=True
        )
    )
    texts = tuple(_strings(result, "text_output")) or ("",) * len(branches)
    output = RequestOutput(result.get_response().id, branches, progress=_progress(result))
    if is_final(result):
        finish_reason: Any = _strings(result, "finish_reason")[0]
        metrics = _metrics(_strings(result, "request_metrics")[0])
        output = output._replace(finish_reason=finish_reason, metrics=metrics)
    return Response(output, texts)


def _progress(result: InferResult) -> StepProgress | None:
    fields: dict[str, Any] = {
        name: None if (array := result.as_numpy(name)) is None else array[0].item()
        for name in StepProgress._fields
    }
    return None if fields["step_ms"] is None else StepProgress(**fields)


def _strings(result: InferResult, name: str) -> list[str]:
    """A string tensor; empty if it was not sent."""
    array = result.as_numpy(name)
    return [] if array is None else [value.decode() for value in array]


def _metrics(metrics_json: str) -> RequestMetrics:
    """Those that this client knows of: a newer server may send more."""
    sent = json.loads(metrics_json)
    return RequestMetrics(**{name: sent[name] for name in _METRIC_FIELDS & sent.keys()})
