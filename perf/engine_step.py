"""How long a decode step of the embedded engine takes: ``python -m perf.engine_step``.

Two comparisons on the same model, width and context, one thread each, repeated in turn:

* with the stand-alone matrix products and attention of the same shapes, on KV that is already
  gathered: what a step cannot do without;
* with transformers' continuous batching, whose loop is paused while the engine runs.

Times are wall-clock. The engine's includes everything from the plan to the drawn tokens. That of
continuous batching is the interval between two tokens of one request by the library's timestamps,
so it includes scheduling, preparing, the forward pass, sampling and handing out streamed tokens.
Contexts grow by one token per step on both sides, starting at ``--context``.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from perf.step_rivals import StandaloneKernels, continuous_batching
from taper_trtllm.config import RandomModelConfig, TorchEngineConfig
from taper_trtllm.engines import create_engine
from taper_trtllm.engines.base import PrefillChunk, SequenceParams, StepPlan
from taper_trtllm.engines.checkpoint import random_checkpoint
from taper_trtllm.request import SamplingParams

MODEL = RandomModelConfig()
ENGINE, KERNELS, BATCHING = "engine.step", "stand-alone kernels", "continuous batching"
_STEPS_PER_ROUND = {ENGINE: 8, BATCHING: 4}
_PREFILL_TOKENS = 64  # per sequence and step, so that blocks of all sequences interleave


def decoding_engine(prompts: list[list[int]], max_new_tokens: int) -> Callable[[], None]:
    """An engine in which all prompts are prefilled; calling the result decodes one step."""
    max_seq_len = len(prompts[0]) + max_new_tokens
    blocks = len(prompts) * (-(-max_seq_len // TorchEngineConfig().tokens_per_block) + 1)
    engine = create_engine(
        TorchEngineConfig(random_model=MODEL, num_kv_blocks=blocks, max_seq_len=max_seq_len)
    )
    params = SequenceParams(SamplingParams(), seed=0)
    for i, prompt in enumerate(prompts):
        engine.add_sequence(i, i, prompt, params)
    ids = tuple(range(len(prompts)))
    while (pending := len(prompts[0]) - engine.num_computed_tokens(0)) > 0:
        n = min(pending, _PREFILL_TOKENS)
        engine.step(StepPlan(prefill=tuple(PrefillChunk(i, n, n == pending) for i in ids)))
    plan = StepPlan(decode=ids, max_new_tokens=(max_new_tokens,) * len(ids))

    def decode() -> None:
        engine.step(plan)

    return decode


def timed_ms(function: Callable[[], None]) -> float:
    """Wall-clock duration of a call."""
    start_ns = time.perf_counter_ns()
    function()
    return (time.perf_counter_ns() - start_ns) / 1e6


def measure(width: int, context: int, num_rounds: int) -> list[dict[str, list[float]]]:
    """Step times in milliseconds of each contender, by round."""
    rng = random.Random(0)
    prompts = [[rng.randrange(MODEL.vocab_size) for _ in range(context)] for _ in range(width)]
    num_steps = _STEPS_PER_ROUND[ENGINE] * num_rounds
    decode = decoding_engine(prompts, max_new_tokens=num_steps + 8)
    mean_context = context + num_steps // 2
    kernels = StandaloneKernels(random_checkpoint(MODEL).config, width, mean_context)
    for function in (decode, kernels.run):
        function()
    rounds = []
    with continuous_batching(MODEL, width, context, max_new_tokens=16 * num_rounds) as batching:
        batching.start(prompts, max_new_tokens=16 * num_rounds)
        for _ in range(num_rounds):
            times: dict[str, list[float]] = {ENGINE: [], KERNELS: []}
            with batching.manager.pause():
                for _ in range(_STEPS_PER_ROUND[ENGINE]):
                    times[ENGINE].append(timed_ms(decode))
                    times[KERNELS].append(timed_ms(kernels.run))
            start_s = time.perf_counter()
            batching.advance(_STEPS_PER_ROUND[BATCHING] + 1)
            times[BATCHING] = batching.step_times_ms(start_s, time.perf_counter())
            rounds.append(times)
    return rounds


def ratio(rounds: list[dict[str, list[float]]], over: str, under: str) -> dict[str, float]:
    """Median, least and largest of the rounds' ratios of medians."""
    ratios = [median(times[over]) / median(times[under]) for times in rounds]
    return {"median": median(ratios), "min": min(ratios), "max": max(ratios)}


def summary(rounds: list[dict[str, list[float]]]) -> dict[str, dict[str, float]]:
    """Quartiles of each contender's step time, and the two ratios."""
    result: dict[str, dict[str, float]] = {}
    for name in (ENGINE, KERNELS, BATCHING):
        quartiles = np.percentile([ms for times in rounds for ms in times[name]], [25, 50, 75])
        result[name] = dict(zip(("p25_ms", "p50_ms", "p75_ms"), quartiles.tolist(), strict=True))
    result["engine_over_kernels"] = ratio(rounds, ENGINE, KERNELS)
    result["speedup_over_batching"] = ratio(rounds, BATCHING, ENGINE)
    return result


def print_summary(result: dict[str, dict[str, float]], title: str) -> None:
    """Prints the tables of times and of ratios."""
    console = Console()
    times = Table("", title=title)
    for column in ("p25 (ms)", "p50 (ms)", "p75 (ms)"):
        times.add_column(column, justify="right")
    for name in (ENGINE, KERNELS, BATCHING):
        times.add_row(name, *(f"{ms:.1f}" for ms in result[name].values()))
    console.print(times)
    ratios = Table("ratio", title="Ratios of medians, by round")
    for column in ("median", "least", "largest", "wanted at 64 x 512"):
        ratios.add_column(column, justify="right")
    wanted = {"engine_over_kernels": "<= 1.25", "speedup_over_batching": ">= 8"}
    for name, bar in wanted.items():
        ratios.add_row(name, *(f"{value:.2f}" for value in result[name].values()), bar)
    console.print(ratios)


def main() -> int:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(prog="python -m perf.engine_step", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--width", type=int, default=64, help="sequences (%(default)s)")
    parser.add_argument("--context", type=int, default=512, help="tokens of each (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="repetitions (%(default)s)")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rounds = measure(arguments.width, arguments.context, arguments.rounds)
    result = summary(rounds)
    shape = f"{arguments.width} sequences x {arguments.context} tokens"
    print_summary(result, f"One decode step, {shape}, one thread")
    if arguments.json is not None:
        settings = {"width": arguments.width, "context": arguments.context}
        content = {**settings, "model": MODEL.model_dump(), "summary": result, "rounds": rounds}
        arguments.json.write_text(json.dumps(content, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
