"""What an engine takes of each GPU's memory, how many branches the rest holds. Pure.

Weights and KV cache follow from the shape. Activations are an estimate: TensorRT decides at build
time, for the largest shapes, and needs about one layer's tensors (TensorRT-LLM,
docs/source/reference/memory.md @5a211b91), so with h = hidden size, q, k, i = a GPU's share of
query, key and feed-forward columns, T = max_num_tokens and B = max_batch_size

    activations = 2 T max(2h + 3q + 2k, 2h + 3i) [+ T (h + i) with FP8] + 8 B vocabulary bytes

counts residual and normalised input in both halves of a layer; query, key, value, the query copy of
paged attention and its output in the first; gate, up and their product in the second; 8-bit copies
of matmul inputs; float32 logits and the decoder's copy of them.

In one iteration each sequence that decodes takes a token of T first. Prompts that do not all fit in
the rest get a block each by turns (TensorRT-LLM, cpp/tensorrt_llm/batch_manager/
microBatchScheduler.cpp @b8b7b782, EQUAL_PROGRESS, which the adapter asks for): one block starts a
branch whose KV is there, whatever its length, and other prompts are cut over iterations.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from engine_build.commands import BuildOptions
from engine_build.model_shape import ModelShape

FREE_GPU_MEMORY_FRACTION = 0.9  # of what the engine leaves, TensorRT-LLM's default for the KV pool
GIB = 1 << 30
# CUDA context, libraries, NCCL and decoder buffers: an allowance, not a measurement.
RUNTIME_BYTES = 2 * GIB
_MAX_TENSOR_VOLUME = (1 << 31) - 1  # elements of one TensorRT tensor


@dataclass(frozen=True)
class BranchLoad:
    """A fan-out that the plan answers for: branches of equal length over one prefix."""

    num_branches: int
    prefix_tokens: int
    branch_tokens: int


@dataclass(frozen=True)
class MemoryPlan:
    """Memory of one GPU in bytes, KV cache in blocks of `tokens_per_block`.

    Attributes:
        gpu_bytes: All memory of the GPU; None if it is not known.
        weight_bytes: Of one rank.
        activation_bytes: An estimate (see the module).
        runtime_bytes: An allowance.
        kv_bytes_per_token: Of one rank.
        num_kv_blocks: Blocks that the pool holds; None without `gpu_bytes`.
        blocks_of_longest: Blocks of one sequence of `max_seq_len`.
        load: The fan-out of the next two.
        shared_blocks: Its blocks when branches share the full blocks of the prefix.
        unshared_blocks: Its blocks when each branch holds the prefix itself.
        starts_per_iteration: Branches whose KV is there that the tokens of one iteration can start
            beside a full decode batch; `max_batch_size` bounds both together.
        longest_prefill: Tokens of prefill that one iteration can have beside a full decode batch.
    """

    gpu_bytes: int | None
    weight_bytes: int
    activation_bytes: int
    runtime_bytes: int
    kv_bytes_per_token: int
    tokens_per_block: int
    num_kv_blocks: int | None
    max_batch_size: int
    max_seq_len: int
    blocks_of_longest: int
    load: BranchLoad
    shared_blocks: int
    unshared_blocks: int
    starts_per_iteration: int
    longest_prefill: int

    @property
    def engine_bytes(self) -> int:
        """Everything but the KV pool."""
        return self.weight_bytes + self.activation_bytes + self.runtime_bytes

    @property
    def kv_pool_bytes(self) -> int | None:
        """Bytes of the KV pool."""
        if self.num_kv_blocks is None:
            return None
        return self.num_kv_blocks * self.tokens_per_block * self.kv_bytes_per_token

    @property
    def num_longest(self) -> int | None:
        """Sequences of `max_seq_len` that the pool holds at a time, nothing shared."""
        return None if self.num_kv_blocks is None else self.num_kv_blocks // self.blocks_of_longest

    @property
    def problems(self) -> list[str]:
        """Why the engine cannot run on such a GPU; empty if it can or nothing is known of it."""
        if self.gpu_bytes is None or self.num_kv_blocks is None:
            return []
        has = f"{self.gpu_bytes / GIB:.1f} GiB"
        if self.engine_bytes >= self.gpu_bytes:
            return [
                f"GPU memory: weights, activations and runtime take {self.engine_bytes / GIB:.1f} "
                f"GiB of each GPU, which has {has}; raise --tp-size, lower --max-num-tokens, or "
                "use --dtype fp8"
            ]
        if not self.num_longest:
            return [
                f"GPU memory: of {has} the KV pool gets {self.num_kv_blocks} blocks, and one "
                f"sequence of {self.max_seq_len} tokens needs {self.blocks_of_longest}; raise "
                "--tp-size, lower --max-seq-len or --max-num-tokens, or use --dtype fp8"
            ]
        return []

    def to_dict(self) -> dict[str, Any]:
        """For the manifest."""
        return {**asdict(self), "free_gpu_memory_fraction": FREE_GPU_MEMORY_FRACTION}


def plan_memory(
    shape: ModelShape, options: BuildOptions, gpu_bytes: int | None, load: BranchLoad
) -> MemoryPlan:
    """Plans one GPU of a tensor-parallel group.

    Args:
        shape: Of the model.
        options: Of the build; they must suit the shape.
        gpu_bytes: All memory of one GPU; None if it is not known.
        load: A fan-out to answer for.
    """
    weights = weight_bytes(shape, options.dtype, options.tp_size)
    activations = activation_bytes(shape, options)
    per_token = kv_bytes_per_token(shape, options.kv_cache_dtype, options.tp_size)
    block = options.tokens_per_block
    num_kv_blocks = None
    if gpu_bytes is not None:
        free = max(0, gpu_bytes - weights - activations - RUNTIME_BYTES)
        num_kv_blocks = int(free * FREE_GPU_MEMORY_FRACTION) // (per_token * block)
    per_branch = _ceil(load.prefix_tokens + load.branch_tokens, block)
    # A branch writes into the last, partly filled block of the prefix, and so has its own.
    full_prefix = load.prefix_tokens // block
    longest_prefill = options.max_num_tokens - options.max_batch_size
    return MemoryPlan(
        gpu_bytes=gpu_bytes,
        weight_bytes=weights,
        activation_bytes=activations,
        runtime_bytes=RUNTIME_BYTES,
        kv_bytes_per_token=per_token,
        tokens_per_block=block,
        num_kv_blocks=num_kv_blocks,
        max_batch_size=options.max_batch_size,
        max_seq_len=options.max_seq_len,
        blocks_of_longest=_ceil(options.max_seq_len, block),
        load=load,
        shared_blocks=full_prefix + load.num_branches * (per_branch - full_prefix),
        unshared_blocks=load.num_branches * per_branch,
        starts_per_iteration=longest_prefill // block,
        longest_prefill=longest_prefill,
    )


def weight_bytes(shape: ModelShape, dtype: str, tp_size: int) -> int:
    """Weights of one rank.

    The layers' matrices and the output head are split; norms and the embedding are not (neither
    script is asked for a parallel embedding). Tied weights are one matrix on a single GPU alone:
    with more, a rank holds all of the embedding and its part of the head
    (tensorrt_llm/models/modeling_utils.py, share_embedding). FP8 leaves embedding, head and norms
    in bfloat16. Key and value heads are replicated where there are fewer than ranks.
    """
    linear = shape.num_linear_params // tp_size
    if shape.num_key_value_heads < tp_size:
        columns = 2 * shape.head_dim * (tp_size - shape.num_key_value_heads)
        linear += shape.num_hidden_layers * columns * shape.hidden_size // tp_size
    embedding = shape.vocab_size * shape.hidden_size
    head = _ceil(shape.vocab_size, tp_size) * shape.hidden_size
    if shape.tie_word_embeddings and tp_size == 1:
        head = 0
    wide = embedding + head + shape.num_norm_params
    return linear * (1 if dtype == "fp8" else 2) + wide * 2


def activation_bytes(shape: ModelShape, options: BuildOptions) -> int:
    """Estimated activations of one rank (the formula is in the module's docstring)."""
    hidden = shape.hidden_size
    query = shape.num_attention_heads * shape.head_dim // options.tp_size
    key = _kv_heads_per_rank(shape, options.tp_size) * shape.head_dim
    inner = shape.intermediate_size // options.tp_size
    per_token = 2 * max(2 * hidden + 3 * query + 2 * key, 2 * hidden + 3 * inner)
    if options.dtype == "fp8":
        per_token += hidden + inner
    return options.max_num_tokens * per_token + 8 * options.max_batch_size * shape.vocab_size


def kv_bytes_per_token(shape: ModelShape, kv_cache_dtype: str, tp_size: int) -> int:
    """KV cache of one token on one rank: keys and values of all layers."""
    heads = _kv_heads_per_rank(shape, tp_size)
    size = 1 if kv_cache_dtype == "fp8" else 2
    return 2 * shape.num_hidden_layers * heads * shape.head_dim * size


def most_num_tokens(shape: ModelShape, tp_size: int) -> int:
    """Largest `max_num_tokens` whose widest tensor (gate and up, fused) TensorRT can hold."""
    return _MAX_TENSOR_VOLUME // (2 * shape.intermediate_size // tp_size)


def _kv_heads_per_rank(shape: ModelShape, tp_size: int) -> int:
    return max(1, shape.num_key_value_heads // tp_size)


def _ceil(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)
