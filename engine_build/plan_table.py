"""The memory plan as a table on the console."""

from __future__ import annotations

from rich.table import Table

from engine_build.commands import BuildOptions
from engine_build.memory_plan import FREE_GPU_MEMORY_FRACTION, GIB, MemoryPlan


def plan_table(plan: MemoryPlan, options: BuildOptions) -> Table:
    """Memory of one GPU, what its KV pool holds ("?" where the GPU is not known), an iteration."""
    kv_cache = "fp8" if options.kv_cache_dtype == "fp8" else "bfloat16"
    table = Table(
        title=f"one GPU: {options.dtype}, KV cache {kv_cache}, TP {options.tp_size}",
        show_header=False,
    )
    table.add_column()
    table.add_column(justify="right")
    for label, num_bytes in (
        ("weights", plan.weight_bytes),
        (f"activations, {options.max_num_tokens} tokens (estimate)", plan.activation_bytes),
        ("CUDA, NCCL, runtime (allowance)", plan.runtime_bytes),
        (f"KV pool, {FREE_GPU_MEMORY_FRACTION} of the rest", plan.kv_pool_bytes),
        ("all memory", plan.gpu_bytes),
    ):
        table.add_row(label, _size(num_bytes))
    table.add_section()
    load, pool = plan.load, plan.num_kv_blocks
    table.add_row("KV cache of a token", f"{plan.kv_bytes_per_token} B")
    table.add_row(f"KV blocks of {plan.tokens_per_block} tokens", _count(pool))
    table.add_row(
        f"sequences of {plan.max_seq_len}, nothing shared",
        f"{_count(plan.num_longest)} of max_batch_size {plan.max_batch_size}",
    )
    table.add_section()
    table.add_row(
        f"{load.num_branches} branches x {load.branch_tokens} over {load.prefix_tokens} tokens", ""
    )
    table.add_row("  blocks, prefix shared", _of_pool(plan.shared_blocks, pool))
    table.add_row("  blocks, prefix held by each", _of_pool(plan.unshared_blocks, pool))
    table.add_section()
    table.add_row(f"one iteration, beside {plan.max_batch_size} that decode", "")
    table.add_row("  starts whose KV is there, a block each", str(plan.starts_per_iteration))
    table.add_row("  longest prefill", f"{plan.longest_prefill} tokens")
    return table


def _size(num_bytes: int | None) -> str:
    return "?" if num_bytes is None else f"{num_bytes / 1e9:.1f} GB ({num_bytes / GIB:.1f} GiB)"


def _count(number: int | None) -> str:
    return "?" if number is None else str(number)


def _of_pool(blocks: int, pool: int | None) -> str:
    return f"{blocks} ({blocks / pool:.0%} of the pool)" if pool else str(blocks)
