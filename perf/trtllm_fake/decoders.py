"""What computes the steps of the fake: a real model, or a latency profile.

Both are given what the runtime launched. KV reuse is the runtime's accounting: the model computes
every request from its first token in KV of its own, so that wrong accounting cannot change tokens.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from perf.trtllm_fake.active_request import ActiveRequest
from taper_trtllm.batch import PrefillLoad
from taper_trtllm.engines.simulated import Device, Disturbance
from taper_trtllm.profile import LatencyProfile

if TYPE_CHECKING:
    from perf.trtllm_fake.torch_model import TorchModel


_PLACES_OF_A_CLIENT = 1 << 16  # client ids that differ by less are of one branch
_NUM_TOKENS = 1 << 15


@dataclass(frozen=True, slots=True)
class ContextChunk:
    """Prompt tokens that a step computes.

    Attributes:
        request: Whose.
        start: First of them; those before were computed or found.
        num_tokens: How many.
        is_last: They end the prompt, so that a token is drawn.
    """

    request: ActiveRequest
    start: int
    num_tokens: int
    is_last: bool


@dataclass(frozen=True, slots=True)
class Step:
    """A launched step.

    Attributes:
        iter: Its number.
        context: Chunks of prompts.
        generation: Requests that compute their last token and draw the next.
        launched_s: When.
    """

    iter: int
    context: tuple[ContextChunk, ...]
    generation: tuple[ActiveRequest, ...]
    launched_s: float

    @property
    def is_empty(self) -> bool:
        """Nothing could be scheduled."""
        return not self.context and not self.generation

    @property
    def drawing(self) -> list[ActiveRequest]:
        """Requests that draw a token; those that end their prompt come first."""
        ending = [chunk.request for chunk in self.context if chunk.is_last]
        return [*ending, *self.generation]

    @property
    def num_context_tokens(self) -> int:
        """Prompt tokens that are computed."""
        return sum(chunk.num_tokens for chunk in self.context)

    def record(self) -> StepRecord:
        """What is remembered of it."""
        return StepRecord(
            self.iter,
            tuple((chunk.request.request_id, chunk.num_tokens) for chunk in self.context),
            tuple([request.request_id for request in self.generation]),
            tuple([request.request_id for request in self.drawing]),
            self.launched_s,
        )


@dataclass(frozen=True, slots=True)
class StepRecord:
    """Who was in a step, by request id.

    Attributes:
        iter: Its number.
        context: Requests that computed prompt tokens, and how many.
        generation: Requests that computed their last token.
        drawing: Those that drew a token.
        launched_s: When it was launched.
    """

    iter: int
    context: tuple[tuple[int, int], ...]
    generation: tuple[int, ...]
    drawing: tuple[int, ...]
    launched_s: float

    @property
    def request_ids(self) -> set[int]:
        """Everyone."""
        return {*self.generation, *(request_id for request_id, _ in self.context)}


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a step drew.

    Attributes:
        tokens: One for each of `Step.drawing`, in order.
        duration_s: Time that the step takes.
    """

    tokens: Sequence[int]
    duration_s: float


class Decoder(Protocol):
    """Computes steps."""

    def step(self, step: Step) -> StepOutput:
        """Computes one step; an exception ends all active requests."""

    def release(self, request: ActiveRequest) -> None:
        """The request will not run again; it may never have."""


class ProfileDecoder:
    """Draws a constant token; steps take as long as a latency profile says.

    The decode batch is the generating requests with their whole contexts, prefill is the chunks
    really computed, as in `engines/simulated.py`.

    Args:
        profile: Step times.
        max_batch_size: Widest step.
        disturbance: How the device differs from the profile; `host_overhead_ms` is the host's time
            per step.
        seed: Of the noise.
        token: The token; None for one of each client id's own, so that only those who share a text
            share its KV.
    """

    def __init__(
        self,
        profile: LatencyProfile,
        max_batch_size: int,
        disturbance: Disturbance | None = None,
        seed: int = 0,
        token: int | None = 0,
    ) -> None:
        self._device = Device(profile, disturbance or Disturbance(), max_batch_size, seed)
        self._token = token

    def step(self, step: Step) -> StepOutput:
        """See `Decoder`."""
        load = PrefillLoad()
        for chunk in step.context:
            load = load.with_chunk(chunk.num_tokens, chunk.start)
        contexts = [request.num_tokens for request in step.generation]
        duration_s = self._device.step_ms(contexts, load) / 1e3
        return StepOutput([self._draw(request) for request in step.drawing], duration_s)

    def release(self, request: ActiveRequest) -> None:
        """See `Decoder`."""

    def _draw(self, request: ActiveRequest) -> int:
        token = self._token
        if token is None:
            token = (request.asked.client_id or 0) // _PLACES_OF_A_CLIENT % _NUM_TOKENS
        return token + (request.asked.end_id == token == request.banned_id)


class TorchDecoder:
    """Decodes with the embedded Qwen3.

    Args:
        model: The model.
        step_ms: Time that a step is said to take; None for what it took.
    """

    def __init__(self, model: TorchModel, step_ms: float | None = None) -> None:
        self._model = model
        self._step_s = None if step_ms is None else step_ms / 1e3

    def step(self, step: Step) -> StepOutput:
        """See `Decoder`."""
        started_s = time.perf_counter()
        drawn = self._model.compute(
            [(chunk.request, chunk.start + chunk.num_tokens) for chunk in step.context],
            step.generation,
        )
        taken_s = time.perf_counter() - started_s
        tokens = [drawn[request.request_id] for request in step.drawing]
        return StepOutput(tokens, taken_s if self._step_s is None else self._step_s)

    def release(self, request: ActiveRequest) -> None:
        """See `Decoder`."""
        self._model.release(request.request_id)


class FailingDecoder:
    """Fails once.

    Args:
        decoder: Computes all other steps.
        iteration: The step that fails, or the first one after it.
    """

    def __init__(self, decoder: Decoder, iteration: int) -> None:
        self._decoder = decoder
        self._iteration: int | None = iteration

    def step(self, step: Step) -> StepOutput:
        """See `Decoder`."""
        if self._iteration is not None and step.iter >= self._iteration:
            self._iteration = None
            raise RuntimeError("an illegal memory access was encountered")
        return self._decoder.step(step)

    def release(self, request: ActiveRequest) -> None:
        """See `Decoder`."""
        self._decoder.release(request)
