"""The model `taper`: Triton's tensors to requests of `taper_trtllm` and back; no logic."""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from taper_trtllm.config import load_config
from taper_trtllm.executor_process import ExecutorProcess
from taper_trtllm.metrics import FAMILIES, MetricChange
from taper_trtllm.output import RequestOutput
from taper_trtllm.request import RequestError
from taper_trtllm.request_gate import ExecutorClosedError, QueueFullError
from taper_trtllm.response_stream import ResponseStreamer
from taper_trtllm.tensors import (
    INPUT_NAMES,
    DecodedRequest,
    TextDecoder,
    decode_branch_cancel,
    decode_request,
    encode_output,
)
from taper_trtllm.tokenizer import Tokenizer, load_tokenizer

_FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class TritonPythonModel:
    """Called by Triton: `initialize` once, `execute` per request, `finalize` once."""

    def initialize(self, args: dict[str, str]) -> None:
        """Builds the executor; an exception here makes the server refuse to start."""
        _check_tensors()
        default = Path(args["model_repository"]) / "config.yaml"
        self._config = load_config(os.environ.get("TAPER_CONFIG", default))
        self._tokenizer = load_tokenizer(self._config.engine)
        self._executor = ExecutorProcess(self._config)
        exporter = _MetricExporter(
            model=args["model_name"],
            version=args["model_version"],
            policy=self._executor.policy_name,
        )
        self._streamer = ResponseStreamer(self._executor, exporter.apply, pb_utils.Logger.log_error)

    def execute(self, requests: list[Any]) -> None:
        """Queues requests; each is answered on its own stream, whatever happens to the others."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._submit(request, sender)
            except Exception as error:
                _send_error(sender, *_describe(error))
                self._streamer.count_refusal(request.request_id())

    def finalize(self) -> None:
        """Called when Triton has waited for requests to end; answers those that have not."""
        self._executor.stop()
        self._streamer.close()

    def _submit(self, request: Any, sender: Any) -> None:
        tensors = {
            name: tensor.as_numpy()
            for name in INPUT_NAMES
            if (tensor := pb_utils.get_input_tensor_by_name(request, name)) is not None
        }
        cancel = decode_branch_cancel(tensors)
        if cancel is not None:
            self._streamer.cancel_branches(cancel.request_id, cancel.branch_paths)
            sender.send(pb_utils.InferenceResponse([]), flags=_FINAL)
            return
        request_id = request.request_id() or str(uuid.uuid4())
        decoded = decode_request(tensors, request_id, self._tokenizer, self._config)
        sink = _ResponseSink(sender, decoded, self._tokenizer)
        self._streamer.submit(decoded.request, sink, streaming=decoded.streaming)


class _ResponseSink:
    """The way back of one request: a Triton response sender."""

    def __init__(self, sender: Any, decoded: DecodedRequest, tokenizer: Tokenizer | None) -> None:
        self._sender = sender
        self._has_events = decoded.request.events
        self._decoder: TextDecoder | None = None
        if decoded.is_text and tokenizer is not None:
            shows_tags = decoded.request.fork_format is not None
            self._decoder = TextDecoder(tokenizer, skip_special_tokens=not shows_tags)

    def send(self, output: RequestOutput) -> None:
        if output.error is not None:
            _send_error(self._sender, output.error, pb_utils.TritonError.INTERNAL)
            return
        texts = self._decoder.decode(output.branches) if self._decoder is not None else None
        arrays = encode_output(output, texts, has_events=self._has_events)
        tensors = [pb_utils.Tensor(name, array) for name, array in arrays.items()]
        response = pb_utils.InferenceResponse(tensors)
        self._sender.send(response, flags=_FINAL if output.finished else 0)

    def is_cancelled(self) -> bool:
        return bool(self._sender.is_cancelled())


class _MetricExporter:
    """Triton's metric objects; `apply` is for one thread only (two can crash the server)."""

    def __init__(self, **labels: str) -> None:
        self._families = []  # kept: a family that is collected disappears from /metrics
        self._apply: dict[tuple[str, str | None], Any] = {}
        kinds = pb_utils.MetricFamily
        for family in FAMILIES:
            triton_family = pb_utils.MetricFamily(
                name=family.name,
                description=family.description,
                kind=getattr(kinds, family.kind.upper()),
            )
            self._families.append(triton_family)
            buckets = {"buckets": list(family.buckets)} if family.buckets else {}
            name, values = family.label or ("", (None,))
            for value in values:
                extra = {} if value is None else {name: value}
                metric = triton_family.Metric(labels={**labels, **extra}, **buckets)
                method = {"counter": "increment", "gauge": "set", "histogram": "observe"}
                self._apply[family.name, value] = getattr(metric, method[family.kind])

    def apply(self, change: MetricChange) -> None:
        self._apply[change.name, change.label](change.value)


def _check_tensors() -> None:
    """Refuses a numpy under which tensors arrive corrupted.

    A tensor taken over from another one is wrapped for numpy the way an input is; `as_numpy` of
    the first one would return the very array that it was made of.

    Raises:
        RuntimeError: A tensor does not survive the round trip.
    """
    sent = np.array([5, 6, 7, 8], np.int32)
    tensor = pb_utils.Tensor("sent", sent)
    received = pb_utils.Tensor.from_dlpack("received", tensor).as_numpy()
    if not np.array_equal(sent, received):
        raise RuntimeError(
            f"Triton's Python stub corrupts tensors under numpy {np.__version__} "
            f"(sent {sent.tolist()}, received {received.tolist()}); install numpy<2"
        )


def _describe(error: Exception) -> tuple[str, int]:
    """Message and code of what kept a request out."""
    if isinstance(error, ExecutorClosedError | QueueFullError):
        return str(error), pb_utils.TritonError.UNAVAILABLE
    if isinstance(error, RequestError):
        return str(error), pb_utils.TritonError.INVALID_ARG
    return f"{type(error).__name__}: {error}", pb_utils.TritonError.INTERNAL


def _send_error(sender: Any, message: str, code: int) -> None:
    error = pb_utils.TritonError(message, code)
    sender.send(pb_utils.InferenceResponse(error=error), flags=_FINAL)
