"""How long one turn of the loop takes beside the engine: ``python -m perf.loop``.

The real executor runs on the virtual-time engine; the time that it spends before `Engine.step`
(plan) and after it (observe) is printed for growing batches in steady decode. Half of the requests
are plain, the others decode seven branches each. Two cases: every ready leaf is admitted, and all
extras are refused, so that what a leaf costs that only waits can be read off.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from perf.shipped_profiles import named_profile
from taper_trtllm.batch import FloatArray
from taper_trtllm.config import SchedulerConfig
from taper_trtllm.engines.base import StepPlan, StepResult
from taper_trtllm.engines.simulated import SimulatedConfig, SimulatedEngine
from taper_trtllm.executor import TaperExecutor
from taper_trtllm.output import RequestOutput
from taper_trtllm.request import (
    Branch,
    ForkJoinRequest,
    ParallelStage,
    RequestLimits,
    SloTarget,
)

PROFILE = "h200_fp8_tp1"
CASES = {"admitted": "taper", "refused": "step-ceiling:0.001"}  # what becomes of all extras
_NUM_BRANCHES = 7
_NUM_PROMPT_TOKENS = 512
_NUM_WARM_STEPS = 50
_MAX_BATCH_SIZE = 512


@dataclass(frozen=True, slots=True)
class LoopTimes:
    """Times of steps in steady decode.

    Attributes:
        plan_ms: [N] before `Engine.step`.
        observe_ms: [N] after it.
    """

    plan_ms: FloatArray
    observe_ms: FloatArray

    @property
    def turn_ms(self) -> FloatArray:
        """[N] both."""
        return self.plan_ms + self.observe_ms


class _ClockedEngine(SimulatedEngine):
    """Notes on the wall clock when a step began and when it was done."""

    stepped_ns = (0, 0)

    def step(self, plan: StepPlan) -> StepResult:
        began_ns = time.perf_counter_ns()
        result = super().step(plan)
        self.stepped_ns = (began_ns, time.perf_counter_ns())
        return result


def loop_times(
    policy: str, num_sequences: int, num_steps: int, step_log: Path | None = None
) -> LoopTimes:
    """Times `num_steps` turns with so many ready leaves.

    Args:
        policy: Policy specification.
        num_sequences: Ready leaves over all requests; a multiple of 8.
        num_steps: Measured turns.
        step_log: Where to write every step record; None for nowhere.
    """
    profile = named_profile(PROFILE)
    config = SimulatedConfig(num_kv_blocks=1 << 17, max_batch_size=_MAX_BATCH_SIZE)
    engine = _ClockedEngine(profile, config)
    num_requests = num_sequences // 4
    scheduler = SchedulerConfig(
        policy=policy,
        max_num_requests=num_requests,
        max_batch_size=_MAX_BATCH_SIZE,
        max_prefill_tokens=8192,
        probe_interval_steps=None,
    )
    limits = RequestLimits(max_total_tokens=32768)
    slo = SloTarget(ttft_ms=1e6, tpot_ms=1e4)
    executor = TaperExecutor(engine, profile, scheduler, limits, slo)
    if step_log is not None:
        executor.keep_step_log(step_log)
    # Enough tokens that nothing ends before the last step, whether prefilled first or last.
    max_tokens = 2 * (num_steps + _NUM_WARM_STEPS + num_requests)
    for i in range(num_requests):
        executor.submit(_request(f"request-{i}", i % 2 == 0, max_tokens), _discard)
    num_warm = 0
    while num_warm < _NUM_WARM_STEPS:
        record = executor.run_once()
        assert record is not None
        num_warm += record.num_ready == num_sequences
    gc.collect()
    times_ns = []
    for _ in range(num_steps):
        start_ns = time.perf_counter_ns()
        record = executor.run_once()
        end_ns = time.perf_counter_ns()
        assert record is not None and record.num_ready == num_sequences
        began_ns, done_ns = engine.stepped_ns
        times_ns.append((began_ns - start_ns, end_ns - done_ns))
    plan_ms, observe_ms = np.array(times_ns, dtype=np.float64).T / 1e6
    executor.shutdown()
    return LoopTimes(plan_ms, observe_ms)


def _request(request_id: str, is_branching: bool, max_tokens: int) -> ForkJoinRequest:
    prompt = tuple(range(_NUM_PROMPT_TOKENS))
    if not is_branching:
        return ForkJoinRequest(request_id=request_id, input_ids=prompt, max_tokens=max_tokens)
    branches = tuple(
        Branch(header_ids=(i, i, i, i), max_tokens=max_tokens) for i in range(_NUM_BRANCHES)
    )
    return ForkJoinRequest(
        request_id=request_id, input_ids=prompt, stages=(ParallelStage(branches=branches),)
    )


def _discard(output: RequestOutput) -> None:
    """A client that takes its tokens at no cost."""


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="python -m perf.loop", description=__doc__)
    parser.add_argument(
        "--sequences",
        type=lambda text: [int(n) for n in text.split(",")],
        default=[32, 64, 128, 256, 512],
        help="ready leaves, multiples of 8 (32,64,128,256,512)",
    )
    parser.add_argument("--steps", type=int, default=400, help="measured turns (%(default)s)")
    parser.add_argument("--step-log", action="store_true", help="write a step log meanwhile")
    arguments = parser.parse_args()
    if any(n not in range(8, _MAX_BATCH_SIZE + 1, 8) for n in arguments.sequences):
        parser.error(f"--sequences: multiples of 8 up to {_MAX_BATCH_SIZE}")
    table = Table(title="One turn of the loop without the engine (ms)")
    table.add_column("extras", no_wrap=True)
    for column in ("leaves", "plan\nP50", "P99", "observe\nP50", "P99", "turn\nP50", "P99", "x"):
        table.add_column(column, justify="right", no_wrap=True)
    with tempfile.TemporaryDirectory() as folder:
        step_log = Path(folder) / "steps.jsonl" if arguments.step_log else None
        for case, policy in CASES.items():
            previous_ms = None
            for num_sequences in arguments.sequences:
                times = loop_times(policy, num_sequences, arguments.steps, step_log)
                columns = (times.plan_ms, times.observe_ms, times.turn_ms)
                cells = [f"{ms:.3f}" for c in columns for ms in np.percentile(c, [50, 99])]
                turn_ms = float(np.median(times.turn_ms))
                ratio = f"{turn_ms / previous_ms:.2f}" if previous_ms else ""
                previous_ms = turn_ms
                table.add_row(case, str(num_sequences), *cells, ratio)
    Console().print(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
