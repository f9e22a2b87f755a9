"""The embedded engine: Qwen3 on torch with paged KV and exact per-step membership."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from taper_trtllm.config import ConfigError, TorchEngineConfig
from taper_trtllm.engines.base import EngineError, SequenceId, StepPlan
from taper_trtllm.engines.bucket_batch import BucketBatchBuilder, width_buckets
from taper_trtllm.engines.bucket_runner import BucketRunner, DecodeAttention
from taper_trtllm.engines.cascade_attention import CascadeAttention
from taper_trtllm.engines.checkpoint import open_checkpoint, random_checkpoint
from taper_trtllm.engines.fingerprint import fingerprint
from taper_trtllm.engines.kv_cache import BlockCopy
from taper_trtllm.engines.kv_tensors import KvTensors
from taper_trtllm.engines.paged_attention import PagedAttention
from taper_trtllm.engines.paged_engine import (
    ChunkWork,
    PagedEngine,
    per_step_capabilities,
)
from taper_trtllm.engines.paged_sequences import EngineSequence
from taper_trtllm.engines.qwen3 import Qwen3Model
from taper_trtllm.engines.sampling import draw_tokens
from taper_trtllm.engines.step_batch import Segment, split_chunk
from taper_trtllm.token_spans import last_shift


class TorchEngine(PagedEngine):
    """Implements `engines.base.Engine` on torch.

    On a CPU a step is one flat batch of its tokens; on a GPU decode has fixed shapes.

    Args:
        config: Which model, where, and how much memory.
        decode_attention: What decode in fixed shapes attends with, on any device; None for the
            Triton kernels on a GPU.

    Attributes:
        on_logits: For tests: called with the sequences of a step that draw a token, and the [n,
            vocab] float32 logits that they draw it from; None for nobody.

    Raises:
        ConfigError: The checkpoint cannot be served, or a limit does not fit it.
    """

    on_logits: Callable[[Sequence[SequenceId], torch.Tensor], None] | None = None

    def __init__(
        self, config: TorchEngineConfig, decode_attention: DecodeAttention | None = None
    ) -> None:
        torch.set_num_threads(config.num_threads)
        self._device = torch.device(config.device)
        if self._device.type == "cuda" and not torch.cuda.is_available():
            raise ConfigError(f"engine.device: torch {torch.__version__} finds no GPU here")
        dtype: torch.dtype = getattr(torch, config.dtype)
        checkpoint = (
            open_checkpoint(config.model_dir)
            if config.model_dir is not None
            else random_checkpoint(config.random_model, self._device)
        )
        shape = checkpoint.config
        if config.max_seq_len > shape.max_position_embeddings:
            raise ConfigError(
                f"engine.max_seq_len: {config.max_seq_len} exceeds the model's "
                f"max_position_embeddings of {shape.max_position_embeddings}"
            )
        self._model = Qwen3Model(shape, checkpoint.read, config.max_seq_len, dtype, self._device)
        try:
            self._kv = KvTensors(
                shape, config.num_kv_blocks, config.tokens_per_block, dtype, self._device
            )
        except torch.OutOfMemoryError as error:
            raise ConfigError(f"engine.num_kv_blocks: {config.num_kv_blocks}: {error}") from None
        if decode_attention is None and self._device.type == "cuda":
            # cuDNN makes a plan for every new shape, and chunks have any: flash attention does not.
            torch.backends.cuda.enable_cudnn_sdp(False)
            # Imported here: torch for CPUs comes without Triton.
            from taper_trtllm.engines.triton_attention import TritonAttention

            num_sms = torch.cuda.get_device_properties(self._device).multi_processor_count
            decode_attention = TritonAttention(shape, config.max_batch_size, num_sms, self._device)
        self._attention: PagedAttention | None = None
        self._runner: BucketRunner | None = None
        buckets: tuple[int, ...] | None = None
        if decode_attention is not None:
            buckets = width_buckets(config.max_batch_size)
            self._runner = self._make_runner(config, decode_attention, buckets)
        elif config.prefix_sharing_attention:
            self._attention = CascadeAttention(shape, self._kv, config.max_seq_len)
        else:
            self._attention = PagedAttention(shape, self._kv, config.max_seq_len)
        self._fingerprint = fingerprint(config, checkpoint, self._device)
        super().__init__(
            per_step_capabilities(
                name="torch",
                width_buckets=buckets,
                prefix_sharing_attention=config.prefix_sharing_attention,
                kv_merge=True,
                bitwise_deterministic=False,
                virtual_time=False,
                max_batch_size=config.max_batch_size,
                max_seq_len=config.max_seq_len,
                tokens_per_block=config.tokens_per_block,
                num_kv_blocks=config.num_kv_blocks,
                vocab_size=shape.vocab_size,
            )
        )

    def _make_runner(
        self, config: TorchEngineConfig, attention: DecodeAttention, buckets: Sequence[int]
    ) -> BucketRunner:
        builder = BucketBatchBuilder(
            buckets,
            config.tokens_per_block,
            config.max_seq_len,
            self._model.config.vocab_size,
            attention.rows_per_tile if config.prefix_sharing_attention else None,
            self._device,
        )
        captures = config.cuda_graphs and self._device.type == "cuda"
        return BucketRunner(self._model, self._kv, builder, attention, buckets if captures else ())

    @property
    def fingerprint(self) -> Mapping[str, str]:
        """See `Engine`."""
        return self._fingerprint

    def now_s(self) -> float:
        """See `Engine`."""
        return time.perf_counter()

    def shutdown(self) -> None:
        """See `Engine`."""
        super().shutdown()
        del self._model, self._kv, self._attention, self._runner

    def _compute(
        self,
        plan: StepPlan,
        decode: Sequence[EngineSequence],
        chunks: Sequence[ChunkWork],
        copies: Sequence[BlockCopy],
    ) -> dict[SequenceId, int]:
        if self._runner is not None:
            return self._run_in_buckets(plan, decode, chunks, copies)
        segments = [
            Segment(
                sequence_id=i,
                token_ids=s.tokens[-1:],
                block_ids=s.table.block_ids,
                start=len(s.tokens) - 1,
                end=len(s.tokens),
                sample=True,
                shift=last_shift(s.spans),
            )
            for i, s in zip(plan.decode, decode, strict=True)
        ]
        segments += [segment for chunk in chunks for segment in _segments(chunk)]
        try:
            if copies:
                self._kv.copy_blocks([c.src for c in copies], [c.dst for c in copies])
            return self._run(segments)
        except RuntimeError as error:
            raise EngineError(f"step {self._iteration} failed: {error}") from error

    def _run_in_buckets(
        self,
        plan: StepPlan,
        decode: Sequence[EngineSequence],
        chunks: Sequence[ChunkWork],
        copies: Sequence[BlockCopy],
    ) -> dict[SequenceId, int]:
        assert self._runner is not None
        drawing = [*plan.decode, *(chunk.sequence_id for chunk in chunks if chunk.sample)]
        observe = None
        if (on_logits := self.on_logits) is not None:

            def observe(places: Sequence[int], logits: torch.Tensor) -> None:
                on_logits([drawing[place] for place in places], logits)

        try:
            tokens = self._runner.run(decode, chunks, copies, observe)
        except RuntimeError as error:
            raise EngineError(f"step {self._iteration} failed: {error}") from error
        return dict(zip(drawing, tokens, strict=True))

    @torch.inference_mode()
    def _copy_kv(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        if sources:
            self._kv.copy_slots(sources, targets)

    @torch.inference_mode()
    def _run(self, segments: Sequence[Segment]) -> dict[SequenceId, int]:
        """Computes the segments; returns the drawn tokens."""
        assert self._attention is not None
        batch = self._attention.begin_step(segments)
        hidden = self._model.forward(batch.token_ids, batch.positions, self._attention)
        if not batch.sampled_ids:
            return {}
        sampled = [self._sequences[i] for i in batch.sampled_ids]
        logits = self._model.logits(hidden[batch.sampled_rows])
        if self.on_logits is not None:
            self.on_logits(batch.sampled_ids, logits)
        tokens = draw_tokens(
            logits,
            [s.params for s in sampled],
            [len(s.tokens) for s in sampled],
        )
        return dict(zip(batch.sampled_ids, tokens, strict=True))


def _segments(chunk: ChunkWork) -> Iterator[Segment]:
    """The tokens to compute, cut for attention."""
    sequence = chunk.sequence
    token_ids = sequence.tokens[chunk.start : chunk.start + chunk.num_tokens]
    return split_chunk(
        chunk.sequence_id,
        token_ids,
        sequence.table.block_ids,
        chunk.start,
        chunk.sample,
        sequence.spans,
    )
