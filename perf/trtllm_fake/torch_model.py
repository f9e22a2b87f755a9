"""The embedded Qwen3 as the compute of the fake, one engine sequence per request."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from perf.trtllm_fake.active_request import ActiveRequest
from taper_trtllm.config import TorchEngineConfig
from taper_trtllm.engines.base import PrefillChunk, SequenceId, SequenceParams, StepPlan
from taper_trtllm.engines.sampling import draw_tokens
from taper_trtllm.engines.step_batch import Segment
from taper_trtllm.engines.torch_engine import TorchEngine
from taper_trtllm.request import SamplingParams

_POSITION_STEP = 0x9E3779B97F4A7C15  # of `sampling._mix`
_UINT64 = (1 << 64) - 1


class TorchModel(TorchEngine):
    """`TorchEngine` that must not draw a request's end token while it is banned.

    Args:
        config: Which model; its KV pool must hold every request on its own.

    Raises:
        ConfigError: The checkpoint cannot be served, or a limit does not fit it.
    """

    def __init__(self, config: TorchEngineConfig) -> None:
        super().__init__(config)
        self._requests: dict[SequenceId, ActiveRequest] = {}

    def compute(
        self, contexts: Sequence[tuple[ActiveRequest, int]], generation: Sequence[ActiveRequest]
    ) -> dict[SequenceId, int]:
        """Runs one step.

        Args:
            contexts: Requests with the prompt position up to which to compute.
            generation: Requests that draw their next token.

        Returns:
            The drawn tokens, by request id.
        """
        chunks = []
        for request, end in contexts:
            if request.request_id not in self._requests:
                self._add(request)
            start = self.num_computed_tokens(request.request_id)
            chunks.append(PrefillChunk(request.request_id, end - start, end == request.prompt_len))
        decode = tuple(request.request_id for request in generation)
        plan = StepPlan(decode=decode, max_new_tokens=(1,) * len(decode), prefill=tuple(chunks))
        return {i: tokens[0] for i, tokens in self.step(plan).tokens.items()}

    def release(self, request_id: SequenceId) -> None:
        """Forgets a request."""
        if self._requests.pop(request_id, None) is not None:
            self.release_sequence(request_id)

    def _add(self, request: ActiveRequest) -> None:
        prompt = request.text.tokens[: request.prompt_len].tolist()
        self.add_sequence(request.request_id, request.request_id, prompt, _params(request))
        self._requests[request.request_id] = request

    @torch.inference_mode()
    def _run(self, segments: Sequence[Segment]) -> dict[SequenceId, int]:
        batch = self._attention.begin_step(segments)
        hidden = self._model.forward(batch.token_ids, batch.positions, self._attention)
        if not batch.sampled_ids:
            return {}
        logits = self._model.logits(hidden[batch.sampled_rows])
        for row, request_id in enumerate(batch.sampled_ids):
            banned = self._requests[request_id].banned_id
            if banned is not None and banned >= 0:
                logits[row, banned] = -torch.inf
        sampled = [self._sequences[i] for i in batch.sampled_ids]
        positions = [len(s.tokens) for s in sampled]
        tokens = draw_tokens(logits, [s.params for s in sampled], positions)
        return dict(zip(batch.sampled_ids, tokens, strict=True))


def _params(request: ActiveRequest) -> SequenceParams:
    """Draws depend on the position in the request, not in the text: the seed is moved back."""
    asked = request.asked.sampling
    sampling = SamplingParams.model_construct(  # the executor has no limits of its own
        temperature=0.0 if asked.greedy else asked.temperature,
        top_k=asked.top_k,
        top_p=asked.top_p,
    )
    return SequenceParams(sampling, (asked.seed - request.prompt_len * _POSITION_STEP) & _UINT64)
