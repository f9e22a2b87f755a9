"""Does an engine compute what Hugging Face does, whatever the schedule? For `perf.gpu`.

*Logits*: sequences of mixed lengths, forks among them, are prefilled and decode for some steps in
which random ones are left out. Hugging Face then sees what was decoded (teacher forcing), so every
logit of every step can be compared, however bf16 falls. The reference is Hugging Face in float32.
In a shorter type the engine may be off by `_ERROR_RATIO` times what Hugging Face in that type is
off itself; in float32 by `_FLOAT32_ERROR`, relative to the spread of the logits.

*Deferral*: the same fork-join requests run under several policies. Their tokens must be equal. In a
shorter type a step of another width rounds otherwise, so two tokens that are nearly as likely may
change places: where a branch first differs, the two tokens' logits must be closer than twice the
largest error that was found above, which is what rounding can bridge.
"""

from __future__ import annotations

import gc
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from perf.gpu_model import checked_config, lacks_room
from taper_trtllm.config import SchedulerConfig, TorchEngineConfig
from taper_trtllm.engines.base import PrefillChunk, SequenceParams, StepPlan
from taper_trtllm.engines.checkpoint import Checkpoint, open_checkpoint, random_checkpoint
from taper_trtllm.engines.torch_engine import TorchEngine
from taper_trtllm.executor import TaperExecutor
from taper_trtllm.output import RequestOutput
from taper_trtllm.profile import DecodePoint, LatencyProfile, PrefillPoint
from taper_trtllm.request import (
    Branch,
    ForkJoinRequest,
    ParallelStage,
    RequestLimits,
    SamplingParams,
    SerialStage,
    SloTarget,
)

_ERROR_RATIO = 1.5
_FLOAT32_ERROR = 1e-4
_PROMPT_LENGTHS = (1, 16, 17, 63, 130, 257, 511, 1000)
_FORK_SUFFIXES = (1, 5, 17)  # of forks of the longest prompt
_NUM_STEPS = 16
_POLICIES = ("irp-eager", "irp-off", "fixed-cap:2", "taper:uncorrected")
# What taper is told, and keeps to without corrections: every sequence adds 1 ms to a step, and the
# objective is that of eight. So it defers, on any device.
_PROFILE = LatencyProfile(
    fingerprint={},
    decode=tuple(
        DecodePoint(width=width, context_tokens=context, step_ms=10 + width)
        for width in (1, 64)
        for context in (16, 4096)
    ),
    prefill=(
        PrefillPoint(
            width=1, context_tokens=64, num_chunks=1, num_tokens=128, token_context=8192, step_ms=20
        ),
    ),
)
_SLO = SloTarget(ttft_ms=1e6, tpot_ms=18)

Logits = Callable[[Sequence[int]], torch.Tensor]


def check_correctness(config: TorchEngineConfig) -> dict[str, Any]:
    """Checks float32 and the configuration's own type.

    Returns:
        By type: ``logits`` and ``deferral``; and ``is_passed`` of all. Without transformers, logits
        are not compared, and ``skipped`` says so; nothing is where two models do not fit.
    """
    if reason := lacks_room(config):
        return {"skipped": reason, "is_passed": None}
    checks = {dtype: _check(config, dtype) for dtype in dict.fromkeys(("float32", config.dtype))}
    return {"dtypes": checks, "is_passed": all(check["is_passed"] for check in checks.values())}


def _check(config: TorchEngineConfig, dtype: str) -> dict[str, Any]:
    config = checked_config(config, dtype)
    model_dir = config.model_dir
    checkpoint = (
        random_checkpoint(config.random_model, torch.device(config.device))
        if model_dir is None
        else open_checkpoint(model_dir)
    )
    engine = TorchEngine(config)
    traces = decode_with_deferrals(engine, random.Random(0))
    requests = deferral_requests(engine.capabilities.vocab_size)
    runs = {policy: run_policy(engine, policy, requests) for policy in _POLICIES}
    engine.shutdown()
    try:
        references = _References(checkpoint, config.device)
    except ImportError:
        reason = "transformers is not installed: nothing to compare logits with"
        deferral = [compare_runs(requests, runs, policy, None) for policy in _POLICIES[1:]]
        is_equal = all(not row["num_differing"] for row in deferral)
        return {
            "logits": {"skipped": reason},
            "deferral": deferral,
            "is_passed": is_equal or dtype != "float32",
        }
    logits = compare_logits(traces, references, dtype)
    reference = references.model("float32")
    deferral = [compare_runs(requests, runs, policy, reference) for policy in _POLICIES[1:]]
    largest_gap = max(row["largest_gap"] for row in deferral)
    is_passed = logits["is_passed"] and largest_gap <= 2 * logits["largest_error"]
    return {"logits": logits, "deferral": deferral, "is_passed": bool(is_passed)}


# --------------------------------------------------------------------------------------- logits


@dataclass
class Trace:
    """A sequence that decoded.

    Attributes:
        tokens: All its tokens.
        logits: [vocab] float32 on the CPU, by the position of the token that they are of.
    """

    tokens: list[int]
    logits: dict[int, torch.Tensor] = field(default_factory=dict)


def decode_with_deferrals(engine: TorchEngine, rng: random.Random) -> list[Trace]:
    """Prompts of several lengths and forks of the longest; random ones are left out of steps."""
    vocab_size = engine.capabilities.vocab_size
    traces: dict[int, Trace] = {}

    def random_ids(num: int) -> list[int]:
        return [rng.randrange(vocab_size) for _ in range(num)]

    def record(sequence_ids: Sequence[int], logits: torch.Tensor) -> None:
        for sequence_id, row in zip(sequence_ids, logits.float().cpu(), strict=True):
            traces[sequence_id].logits[len(traces[sequence_id].tokens)] = row.clone()

    def step(plan: StepPlan) -> None:
        for sequence_id, (token,) in engine.step(plan).tokens.items():
            traces[sequence_id].tokens.append(token)

    params = SequenceParams(SamplingParams(ignore_eos=True), seed=0)
    engine.on_logits = record
    for i, length in enumerate(_PROMPT_LENGTHS):
        traces[i] = Trace(random_ids(length))
        engine.add_sequence(i, i, traces[i].tokens, params)
        for part in _parts(length, 128):
            is_last = engine.num_computed_tokens(i) + part == length
            step(StepPlan(prefill=(PrefillChunk(i, part, is_last),)))
    parent = len(_PROMPT_LENGTHS) - 1
    num_shared = engine.num_computed_tokens(parent)
    for child, num_suffix in enumerate(_FORK_SUFFIXES, parent + 1):
        suffix = random_ids(num_suffix)
        traces[child] = Trace([*traces[parent].tokens, *suffix])
        engine.fork_sequence(parent, child, num_shared, suffix, params)
        step(StepPlan(prefill=(PrefillChunk(child, num_suffix + 1, True),)))
    for _ in range(_NUM_STEPS):
        chosen = rng.sample(sorted(traces), rng.randint(1, len(traces)))
        step(StepPlan(tuple(chosen), (1,) * len(chosen)))
    engine.on_logits = None
    for sequence_id in traces:
        engine.release_sequence(sequence_id)
    return list(traces.values())


def _parts(total: int, size: int) -> Iterator[int]:
    while total > 0:
        yield min(size, total)
        total -= size


class _References:
    """Hugging Face's model in several types, one at a time in memory.

    Raises:
        ImportError: transformers is not installed.
    """

    def __init__(self, checkpoint: Checkpoint, device: str) -> None:
        import transformers  # an optional extra

        self._transformers = transformers
        self._checkpoint = checkpoint
        self._device = device

    def model(self, dtype: str) -> Logits:
        """Logits in float32, [tokens, vocab] on the CPU, of a sequence."""
        gc.collect()
        read = self._checkpoint.read
        shape = self._transformers.Qwen3Config(**self._checkpoint.config.to_hf())
        with torch.device(self._device):
            model = self._transformers.AutoModelForCausalLM.from_config(
                shape, dtype=getattr(torch, dtype), attn_implementation="sdpa"
            ).eval()
        is_tied = self._checkpoint.config.tie_word_embeddings
        names = [n for n in model.state_dict() if not (is_tied and n == "lm_head.weight")]
        model.load_state_dict({name: read(name) for name in names}, strict=not is_tied)

        @torch.inference_mode()
        def logits(tokens: Sequence[int]) -> torch.Tensor:
            ids = torch.tensor([tokens], device=self._device)
            computed: torch.Tensor = model(ids).logits[0].float().cpu()
            return computed

        return logits


def compare_logits(traces: Sequence[Trace], references: _References, dtype: str) -> dict[str, Any]:
    """Errors of all recorded logits, in units of the reference's standard deviation."""
    exact = _teacher_forced(traces, references.model("float32"))
    ours = torch.stack([row for trace in traces for row in trace.logits.values()])
    spread = float(exact.std())
    error = float((ours - exact).pow(2).mean().sqrt()) / spread
    bound = _FLOAT32_ERROR
    result: dict[str, Any] = {"reference": "transformers, float32, sdpa"}
    if dtype != "float32":
        theirs = _teacher_forced(traces, references.model(dtype))
        their_error = float((theirs - exact).pow(2).mean().sqrt()) / spread
        bound = _ERROR_RATIO * their_error
        between = float((ours - theirs).pow(2).mean().sqrt()) / spread
        result |= {"transformers_rms_error": their_error, "rms_error_to_transformers": between}
    return {
        **result,
        "num_logit_vectors": len(ours),
        "rms_error": error,
        "bound": bound,
        "largest_error": float((ours - exact).abs().max()),
        "logit_std": spread,
        "same_argmax": float((ours.argmax(-1) == exact.argmax(-1)).float().mean()),
        "is_passed": error <= bound,
    }


def _teacher_forced(traces: Sequence[Trace], logits: Logits) -> torch.Tensor:
    """[recorded, vocab] the reference's logits at every recorded position."""
    rows = []
    for trace in traces:
        computed = logits(trace.tokens)
        rows += [computed[position - 1] for position in trace.logits]
    return torch.stack(rows)


# ------------------------------------------------------------------------------------- deferral


@dataclass
class PolicyRun:
    """What requests got under a policy.

    Attributes:
        tokens: By request, branch path and stage.
        num_deferred: Ready branches that were left out of a step, over all steps.
    """

    tokens: dict[tuple[str, str, int], list[int]]
    num_deferred: int = 0


def deferral_requests(vocab_size: int) -> list[ForkJoinRequest]:
    """Half plain, half with two rounds of branches, of which one forks again."""
    rng = random.Random(1)

    def ids(num: int) -> tuple[int, ...]:
        return tuple(rng.randrange(vocab_size) for _ in range(num))

    def parallel(num: int, nested: ParallelStage | None = None) -> ParallelStage:
        leaves = [Branch(header_ids=ids(2), max_tokens=4 + 2 * i) for i in range(num)]
        if nested is not None:
            inner = (SerialStage(max_tokens=3), nested, SerialStage(max_tokens=2))
            leaves[0] = Branch(header_ids=ids(1), stages=inner)
        return ParallelStage(branches=tuple(leaves), join_ids=ids(1))

    def request(index: int) -> ForkJoinRequest:
        name, prompt = f"request-{index}", ids(8 + 31 * index)
        if index % 2:
            return ForkJoinRequest(request_id=name, input_ids=prompt, max_tokens=24)
        stages = (
            SerialStage(max_tokens=4), parallel(5, parallel(2)),
            SerialStage(max_tokens=3), parallel(3), SerialStage(max_tokens=4),
        )  # fmt: skip
        return ForkJoinRequest(request_id=name, input_ids=prompt, stages=stages)

    return [request(index) for index in range(6)]


def run_policy(engine: TorchEngine, policy: str, requests: Sequence[ForkJoinRequest]) -> PolicyRun:
    """Runs requests to their end; the engine is empty before and after."""
    scheduler = SchedulerConfig(policy=policy, max_batch_size=64, request_admission="slots")
    executor = TaperExecutor(engine, _PROFILE, scheduler, RequestLimits(), _SLO)
    run = PolicyRun(defaultdict(list))

    def take(output: RequestOutput) -> None:
        for branch in output.branches:
            key = output.request_id, branch.branch_path, branch.stage_index
            run.tokens[key] += branch.token_ids
        if output.metrics is not None:
            run.num_deferred += output.metrics.num_deferred_branch_steps

    for request in requests:
        executor.submit(request, take)
    executor.drain()
    return run


def compare_runs(
    requests: Sequence[ForkJoinRequest],
    runs: Mapping[str, PolicyRun],
    policy: str,
    reference: Logits | None,
) -> dict[str, Any]:
    """Stages of branches that had the same context under a policy and the first one.

    Args:
        requests: What ran.
        runs: By policy.
        policy: Compared with the first of them.
        reference: Tells how close two tokens were; None leaves the gap out.
    """
    first = next(iter(runs))
    num_compared = num_differing = 0
    gaps = [0.0]
    for request in requests:
        expected, found = (dict(_stages(request, runs[name].tokens)) for name in (first, policy))
        for key, (context, tokens) in expected.items():
            other_context, others = found[key]
            if other_context != context:
                continue  # behind a difference: another text
            num_compared += 1
            at = next((i for i, t in enumerate(tokens) if t != others[i]), None)
            if at is None:
                continue
            num_differing += 1
            if reference is not None:
                logits = reference([*context, *tokens[:at]])[-1]
                gaps.append(abs(float(logits[tokens[at]] - logits[others[at]])))
    return {
        "policy": policy,
        "compared_with": first,
        "num_compared": num_compared,
        "num_differing": num_differing,
        "largest_gap": None if reference is None else max(gaps),
        "num_deferred": runs[policy].num_deferred,
    }


def _stages(
    request: ForkJoinRequest, outputs: Mapping[tuple[str, str, int], list[int]]
) -> Iterator[tuple[tuple[str, int], tuple[list[int], list[int]]]]:
    """Every serial stage as ((path, stage), (its context, its tokens)), in program order."""

    def walk(
        path: str, context: list[int], program: Sequence[SerialStage | ParallelStage]
    ) -> Iterator[tuple[tuple[str, int], tuple[list[int], list[int]]]]:
        for index, stage in enumerate(program):
            if isinstance(stage, SerialStage):
                tokens = outputs[request.request_id, path, index]
                yield (path, index), (list(context), tokens)
                context += tokens
                continue
            before = list(context)
            for b, branch in enumerate(stage.branches):
                base = f"{path}.{index}.{b}" if path else f"{index}.{b}"
                own = [*before, *branch.header_ids]
                yield from walk(base, own, branch.program)
                context += own[len(before) :]
            context += stage.join_ids

    return walk("", list(request.input_ids), request.program)
