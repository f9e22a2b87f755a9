"""Sends a workload to a Triton server, open loop, and records what comes back when.

One gRPC stream per request, all on one channel. Requests are built before the clock starts and
responses are decoded after it stops, so that the client stays out of what it measures.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import grpc
from tritonclient.grpc import InferInput, InferResult
from tritonclient.grpc import aio as grpcclient
from tritonclient.utils import InferenceServerException

from perf.latency import RequestRecord, TokenEvent
from perf.program import critical_tokens
from perf.workload import WorkloadRequest
from taper_trtllm.client.wire import decode_response, input_tensors, is_final
from taper_trtllm.output import RequestOutput

_Responses = list[tuple[float, InferResult]]


class ServerUnavailableError(RuntimeError):
    """The server cannot be benchmarked, with the reason and what to do."""


@dataclass(frozen=True, slots=True)
class ClientConfig:
    """How requests are sent.

    Attributes:
        url: ``host:port`` of the gRPC endpoint.
        model: Model name.
        max_concurrency: Requests in flight at most; None for no limit (open loop).
        stream_timeout_s: After which a request counts as failed.
        slo_ttft_ms: TTFT objective sent with each request; None leaves it to the server.
        slo_tpot_ms: So for TPOT; both or none.
        slo_stretch: So for the stretch; optional.
        cancellation_rate: Share of requests that are withdrawn while they decode.
        seed: Of which requests are withdrawn, and when.
    """

    url: str = "localhost:8001"
    model: str = "taper"
    max_concurrency: int | None = None
    stream_timeout_s: float = 300.0
    slo_ttft_ms: float | None = None
    slo_tpot_ms: float | None = None
    slo_stretch: float | None = None
    cancellation_rate: float = 0.0
    seed: int = 0


async def check_server(client: grpcclient.InferenceServerClient, config: ClientConfig) -> None:
    """Checks that the model is there and speaks our tensors.

    Raises:
        ServerUnavailableError: It does not.
    """
    try:
        await client.is_server_ready()
    except InferenceServerException as error:
        raise ServerUnavailableError(
            f"no Triton server at {config.url} ({error.message()}); start one with scripts/serve.sh"
        ) from None
    try:
        answer = await client.get_model_config(config.model)
    except InferenceServerException as error:
        raise ServerUnavailableError(
            f"{config.url} does not serve model {config.model!r} ({error.message()})"
        ) from None
    model = answer.config
    if not model.model_transaction_policy.decoupled:
        raise ServerUnavailableError(
            f"model {config.model!r} is not decoupled, so it cannot stream; set "
            "`model_transaction_policy { decoupled: true }` in its config.pbtxt"
        )
    missing = {"input_ids", "stages", "ignore_eos"} - {tensor.name for tensor in model.input}
    if missing:
        raise ServerUnavailableError(
            f"model {config.model!r} lacks the inputs {', '.join(sorted(missing))}"
        )


async def send_workload(
    client: grpcclient.InferenceServerClient,
    config: ClientConfig,
    workload: Sequence[WorkloadRequest],
    on_done: Callable[[], None] = lambda: None,
) -> list[RequestRecord]:
    """Sends every request at its place in the schedule and waits for all of them.

    Args:
        client: Connected client; `check_server` has passed.
        config: How to send.
        workload: Requests in order of arrival.
        on_done: Called once per finished request.

    Returns:
        One record per request, in order; `scheduled_s` counts from the start of the run.
    """
    rng = random.Random(config.seed)
    senders = [
        _Sender(item, _inputs(item, config), config, _cancel_after(item, config, rng))
        for item in workload
    ]
    limit = asyncio.Semaphore(config.max_concurrency or len(senders) or 1)
    start_s = time.monotonic()
    tasks = []
    for sender in senders:
        delay_s = start_s + sender.item.arrival_s - time.monotonic()
        if delay_s > 0:
            await asyncio.sleep(delay_s)
        task = asyncio.create_task(sender.run(client, limit))
        task.add_done_callback(lambda _: on_done())
        tasks.append(task)
    await asyncio.gather(*tasks)
    return [sender.record(start_s) for sender in senders]


def _cancel_after(item: WorkloadRequest, config: ClientConfig, rng: random.Random) -> int | None:
    """Responses after which to withdraw the request; None to let it finish."""
    if rng.random() >= config.cancellation_rate:
        return None
    return rng.randint(1, critical_tokens(item.request.program))


def _inputs(item: WorkloadRequest, config: ClientConfig) -> list[InferInput]:
    return input_tensors(
        input_ids=item.request.input_ids,
        stages=item.stages_json,
        streaming=True,
        ignore_eos=item.request.sampling.ignore_eos,
        slo_ttft_ms=config.slo_ttft_ms,
        slo_tpot_ms=config.slo_tpot_ms,
        slo_stretch=config.slo_stretch,
    )


class _Sender:
    """One request: sends it, keeps its raw responses, decodes them when asked."""

    def __init__(
        self,
        item: WorkloadRequest,
        inputs: list[InferInput],
        config: ClientConfig,
        cancel_after: int | None,
    ) -> None:
        self.item = item
        self._inputs = inputs
        self._config = config
        self._cancel_after = cancel_after
        self._responses: _Responses = []
        self._error: str | None = None
        self._was_cancelled = False
        self._sent_s = self._end_s = 0.0

    async def run(self, client: grpcclient.InferenceServerClient, limit: asyncio.Semaphore) -> None:
        async with limit:
            self._sent_s = time.monotonic()
            try:
                await self._stream(client)
            except grpc.aio.AioRpcError as error:
                self._error = f"{error.code().name}: {error.details()}"
            self._end_s = time.monotonic()

    async def _stream(self, client: grpcclient.InferenceServerClient) -> None:
        stream = client.stream_infer(self._requests(), stream_timeout=self._config.stream_timeout_s)
        async for result, error in stream:
            now_s = time.monotonic()
            if error is not None:
                self._error = error.message()
                continue
            self._responses.append((now_s, result))
            if len(self._responses) == self._cancel_after and not is_final(result):
                self._was_cancelled = True
                stream.cancel()
                return

    async def _requests(self) -> AsyncIterator[dict[str, Any]]:
        yield {
            "model_name": self._config.model,
            "inputs": self._inputs,
            "request_id": self.item.request.request_id,
        }

    def record(self, start_s: float) -> RequestRecord:
        """Decodes the responses; times count from the start of the run."""
        request = self.item.request
        outputs = [(at - start_s, decode_response(result).output) for at, result in self._responses]
        last = outputs[-1][1] if outputs else None
        metrics = None if last is None else last.metrics
        return RequestRecord(
            request_id=request.request_id,
            family=self.item.family,
            is_branching=any(stage.type == "parallel" for stage in request.program),
            num_prompt_tokens=len(request.input_ids),
            critical_tokens=critical_tokens(request.program),
            scheduled_s=self.item.arrival_s,
            sent_s=self._sent_s - start_s,
            end_s=self._end_s - start_s,
            events=tuple(event for at_s, output in outputs for event in _events(at_s, output)),
            finish_reason=None if last is None else last.finish_reason,
            error=self._error,
            was_cancelled=self._was_cancelled,
            server_metrics={} if metrics is None else asdict(metrics),
        )


def _events(time_s: float, output: RequestOutput) -> list[TokenEvent]:
    """The tokens of one response, by branch; a final response may carry none."""
    return [
        TokenEvent(time_s, branch.branch_path, branch.stage_index, len(branch.token_ids))
        for branch in output.branches
        if branch.token_ids
    ]
