"""A small gRPC client for tests: one stream per request, tokens gathered by branch and stage."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import grpc
import numpy as np
from tritonclient.grpc import InferInput, InferRequestedOutput, InferResult
from tritonclient.grpc import aio as grpcclient

from taper_trtllm.output import BranchOutput

STREAM_TIMEOUT_S = 120.0

T = TypeVar("T")
Transcript = dict[tuple[str, int], list[int]]

_DTYPES: dict[str, tuple[str, Any]] = {
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
}


@dataclass
class Answer:
    """Everything that came back on one stream."""

    tokens: Transcript = field(default_factory=dict)
    texts: dict[tuple[str, int], str] = field(default_factory=dict)
    branch_finish_reasons: dict[tuple[str, int], str] = field(default_factory=dict)
    finish_reason: str | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    num_responses: int = 0

    def add(self, result: InferResult) -> None:
        """Takes in one response."""
        self.num_responses += 1
        paths = [path.decode() for path in result.as_numpy("branch_path")]
        keys = list(zip(paths, result.as_numpy("stage_index").tolist(), strict=True))
        ids = iter(result.as_numpy("output_ids").tolist())
        for key, count in zip(keys, result.as_numpy("branch_num_tokens"), strict=True):
            self.tokens.setdefault(key, []).extend(next(ids) for _ in range(count))
        assert next(ids, None) is None
        for key, reason in zip(keys, result.as_numpy("branch_finish_reason"), strict=True):
            assert key not in self.branch_finish_reasons, "tokens after the end of a stage"
            if reason:
                self.branch_finish_reasons[key] = reason.decode()
        texts = result.as_numpy("text_output")
        for key, text in zip(keys, texts, strict=True) if texts is not None else ():
            self.texts[key] = self.texts.get(key, "") + text.decode()
        if result.get_output("finish_reason") is not None:
            self.finish_reason = result.as_numpy("finish_reason")[0].decode()
            self.metrics = json.loads(result.as_numpy("request_metrics")[0])


def tensor(name: str, value: Any, datatype: str | None = None) -> InferInput:
    """An input tensor; `datatype` sends it as another type than the model expects."""
    default, numpy_type = _DTYPES.get(name, ("INT32", np.int32))
    if isinstance(value, np.ndarray):
        array = value
    else:
        array = np.array(value if isinstance(value, list) else [value], numpy_type)
    made = InferInput(name, list(array.shape), datatype or default)
    made.set_data_from_numpy(array)
    return made


def tensors(**fields: Any) -> list[InferInput]:
    """Input tensors of a request; `stages` may be a Python list."""
    if isinstance(fields.get("stages"), list):
        fields["stages"] = json.dumps(fields["stages"])
    return [tensor(name, value) for name, value in fields.items()]


async def infer(
    client: grpcclient.InferenceServerClient,
    inputs: list[InferInput],
    *,
    request_id: str = "",
    outputs: list[InferRequestedOutput] | None = None,
    cancel_after: int | None = None,
) -> Answer:
    """Runs one request; disconnects after `cancel_after` responses if it has not ended."""
    answer = Answer()

    async def requests() -> AsyncIterator[dict[str, Any]]:
        yield {
            "model_name": "taper",
            "inputs": inputs,
            "request_id": request_id,
            "outputs": outputs,
        }

    stream = client.stream_infer(requests(), stream_timeout=STREAM_TIMEOUT_S)
    try:
        async for result, error in stream:
            if error is not None:
                answer.error = error.message()
                continue
            answer.add(result)
            # Never right after the last response: that can leak inside tritonserver 2.51.
            if answer.num_responses == cancel_after and answer.finish_reason is None:
                stream.cancel()
                break
    except grpc.aio.AioRpcError as error:
        answer.error = f"{error.code().name}: {error.details()}"
    return answer


async def generate(
    client: grpcclient.InferenceServerClient,
    *,
    request_id: str = "",
    cancel_after: int | None = None,
    **fields: Any,
) -> Answer:
    """`infer` with the tensors given as Python values."""
    return await infer(client, tensors(**fields), request_id=request_id, cancel_after=cancel_after)


def with_client(url: str, run: Callable[[grpcclient.InferenceServerClient], Awaitable[T]]) -> T:
    """Runs a coroutine function on a connected client and closes the client."""

    async def main() -> T:
        async with grpcclient.InferenceServerClient(url) as client:
            return await run(client)

    return asyncio.run(main())


def transcript(branches: list[BranchOutput]) -> Transcript:
    """The tokens of an in-process run in the form of `Answer.tokens`."""
    tokens: Transcript = {}
    for branch in branches:
        tokens.setdefault((branch.branch_path, branch.stage_index), []).extend(branch.token_ids)
    return tokens
