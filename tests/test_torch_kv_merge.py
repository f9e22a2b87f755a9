"""Merged KV of the embedded engine against one dense forward of the whole text.

The text of a request, all branches included, goes through Hugging Face's model once, with the mask
and positions that models which merge are trained with: a branch sees what was before the fork and
itself, all branches of a fork begin at the same position, and what follows them sees everything and
stands right behind the longest.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from programs import requests
from reference_attention import ReferenceAttention
from test_executor import seed_of
from test_kv_merge import merging
from test_torch_engine import CONFIG, oracle
from toy_engine import toy_profile
from transformers import Qwen3ForCausalLM

from taper_trtllm.config import SchedulerConfig
from taper_trtllm.engines import bucket_batch, cascade_attention
from taper_trtllm.engines.torch_engine import TorchEngine
from taper_trtllm.executor import TaperExecutor
from taper_trtllm.kv_budget import serial_footprint_blocks
from taper_trtllm.output import RequestOutput
from taper_trtllm.request import (
    Branch,
    ForkJoinRequest,
    ParallelStage,
    RequestLimits,
    SerialStage,
    SloTarget,
)

__all__ = ["oracle"]

TOLERANCE = 1e-4  # of logits of about 1 to 10, fp32

Drawn = dict[tuple[str, int], list[int]]


@dataclass
class TrainingText:
    """All tokens of a request in a row, with position and mask, and who was drawn from what."""

    request: ForkJoinRequest
    drawn: Drawn
    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    seen: list[list[int]] = field(default_factory=list)
    sources: list[tuple[str, int, int]] = field(default_factory=list)  # path, from, token

    def __post_init__(self) -> None:
        visible, position = self._write([], 0, self.request.input_ids)
        self._run("", visible, position, self.request.program)

    def _write(self, visible: list[int], position: int, tokens) -> tuple[list[int], int]:
        for token in tokens:
            visible = [*visible, len(self.tokens)]
            self.tokens.append(token)
            self.positions.append(position)
            self.seen.append(visible)
            position += 1
        return visible, position

    def _run(self, path: str, visible: list[int], position: int, program):
        for index, stage in enumerate(program):
            if isinstance(stage, SerialStage):
                for token in self.drawn[path, index]:
                    self.sources.append((path, visible[-1], token))
                    visible, position = self._write(visible, position, [token])
                continue
            base = f"{path}.{index}" if path else str(index)
            everything, rightmost = visible, position
            for number, branch in enumerate(stage.branches):
                begun = self._write(visible, position, branch.header_ids)
                inside, end = self._run(f"{base}.{number}", *begun, branch.program)
                everything, rightmost = [*everything, *inside[len(visible) :]], max(rightmost, end)
            visible, position = self._write(everything, rightmost, stage.join_ids)
        return visible, position

    def logits(self, model: Qwen3ForCausalLM) -> torch.Tensor:
        """[tokens, vocab]."""
        mask = torch.full((len(self.tokens), len(self.tokens)), -torch.inf)
        for row, columns in enumerate(self.seen):
            mask[row, columns] = 0.0
        with torch.inference_mode():
            return model(
                input_ids=torch.tensor([self.tokens]),
                position_ids=torch.tensor([self.positions]),
                attention_mask=mask[None, None],
            ).logits[0]


KINDS = ["flat", "flat, shared prefixes", "fixed shapes", "fixed shapes, shared prefixes"]
"""Ways in which the engine computes a step; on a GPU it has fixed shapes."""


def make_engine(kind: str, num_kv_blocks: int) -> TorchEngine:
    shares = kind.endswith("shared prefixes")
    update = {"num_kv_blocks": num_kv_blocks, "prefix_sharing_attention": shares}
    attention = ReferenceAttention() if kind.startswith("fixed") else None
    return TorchEngine(CONFIG.model_copy(update=update), attention)


@pytest.fixture(autouse=True)
def share_short_prefixes(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (cascade_attention, bucket_batch):
        monkeypatch.setattr(module, "_MIN_SAVED_TOKENS", 0)


def run(engine: TorchEngine, batch: list[ForkJoinRequest], policy: str, **scheduler):
    """Tokens by request, logits of every draw by seed, and the final metrics."""
    num_kv_blocks = engine.num_free_blocks
    config = SchedulerConfig(
        policy=policy, **{"max_batch_size": 64, "max_prefill_tokens": 8, **scheduler}
    )
    slo = SloTarget(ttft_ms=200, tpot_ms=5)
    executor = TaperExecutor(engine, toy_profile(), config, RequestLimits(), slo)
    drawn: dict[str, Drawn] = defaultdict(lambda: defaultdict(list))
    metrics = {}

    def take(output: RequestOutput) -> None:
        assert output.error is None
        for branch in output.branches:
            key = branch.branch_path, branch.stage_index
            drawn[output.request_id][key].extend(branch.token_ids)
        if output.metrics is not None:
            metrics[output.request_id] = output.metrics

    logits: dict[int, list[torch.Tensor]] = defaultdict(list)

    def keep(sequence_ids, rows) -> None:
        for sequence_id, row in zip(sequence_ids, rows, strict=True):
            logits[engine._sequences[sequence_id].params.seed].append(row.clone())

    engine.on_logits = keep
    for request in batch:
        executor.submit(request, take)
    while executor.num_open_requests:
        executor.run_once()
        engine.check_integrity()
    assert engine.num_free_blocks == num_kv_blocks
    return drawn, logits, metrics


def check(model: Qwen3ForCausalLM, request: ForkJoinRequest, drawn: Drawn, logits) -> None:
    text = TrainingText(request, drawn)
    expected = text.logits(model)
    by_path: dict[str, list[torch.Tensor]] = defaultdict(list)
    for path, source, token in text.sources:
        assert expected[source].argmax() == token, (path, source)
        by_path[path].append(expected[source])
    for path, rows in by_path.items():
        got = torch.stack(logits[seed_of(request, path)])
        assert (got - torch.stack(rows)).abs().max() < TOLERANCE, path


def merged_request(*stages, prompt: int = 21) -> ForkJoinRequest:
    return ForkJoinRequest(
        request_id="r0", input_ids=tuple(range(5, 5 + prompt)), stages=stages, join_mode="kv_merge"
    )


def parallel(*branches: Branch, join=(7, 8)) -> ParallelStage:
    return ParallelStage(branches=branches, join_ids=join)


def branch(header: int, num_tokens: int, *stages) -> Branch:
    header_ids = tuple(range(100 + header, 100 + 2 * header))
    body = {"stages": (SerialStage(max_tokens=num_tokens), *stages)} if stages else {}
    return Branch(header_ids=header_ids, **(body or {"max_tokens": num_tokens}))


CASES = {
    "unequal lengths over partial blocks": merged_request(
        SerialStage(max_tokens=6),
        parallel(branch(3, 9), branch(1, 2), branch(5, 17), branch(0, 1)),
        SerialStage(max_tokens=12),
    ),
    "two rounds": merged_request(
        parallel(branch(2, 5), branch(3, 11)),
        SerialStage(max_tokens=5),
        parallel(branch(1, 13), branch(2, 4), branch(4, 7), join=(9,)),
        SerialStage(max_tokens=12),
        prompt=16,
    ),
    "nested, and one fork behind another": merged_request(
        SerialStage(max_tokens=3),
        parallel(
            branch(2, 4),
            branch(
                1, 3, parallel(branch(2, 9), branch(3, 2), branch(1, 5)), SerialStage(max_tokens=6)
            ),
            branch(2, 2, parallel(branch(1, 3), branch(1, 12))),
        ),
        parallel(branch(1, 6), branch(2, 8)),
        SerialStage(max_tokens=12),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("policy", ["irp-off", "irp-eager"])
@pytest.mark.parametrize("name", CASES)
def test_merged_kv_equals_a_dense_forward_with_the_training_mask(oracle, name, policy, kind):
    request = CASES[name]
    drawn, logits, metrics = run(make_engine(kind, 512), [request], policy, prefill_chunking="full")
    check(oracle, request, drawn["r0"], logits)
    assert metrics["r0"].num_recomputed_tokens == 0  # no branch was computed again for its join
    forks = [s for s in request.stages if isinstance(s, ParallelStage)]
    assert metrics["r0"].num_joined_tokens < 4 * (len(forks) + 2)  # join texts alone


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("policy", ["irp-eager", "taper"])
@settings(max_examples=8, deadline=None, derandomize=True, phases=(Phase.generate,))
@given(drawn=st.lists(requests(2), min_size=1, max_size=3), spare=st.integers(0, 12))
def test_programs_in_little_memory_equal_a_dense_forward(oracle, policy, kind, drawn, spare):
    """Branches and merged sequences that are dropped are computed again as they were."""
    batch = [
        r.model_copy(
            update={"sampling": r.sampling.model_copy(update={"temperature": 0.0, "seed": i})}
        )
        for i, r in enumerate(merging(drawn, ["kv_merge"]))
    ]
    footprint = max(serial_footprint_blocks(len(r.input_ids), r.program, 4) for r in batch)
    streamed, logits, _ = run(
        make_engine(kind, footprint + spare), batch, policy, kv_reserve_fraction=0.4
    )
    for request in batch:
        check(oracle, request, streamed[request.request_id], logits)
