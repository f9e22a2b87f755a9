"""What the embedded engine's decode step is compared with (`engine_step`)."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from transformers import ContinuousBatchingConfig, GenerationConfig, Qwen3ForCausalLM
from transformers import Qwen3Config as HfConfig

from taper_trtllm.config import RandomModelConfig
from taper_trtllm.engines.checkpoint import random_checkpoint, random_weights
from taper_trtllm.engines.qwen3 import Qwen3Config

_PAGE_SIZE = 16
_MAX_BATCH_TOKENS = 1024


class StandaloneKernels:
    """Nothing but a step's matrix products and attention, its KV already gathered.

    Every layer has weights, keys and values of its own, so caches are as cold as in a real step.
    Norms, rotary embedding, KV writes, gathering and sampling are left out.

    Args:
        config: Shape of the model.
        width: Sequences.
        context: Tokens of each sequence.
    """

    def __init__(self, config: Qwen3Config, width: int, context: int) -> None:
        hidden, heads, head_dim = config.hidden_size, config.num_attention_heads, config.head_dim
        kv_heads = config.num_key_value_heads
        shapes = (
            ((heads + 2 * kv_heads) * head_dim, hidden),
            (hidden, heads * head_dim),
            (2 * config.intermediate_size, hidden),
            (hidden, config.intermediate_size),
        )
        layers = range(config.num_hidden_layers)
        self._weights = [[torch.randn(shape) for shape in shapes] for _ in layers]
        self._head = torch.randn(config.vocab_size, hidden)
        self._inputs = {size: torch.randn(width, size) for _, size in shapes}
        kv_shape = (width, kv_heads, context, head_dim)
        self._kv = [(torch.randn(kv_shape), torch.randn(kv_shape)) for _ in layers]
        # Query heads that share a KV head as rows of one query, as in the engine.
        self._queries = torch.randn(width, kv_heads, heads // kv_heads, head_dim)

    @torch.inference_mode()
    def run(self) -> None:
        """One step."""
        for weights, (keys, values) in zip(self._weights, self._kv, strict=True):
            for weight in weights:
                F.linear(self._inputs[weight.shape[1]], weight)
            F.scaled_dot_product_attention(self._queries, keys, values)
        F.linear(self._inputs[self._head.shape[1]], self._head)


@dataclass
class ContinuousBatching:
    """transformers' continuous batching, decoding one batch in its own thread.

    It is driven through its public interface: requests stream and carry the library's timestamps.
    The time of a step is the interval between two consecutive tokens of the same request while all
    requests decode and nobody has paused the loop.
    """

    manager: Any
    width: int
    _first_id: str = ""
    _num_tokens: dict[str, int] = field(default_factory=dict)
    _timestamps_s: list[float] = field(default_factory=list)

    def start(self, prompts: list[list[int]], max_new_tokens: int) -> None:
        """Prefills the prompts and returns when all of them decode.

        Prefilling beside decoding sequences would take minutes, since every step attends densely
        over the whole batch. So each prompt runs for two tokens first, which leaves its KV in the
        library's prefix cache, and is then submitted again.
        """
        for prompt in prompts:
            self.manager.add_request(prompt, max_new_tokens=2)
        for _ in prompts:
            self._next_output()
        for prompt in prompts:
            request_id = self.manager.add_request(
                prompt, max_new_tokens=max_new_tokens, streaming=True, record_timestamps=True
            )
            self._num_tokens[request_id] = 0
        self._first_id = next(iter(self._num_tokens))
        self.advance(2)

    def advance(self, num_steps: int) -> None:
        """Waits until every request has got so many more tokens."""
        goal = min(self._num_tokens.values()) + num_steps
        while min(self._num_tokens.values()) < goal:
            output = self._next_output()
            self._num_tokens[output.request_id] = len(output.generated_tokens)
            if output.request_id == self._first_id:
                self._timestamps_s.append(output.timestamps[-1])

    def step_times_ms(self, start_s: float, end_s: float) -> list[float]:
        """Intervals that lie within a window of `time.perf_counter`."""
        inside = [t for t in self._timestamps_s if start_s <= t <= end_s]
        return [(later - earlier) * 1e3 for earlier, later in pairwise(inside)]

    def cancel(self) -> None:
        """Ends all requests."""
        for request_id in self._num_tokens:
            self.manager.cancel_request(request_id)

    def _next_output(self) -> Any:
        output = self.manager.get_result(timeout=300)
        if output is None or output.error is not None:
            raise RuntimeError(f"continuous batching failed: {output and output.error}")
        return output


@contextmanager
def continuous_batching(
    model: RandomModelConfig, width: int, context: int, max_new_tokens: int
) -> Iterator[ContinuousBatching]:
    """Runs transformers' continuous batching on the engine's model, one thread, SDPA.

    Its defaults would size the cache to most of the machine's memory, so sizes are given: twice the
    blocks that the batch needs, because finished requests of the prefix cache keep theirs.
    """
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)
    shape = random_checkpoint(model).config
    oracle = Qwen3ForCausalLM(HfConfig(**shape.to_hf(), attn_implementation="sdpa")).eval()
    oracle.load_state_dict(random_weights(shape, model.seed))
    blocks = 2 * width * (-(-(context + max_new_tokens) // _PAGE_SIZE) + 1)
    with oracle.continuous_batching_context_manager(
        generation_config=GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0),
        continuous_batching_config=ContinuousBatchingConfig(
            num_blocks=blocks,
            page_size=_PAGE_SIZE,
            max_batch_tokens=max(_MAX_BATCH_TOKENS, width),
            max_requests_per_batch=width,
        ),
        warmup=False,
    ) as manager:
        rival = ContinuousBatching(manager, width)
        try:
            yield rival
        finally:
            rival.cancel()
