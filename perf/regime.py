"""The regime of an experiment: slots, memory, objectives and loads, fixed before any policy runs.

Everything follows from the latency profile of the engine and from the trace, by constants that
stand here and know nothing of a policy. ``python -m perf.regime`` prints it and writes the serving
configuration.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import yaml

from perf.program import ProgramCost, program_cost
from perf.trace import read_trace
from perf.workload import (
    DEFAULT_TRACE,
    WorkloadConfig,
    embedded,
    make_request,
    vocab_size_of,
)
from taper_trtllm.batch import PrefillLoad
from taper_trtllm.config import ConfigError, ServingConfig, TorchEngineConfig, load_config
from taper_trtllm.predictor import StepLatencyPredictor
from taper_trtllm.profile import ProfileError, load_profile
from taper_trtllm.request import RequestError, RequestLimits, SloTarget

LENGTH_SCALE = 0.25  # a request then lasts about a second on the small model
# A prompt token costs 1/45 of a single-sequence decode step on the small CPU model, but 1/145 for
# Qwen3-32B FP8 on one H200 (512 tokens take 41 ms, a step 11.6 ms). A third more restores the
# target's share of prefill.
PROMPT_SCALE = LENGTH_SCALE / 3
MAX_NUM_REQUESTS = 16  # request slots
TPOT_SLO_STEPS = 4.0  # tau, in steps of a single sequence
TTFT_SLO_TPOTS = 67  # Y in tau: 2 s for 30 ms, a usual pair of objectives
CHUNK_STEP_TPOTS = 2.0  # longest step with a prefill chunk, in tau
KV_POOL_FOOTPRINTS = 2.0  # per slot: one for the request itself, one for branches beside it


@dataclass(frozen=True, slots=True)
class RegimeRules:
    """What a regime is derived by; the defaults suit the small model on a CPU.

    Attributes:
        tpot_slo_steps: tau, in steps of a single sequence.
        max_num_requests: Request slots; None for as many as a step within tau is wide.
    """

    tpot_slo_steps: float = TPOT_SLO_STEPS
    max_num_requests: int | None = MAX_NUM_REQUESTS


@dataclass(frozen=True, slots=True)
class Regime:
    """What every policy of an experiment runs under.

    Attributes:
        length_scale: Factor on the trace's decoded token counts.
        prompt_scale: Factor on its prompt lengths.
        num_requests: Requests of the trace that the limits admit.
        mean_output_tokens: Decoded tokens per request.
        mean_prefill_tokens: Prompt, header and join tokens per request.
        mean_context_tokens: Context length of a decoded token.
        single_step_ms: T(1, mean context).
        tpot_slo_ms: tau = so many single steps (`RegimeRules`).
        ttft_slo_ms: Y = `TTFT_SLO_TPOTS` x tau.
        max_num_requests: Request slots.
        max_prefill_tokens: Chunk budget: the most whole blocks with which a step of all slots, one
            leaf each, stays within `CHUNK_STEP_TPOTS` x tau.
        num_kv_blocks: KV pool: `KV_POOL_FOOTPRINTS` mean worst-case footprints per slot, and at
            least the largest request.
        prefill_ms: Time that the prefill of a mean request adds to the steps it is part of.
        widest_step: w*, the largest width with T(w, w x mean context) + w x prefill time / mean
            output tokens <= tau. In a steady state every token brings its share of its request's
            prefill with it; the sum is then the time between two tokens of a sequence.
        reference_rate: R0 = w* / (tau x mean output tokens), in requests per second: what the
            engine sustains if every step is w* wide and takes tau, its prefill included.
    """

    length_scale: float
    prompt_scale: float
    num_requests: int
    mean_output_tokens: float
    mean_prefill_tokens: float
    mean_context_tokens: float
    single_step_ms: float
    tpot_slo_ms: float
    ttft_slo_ms: float
    max_num_requests: int
    max_prefill_tokens: int
    num_kv_blocks: int
    prefill_ms: float
    widest_step: int
    reference_rate: float

    def serving_config(self, base: ServingConfig, policy: str, profile: Path) -> ServingConfig:
        """The configuration that a server of this regime is started with."""
        engine = base.engine.model_copy(update={"num_kv_blocks": self.num_kv_blocks})
        scheduler = base.scheduler.model_copy(
            update={
                "policy": policy,
                "max_num_requests": self.max_num_requests,
                "max_prefill_tokens": self.max_prefill_tokens,
            }
        )
        slo = SloTarget(ttft_ms=self.ttft_slo_ms, tpot_ms=self.tpot_slo_ms)
        return base.model_copy(
            update={
                "engine": engine,
                "scheduler": scheduler,
                "slo": slo,
                "profile": profile.resolve(),
            }
        )

    def workload_config(
        self,
        base: ServingConfig,
        dataset_path: Path,
        request_rate: float,
        num_prompts: int,
        seed: int,
    ) -> WorkloadConfig:
        """What is replayed against such a server; equal seeds give equal requests and arrivals."""
        return WorkloadConfig(
            dataset_path=dataset_path,
            num_prompts=num_prompts,
            request_rate=request_rate,
            length_scale=self.length_scale,
            prompt_scale=self.prompt_scale,
            seed=seed,
            vocab_size=vocab_size_of(base.engine),
            limits=base.limits,
        )

    def lines(self) -> list[str]:
        """The regime in words."""
        return [
            f"trace: {self.num_requests} requests, lengths x {self.length_scale:g}, prompts x "
            f"{self.prompt_scale:.3g}; means: "
            f"{self.mean_output_tokens:.0f} decoded and {self.mean_prefill_tokens:.0f} prefilled "
            f"tokens, context {self.mean_context_tokens:.0f}",
            f"tau = {self.tpot_slo_ms / self.single_step_ms:g} x T(1) = "
            f"{self.tpot_slo_ms / self.single_step_ms:g} x {self.single_step_ms:.2f} ms "
            f"= {self.tpot_slo_ms:.1f} ms;  Y = {TTFT_SLO_TPOTS} tau = {self.ttft_slo_ms:.0f} ms",
            f"{self.max_num_requests} slots, {self.num_kv_blocks} KV blocks, "
            f"{self.max_prefill_tokens} prefill tokens per step",
            f"prefill {self.prefill_ms:.0f} ms per request;  w* = {self.widest_step} sequences "
            f"within tau;  R0 = {self.reference_rate:.2f} requests/s",
        ]


def trace_costs(
    dataset_path: Path,
    length_scale: float,
    prompt_scale: float,
    limits: RequestLimits,
    engine: TorchEngineConfig,
) -> list[ProgramCost]:
    """Costs of every row of a trace that the limits admit."""
    config = WorkloadConfig(
        dataset_path=dataset_path,
        length_scale=length_scale,
        prompt_scale=prompt_scale,
        vocab_size=vocab_size_of(engine),
        limits=limits,
    )
    rng = np.random.default_rng(0)
    costs = []
    for row in read_trace(dataset_path):
        try:
            request = make_request(row, config, "cost", [], rng).request
        except RequestError:
            continue
        costs.append(program_cost(request, engine.tokens_per_block))
    return costs


def fix_regime(
    predictor: StepLatencyPredictor,
    costs: list[ProgramCost],
    base: ServingConfig,
    length_scale: float = LENGTH_SCALE,
    prompt_scale: float = PROMPT_SCALE,
    rules: RegimeRules = RegimeRules(),
) -> Regime:
    """Derives the regime.

    Args:
        predictor: Of the engine's profile, uncorrected.
        costs: Of the scaled trace.
        base: Configuration of the engine and the scheduler's constants.
        length_scale: That the costs were computed with.
        prompt_scale: Likewise.
        rules: Objectives and slots.
    """
    output = float(np.mean([c.num_output_tokens for c in costs]))
    context = sum(c.decode_context_tokens for c in costs) / sum(c.num_output_tokens for c in costs)
    prefill = PrefillLoad(
        num_chunks=round(np.mean([c.num_prefill_chunks for c in costs])),
        num_tokens=round(np.mean([c.num_prefill_tokens for c in costs])),
        token_context=float(np.mean([c.prefill_token_context for c in costs])),
    )
    single_ms = predictor.predict_step_ms(1, round(context))
    tau_ms = rules.tpot_slo_steps * single_ms
    prefill_ms = predictor.predict_step_ms(1, round(context), prefill) - single_ms
    widest = _widest_step(
        predictor, context, prefill_ms / output, tau_ms, base.scheduler.max_batch_size
    )
    num_slots = rules.max_num_requests or widest
    return Regime(
        length_scale=length_scale,
        prompt_scale=prompt_scale,
        num_requests=len(costs),
        mean_output_tokens=output,
        mean_prefill_tokens=float(prefill.num_tokens),
        mean_context_tokens=context,
        single_step_ms=single_ms,
        tpot_slo_ms=tau_ms,
        ttft_slo_ms=TTFT_SLO_TPOTS * tau_ms,
        max_num_requests=num_slots,
        max_prefill_tokens=_chunk_budget(
            predictor, num_slots, context, CHUNK_STEP_TPOTS * tau_ms, base.engine
        ),
        num_kv_blocks=_kv_pool(costs, num_slots),
        prefill_ms=prefill_ms,
        widest_step=widest,
        reference_rate=1e3 * widest / (tau_ms * output),
    )


def _widest_step(
    predictor: StepLatencyPredictor,
    context: float,
    prefill_ms_per_token: float,
    tau_ms: float,
    max_width: int,
) -> int:
    widths = np.arange(1, max_width + 1)
    total = np.rint(widths * context).astype(np.int64)
    decode_ms = predictor.predict_steps_ms(1, total, PrefillLoad())
    within = decode_ms + widths * prefill_ms_per_token <= tau_ms
    return int(widths[within].max(initial=1))  # T need not be monotone


def _chunk_budget(
    predictor: StepLatencyPredictor,
    num_slots: int,
    context: float,
    limit_ms: float,
    engine: TorchEngineConfig,
) -> int:
    budget = block = engine.tokens_per_block
    while budget < engine.max_seq_len:
        chunk = PrefillLoad(1, budget + block, (budget + block) ** 2 / 2)
        if predictor.predict_step_ms(num_slots, round(num_slots * context), chunk) > limit_ms:
            break
        budget += block
    return budget


def _kv_pool(costs: list[ProgramCost], num_slots: int) -> int:
    footprints = [c.footprint_blocks for c in costs]
    wanted = math.ceil(KV_POOL_FOOTPRINTS * num_slots * float(np.mean(footprints)))
    return max(wanted, max(footprints))


def load_base(path: Path | None) -> ServingConfig:
    """The configuration that a regime is fixed for; the defaults without a file.

    Raises:
        ConfigError: It is wrong, or not one of the embedded engine.
    """
    config = ServingConfig() if path is None else load_config(path)
    embedded(config.engine)
    return config


def regime_of(
    profile: Path,
    base: ServingConfig,
    dataset_path: Path = DEFAULT_TRACE,
    length_scale: float = LENGTH_SCALE,
    prompt_scale: float = PROMPT_SCALE,
    rules: RegimeRules = RegimeRules(),
) -> Regime:
    """The regime of a profile file and a trace file.

    Raises:
        ProfileError: The profile cannot be read.
        TraceError: The trace cannot be read.
    """
    width = max(base.scheduler.max_batch_size, rules.max_num_requests or 1)
    predictor = StepLatencyPredictor(load_profile(profile), width, mode="uncorrected")
    costs = trace_costs(dataset_path, length_scale, prompt_scale, base.limits, base.engine)
    return fix_regime(predictor, costs, base, length_scale, prompt_scale, rules)


def write_config(config: ServingConfig, path: Path) -> None:
    """Writes a serving configuration as YAML."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))


def main() -> int:
    """Prints the regime and writes the configuration of a server."""
    parser = argparse.ArgumentParser(prog="python -m perf.regime", description=__doc__)
    parser.add_argument("--profile", type=Path, required=True, help="latency profile (JSON)")
    parser.add_argument("--config", type=Path, help="base serving configuration (YAML)")
    parser.add_argument("--dataset-path", type=Path, default=DEFAULT_TRACE, help="trace (CSV)")
    parser.add_argument("--length-scale", type=float, default=LENGTH_SCALE, help="%(default)s")
    parser.add_argument("--prompt-scale", type=float, default=PROMPT_SCALE, help="%(default).3g")
    parser.add_argument("--policy", default="taper", help="of the written configuration")
    parser.add_argument("--output", type=Path, help="serving configuration to write")
    arguments = parser.parse_args()
    try:
        base = load_base(arguments.config)
        regime = regime_of(
            arguments.profile,
            base,
            arguments.dataset_path,
            arguments.length_scale,
            arguments.prompt_scale,
        )
    except (ConfigError, ProfileError, ValueError) as error:
        parser.exit(1, f"error: {error}\n")
    print("\n".join(regime.lines()))
    print(json.dumps(asdict(regime), indent=1))
    if arguments.output:
        config = regime.serving_config(base, arguments.policy, arguments.profile)
        write_config(config, arguments.output)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
