"""A small gRPC client for tests: one stream per request, tokens gathered by branch and stage."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import grpc
import numpy as np
from tritonclient.grpc import InferInput, InferRequestedOutput, InferResult
from tritonclient.grpc import aio as grpcclient

from taper_trtllm.client.wire import decode_response, input_tensors
from taper_trtllm.output import BranchOutput

STREAM_TIMEOUT_S = 120.0

T = TypeVar("T")
Transcript = dict[tuple[str, int], list[int]]


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
        response = decode_response(result)
        output = response.output
        for branch, text in zip(output.branches, response.texts, strict=True):
            key = (branch.branch_path, branch.stage_index)
            assert key not in self.branch_finish_reasons, "tokens after the end of a stage"
            self.tokens.setdefault(key, []).extend(branch.token_ids)
            if branch.finish_reason is not None:
                self.branch_finish_reasons[key] = branch.finish_reason
            if result.get_output("text_output") is not None:
                self.texts[key] = self.texts.get(key, "") + text
        if output.metrics is not None:
            self.finish_reason = output.finish_reason
            self.metrics = asdict(output.metrics)


def tensor(name: str, value: Any, datatype: str = "INT32") -> InferInput:
    """An input tensor that the wire would not make: another name, type or shape."""
    array = np.atleast_1d(np.asarray(value, None if isinstance(value, np.ndarray) else np.int32))
    made = InferInput(name, list(array.shape), datatype)
    made.set_data_from_numpy(array)
    return made


def tensors(**fields: Any) -> list[InferInput]:
    """Input tensors of a request; `stages` may be a Python list."""
    if isinstance(fields.get("stages"), list):
        fields["stages"] = json.dumps(fields["stages"])
    return input_tensors(**fields)


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
