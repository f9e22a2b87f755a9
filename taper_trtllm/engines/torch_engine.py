"""The embedded engine: Qwen3 on torch with paged KV and exact per-step membership."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch

from taper_trtllm.config import ConfigError, EngineConfig
from taper_trtllm.engines.base import (
    EngineCapabilities,
    EngineError,
    SequenceId,
    SequenceParams,
    StepPlan,
    StepResult,
)
from taper_trtllm.engines.checkpoint import open_checkpoint, random_checkpoint
from taper_trtllm.engines.fingerprint import fingerprint
from taper_trtllm.engines.kv_cache import BlockPool
from taper_trtllm.engines.paged_attention import PagedAttention
from taper_trtllm.engines.qwen3 import Qwen3Model
from taper_trtllm.engines.sampling import draw_tokens
from taper_trtllm.engines.sequence_work import EngineSequence, SequenceWork
from taper_trtllm.engines.step_batch import Segment


class TorchEngine:
    """Implements `engines.base.Engine` on torch.

    Args:
        config: Which model, where, and how much memory.

    Raises:
        ConfigError: The checkpoint cannot be served, or a limit does not fit it.
    """

    def __init__(self, config: EngineConfig) -> None:
        torch.set_num_threads(config.num_threads)
        self._config = config
        self._device = torch.device(config.device)
        dtype: torch.dtype = getattr(torch, config.dtype)
        checkpoint = (
            open_checkpoint(config.model_dir)
            if config.model_dir is not None
            else random_checkpoint(config.random_model)
        )
        shape = checkpoint.config
        if config.max_seq_len > shape.max_position_embeddings:
            raise ConfigError(
                f"engine.max_seq_len: {config.max_seq_len} exceeds the model's "
                f"max_position_embeddings of {shape.max_position_embeddings}"
            )
        self._model = Qwen3Model(shape, checkpoint.read, config.max_seq_len, dtype, self._device)
        self._attention = PagedAttention(
            shape,
            config.num_kv_blocks,
            config.tokens_per_block,
            config.max_seq_len,
            dtype,
            self._device,
        )
        self._pool = BlockPool(config.num_kv_blocks, config.tokens_per_block)
        self._sequences: dict[SequenceId, EngineSequence] = {}
        self._iteration = 0
        self._fingerprint = fingerprint(config, checkpoint, self._device)
        self._capabilities = EngineCapabilities(
            name="torch",
            granularity="step",
            actuation_delay_steps=0,
            lease_tokens=None,
            resident_when_gated=True,
            min_recompute_tokens=0,
            width_buckets=None,
            prefix_sharing_attention=False,
            bitwise_deterministic=False,
            virtual_time=False,
            max_batch_size=config.max_batch_size,
            max_seq_len=config.max_seq_len,
            tokens_per_block=config.tokens_per_block,
            num_kv_blocks=config.num_kv_blocks,
            vocab_size=shape.vocab_size,
        )

    @property
    def capabilities(self) -> EngineCapabilities:
        """See `Engine`."""
        return self._capabilities

    @property
    def fingerprint(self) -> Mapping[str, str]:
        """See `Engine`."""
        return self._fingerprint

    def now_s(self) -> float:
        """See `Engine`."""
        return time.perf_counter()

    # ---- sequences

    def add_sequence(
        self,
        sequence_id: SequenceId,
        family: int,
        token_ids: Sequence[int],
        params: SequenceParams,
    ) -> None:
        """See `Engine`."""
        tokens = list(token_ids)
        self._check_new(sequence_id, tokens)
        self._sequences[sequence_id] = EngineSequence(tokens, params, self._pool.create(family), 0)

    def fork_sequence(
        self,
        parent_id: SequenceId,
        child_id: SequenceId,
        num_shared_tokens: int,
        suffix_ids: Sequence[int],
        params: SequenceParams,
    ) -> None:
        """See `Engine`."""
        parent = self._sequences[parent_id]
        tokens = [*parent.tokens, *suffix_ids]
        self._check_new(child_id, tokens)
        table = self._pool.fork(parent.table, num_shared_tokens)
        self._sequences[child_id] = EngineSequence(tokens, params, table, parent.max_computed)

    def join_sequence(
        self, parent_id: SequenceId, child_id: SequenceId, suffix_ids: Sequence[int]
    ) -> None:
        """See `Engine`."""
        parent, child = self._sequences[parent_id], self._sequences[child_id]
        if child.tokens[: len(parent.tokens)] != parent.tokens:
            raise ValueError(f"sequence {child_id} does not begin with the tokens of {parent_id}")
        tokens = [*child.tokens, *suffix_ids]
        self._check_tokens(parent_id, tokens)
        # A preempted child may have less KV than the parent, whose tokens it begins with.
        keep, drop = child.table, parent.table
        if keep.num_tokens < drop.num_tokens:
            keep, drop = drop, keep
        self._pool.release(drop)
        parent.table = keep
        parent.tokens = tokens
        parent.max_computed = max(parent.max_computed, child.max_computed)
        del self._sequences[child_id]

    def preempt_sequence(self, sequence_id: SequenceId) -> None:
        """See `Engine`."""
        self._pool.drop_unshared(self._sequences[sequence_id].table)

    def release_sequence(self, sequence_id: SequenceId) -> None:
        """See `Engine`."""
        self._pool.release(self._sequences.pop(sequence_id).table)

    def num_tokens(self, sequence_id: SequenceId) -> int:
        """See `Engine`."""
        return len(self._sequences[sequence_id].tokens)

    def num_computed_tokens(self, sequence_id: SequenceId) -> int:
        """See `Engine`."""
        return self._sequences[sequence_id].table.num_tokens

    def _check_new(self, sequence_id: SequenceId, tokens: list[int]) -> None:
        if sequence_id in self._sequences:
            raise ValueError(f"sequence {sequence_id} exists already")
        self._check_tokens(sequence_id, tokens)

    def _check_tokens(self, sequence_id: SequenceId, tokens: list[int]) -> None:
        limits = self._capabilities
        if not 1 <= len(tokens) <= limits.max_seq_len:
            raise ValueError(
                f"sequence {sequence_id}: {len(tokens)} tokens, must be 1..{limits.max_seq_len}"
            )
        if not 0 <= min(tokens) <= max(tokens) < limits.vocab_size:
            raise ValueError(
                f"sequence {sequence_id}: token ids must be in [0, {limits.vocab_size})"
            )

    # ---- memory

    @property
    def num_free_blocks(self) -> int:
        """See `Engine`."""
        return self._pool.num_free_blocks

    def num_blocks_held(self, family: int) -> int:
        """See `Engine`."""
        return self._pool.num_blocks_held(family)

    def num_blocks_needed(self, sequence_id: SequenceId, num_tokens: int) -> int:
        """See `Engine`."""
        return self._pool.num_blocks_needed(self._sequences[sequence_id].table, num_tokens)

    def check_integrity(self) -> None:
        """See `Engine`."""
        self._pool.check_integrity()
        tables = {id(sequence.table) for sequence in self._sequences.values()}
        assert len(tables) == len(self._sequences) == self._pool.num_tables, "a table is lost"
        for sequence in self._sequences.values():
            assert sequence.table.num_tokens <= sequence.max_computed <= len(sequence.tokens)

    # ---- the iteration

    def step(self, plan: StepPlan) -> StepResult:
        """See `Engine`.

        Raises:
            ValueError: The plan is malformed; nothing was changed.
        """
        started_s = self.now_s()
        work = self._check_plan(plan)
        copies = self._pool.reserve([(item.sequence.table, item.num_tokens) for item in work])
        try:
            self._attention.copy_blocks(copies)
            tokens = self._run([segment for item in work for segment in item.segments()])
        except RuntimeError as error:
            raise EngineError(f"step {self._iteration} failed: {error}") from error
        num_recomputed = sum(item.count_recomputed() for item in work)
        for sequence_id, token in tokens.items():
            self._sequences[sequence_id].tokens.append(token)
        return self._result(plan, tokens, num_recomputed, started_s)

    def shutdown(self) -> None:
        """See `Engine`."""
        self._sequences.clear()
        del self._model, self._attention

    def _check_plan(self, plan: StepPlan) -> list[SequenceWork]:
        """What there is to do; raises ValueError for what the executor must not ask for."""
        work = [SequenceWork(i, self._sequences[i], 1, True) for i in plan.decode]
        for chunk in plan.prefill:
            sequence = self._sequences[chunk.sequence_id]
            work.append(SequenceWork(chunk.sequence_id, sequence, chunk.num_tokens, chunk.sample))
        if len({item.sequence_id for item in work}) != len(work):
            raise ValueError("a sequence stands in the plan twice")
        if not 1 <= len(work) <= self._config.max_batch_size:
            raise ValueError(
                f"a step takes 1..{self._config.max_batch_size} sequences, not {len(work)}"
            )
        for item in work:
            item.check(self._config.max_seq_len)
        return work

    @torch.inference_mode()
    def _run(self, segments: Sequence[Segment]) -> dict[SequenceId, int]:
        """Computes the segments; returns the drawn tokens."""
        batch = self._attention.begin_step(segments)
        hidden = self._model.forward(batch.token_ids, batch.positions, self._attention)
        if not batch.sampled_ids:
            return {}
        sampled = [self._sequences[i] for i in batch.sampled_ids]
        tokens = draw_tokens(
            self._model.logits(hidden[batch.sampled_rows]),
            [s.params for s in sampled],
            [len(s.tokens) for s in sampled],
        )
        return dict(zip(batch.sampled_ids, tokens, strict=True))

    def _result(
        self, plan: StepPlan, tokens: dict[SequenceId, int], num_recomputed: int, started_s: float
    ) -> StepResult:
        completed_at_s = self.now_s()
        iteration = self._iteration
        self._iteration += 1
        return StepResult(
            iteration=iteration,
            completed_at_s=completed_at_s,
            step_ms=(completed_at_s - started_s) * 1e3,
            decoded=plan.decode,
            tokens={i: (token,) for i, token in tokens.items()},
            prefilled={chunk.sequence_id: chunk.num_tokens for chunk in plan.prefill},
            num_recomputed_tokens=num_recomputed,
        )
