"""How long one admission decision takes: ``python -m perf.planner``.

Every policy decides random batches of fork-join requests; P50 and P99 of one `admit` are printed
against the bars below. P99 of the thread's CPU time stands beside them: where it is much smaller,
other processes had the processor.
"""

from __future__ import annotations

import argparse
import gc
import time

import numpy as np
from rich.console import Console
from rich.table import Table

from taper_trtllm.admission import AdmissionPolicy, make_policy, predictor_mode
from taper_trtllm.batch import BatchState, FloatArray, PrefillLoad
from taper_trtllm.config import SchedulerConfig
from taper_trtllm.predictor import StepLatencyPredictor
from taper_trtllm.profile import DecodePoint, LatencyProfile, PrefillPoint

P99_BAR_MS = {512: 0.2, 4096: 1.5}
POLICIES = ("irp-off", "irp-eager", "fixed-cap:2", "step-ceiling:0.9", "taper", "taper:widest")
_MEAN_LEAVES = 4  # ready leaves per request
_TOKENS_PER_BLOCK = 16


def random_batch(num_sequences: int, rng: np.random.Generator) -> BatchState:
    """A batch of fork-join requests with tight to ample slack.

    Args:
        num_sequences: Ready leaves over all requests.
        rng: Source of randomness.
    """
    num_requests = max(1, num_sequences // _MEAN_LEAVES)
    extra = rng.integers(num_requests, size=num_sequences - num_requests)
    request_index = np.sort(np.concatenate([np.arange(num_requests), extra]))
    tpot_slo_ms = rng.choice([30.0, 50.0, 100.0], size=num_requests)
    context_tokens = rng.integers(100, 4000, size=num_sequences)
    return BatchState(
        first_leaf=np.searchsorted(request_index, np.arange(num_requests)),
        request_index=request_index,
        context_tokens=context_tokens,
        extra_context_tokens=context_tokens,
        num_generated=rng.integers(0, 300, size=num_sequences),
        last_advanced=rng.integers(0, 50, size=num_sequences),
        holding=np.zeros(num_sequences, dtype=np.bool_),
        blocks_needed=(rng.random(num_sequences) < 1 / _TOKENS_PER_BLOCK).astype(np.int64),
        slack_ms=tpot_slo_ms * rng.uniform(0.5, 20.0, size=num_requests),
        tpot_slo_ms=tpot_slo_ms,
        savable=rng.random(num_requests) < 0.95,
        stage_width=np.zeros(num_requests, dtype=np.int64),
        kv_headroom_blocks=rng.integers(0, 4, size=num_requests),
        num_unreserved_blocks=int(rng.integers(num_sequences // 8)),  # half of them are short
        prefill=PrefillLoad(1, 128, 128 * 500.0),
        max_batch_size=num_sequences,
    )


def admit_times_ms(
    policy: AdmissionPolicy, batches: list[BatchState], repeats: int
) -> tuple[FloatArray, FloatArray]:
    """Duration of every `admit` in wall and in CPU milliseconds, after one unmeasured round."""
    for batch in batches:
        policy.admit(batch, policy.baseline(batch))
    times_ns = []
    for _ in range(repeats):
        for batch in batches:
            start_ns, start_cpu_ns = time.perf_counter_ns(), time.thread_time_ns()
            policy.admit(batch, policy.baseline(batch))
            end_cpu_ns, end_ns = time.thread_time_ns(), time.perf_counter_ns()
            times_ns.append((end_ns - start_ns, end_cpu_ns - start_cpu_ns))
    wall_ms, cpu_ms = np.array(times_ns, dtype=np.float64).T / 1e6
    return wall_ms, cpu_ms


def synthetic_profile() -> LatencyProfile:
    """A profile of the embedded engine's shape; only its size matters here."""
    return LatencyProfile(
        fingerprint={"engine": "synthetic"},
        decode=tuple(
            DecodePoint(width=w, context_tokens=c, step_ms=3 + 0.25 * w + 3e-4 * w * c)
            for w in (1, 2, 4, 8, 16, 32, 64, 128, 256)
            for c in (64, 512, 2048)
        ),
        prefill=(
            PrefillPoint(
                width=0, context_tokens=0, num_chunks=1, num_tokens=128, token_context=64 * 128,
                step_ms=25,
            ),
        ),
    )  # fmt: skip


def main() -> int:
    """Prints the table; the exit status is 1 if a bar is missed."""
    parser = argparse.ArgumentParser(prog="python -m perf.planner", description=__doc__)
    parser.add_argument("--num-batches", type=int, default=50, help="random batches (%(default)s)")
    parser.add_argument("--repeats", type=int, default=20, help="rounds over them (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    table = Table(title="One admission decision (ms)")
    for column in ("policy", "sequences", "P50", "P99", "P99 CPU", "bar"):
        table.add_column(column, justify="left" if column == "policy" else "right")
    all_met = True
    for num_sequences, bar_ms in P99_BAR_MS.items():
        rng = np.random.default_rng(arguments.seed)
        batches = [random_batch(num_sequences, rng) for _ in range(arguments.num_batches)]
        for spec in POLICIES:
            predictor = StepLatencyPredictor(
                synthetic_profile(), max_width=num_sequences, mode=predictor_mode(spec)
            )
            policy = make_policy(spec, SchedulerConfig(), predictor)
            gc.collect()
            wall_ms, cpu_ms = admit_times_ms(policy, batches, arguments.repeats)
            p50, p99 = np.percentile(wall_ms, [50, 99]).tolist()
            all_met &= p99 <= bar_ms
            figures = (f"{ms:.3f}" for ms in (p50, p99, float(np.percentile(cpu_ms, 99))))
            style = None if p99 <= bar_ms else "red"
            table.add_row(spec, str(num_sequences), *figures, f"{bar_ms}", style=style)
    Console().print(table)
    return 0 if all_met else 1


if __name__ == "__main__":
    raise SystemExit(main())
