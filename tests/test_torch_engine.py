"""The embedded engine against Hugging Face, token for token, and its memory contract."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import expected_outputs, requests
from toy_engine import toy_profile
from transformers import Qwen3Config as HfConfig
from transformers import Qwen3ForCausalLM

from taper_trtllm.config import ConfigError, RandomModelConfig, SchedulerConfig, TorchEngineConfig
from taper_trtllm.engines import cascade_attention, create_engine
from taper_trtllm.engines.base import (
    Engine,
    OutOfBlocksError,
    PrefillChunk,
    SequenceParams,
    StepPlan,
)
from taper_trtllm.engines.checkpoint import random_checkpoint, random_weights
from taper_trtllm.engines.kv_cache import PADDING_BLOCK
from taper_trtllm.engines.qwen3 import Qwen3Config
from taper_trtllm.engines.sampling import draw_tokens
from taper_trtllm.executor import TaperExecutor
from taper_trtllm.output import RequestOutput
from taper_trtllm.request import ForkJoinRequest, RequestLimits, SamplingParams, SloTarget

MODEL = RandomModelConfig(
    hidden_size=64, num_hidden_layers=2, head_dim=16, intermediate_size=96, vocab_size=512, seed=3
)
CONFIG = TorchEngineConfig(
    random_model=MODEL, tokens_per_block=4, num_kv_blocks=2048, max_seq_len=1024
)
GREEDY = SequenceParams(SamplingParams(), seed=0)


@pytest.fixture(scope="module")
def oracle() -> Qwen3ForCausalLM:
    torch.set_num_threads(1)
    return hugging_face_model(MODEL)


def hugging_face_model(random_model: RandomModelConfig) -> Qwen3ForCausalLM:
    shape = random_checkpoint(random_model).config
    model = Qwen3ForCausalLM(HfConfig(**shape.to_hf())).eval()
    model.load_state_dict(random_weights(shape, random_model.seed))
    return model


@pytest.fixture
def engine() -> Engine:
    return create_engine(CONFIG)


MAX_FORKS = 40


def generate(model: Qwen3ForCausalLM, tokens: list[int], n: int) -> list[int]:
    """Independent, unbatched, greedy."""
    output = model.generate(
        torch.tensor([tokens]), max_new_tokens=n, do_sample=False, eos_token_id=None
    )
    return output[0, len(tokens) :].tolist()


def prompt(rng: random.Random, n: int) -> list[int]:
    return [rng.randrange(MODEL.vocab_size) for _ in range(n)]


def decode(engine: Engine, *ids: int) -> dict[int, int]:
    result = engine.step(StepPlan(decode=ids, max_new_tokens=(1,) * len(ids)))
    return {i: token for i, (token,) in result.tokens.items()}


def prefill(engine: Engine, sequence_id: int, num_tokens: int, sample: bool = True) -> list[int]:
    plan = StepPlan(prefill=(PrefillChunk(sequence_id, num_tokens, sample),))
    return list(engine.step(plan).tokens.get(sequence_id, ()))


def run_alone(engine: Engine, sequence_id: int, n: int) -> list[int]:
    """Prefills what is pending and decodes until there are `n` new tokens."""
    pending = engine.num_tokens(sequence_id) - engine.num_computed_tokens(sequence_id)
    tokens = prefill(engine, sequence_id, pending)
    while len(tokens) < n:
        tokens.append(decode(engine, sequence_id)[sequence_id])
    return tokens


# ------------------------------------------------------------------ equality with Hugging Face


@dataclass
class Live:
    """A running sequence: the tokens it was given and those it drew since."""

    given: list[int]
    max_new: int
    parent: int | None = None
    drawn: list[int] = field(default_factory=list)
    children: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        return self.given + self.drawn


class RandomFamilies:
    """Drives one engine through random forks, chunks, gaps, preemptions and joins.

    `runs` collects what was given to a sequence and what it drew from there.
    """

    def __init__(self, engine: Engine, seed: int) -> None:
        self.engine, self.rng = engine, random.Random(seed)
        self.live: dict[int, Live] = {}
        self.runs: list[tuple[list[int], list[int]]] = []
        self.num_preempted = self.num_joined = self.num_orphaned = self.num_recomputed = 0
        self.next_id = 3
        for family in range(3):
            tokens = prompt(self.rng, self.rng.randint(1, 90))
            engine.add_sequence(family, family, tokens, GREEDY)
            self.live[family] = Live(tokens, 12)

    def run(self) -> None:
        while self.live:
            for sequence_id in list(self.live):
                self.change(sequence_id)
            self.step()
            self.engine.check_integrity()

    def pending(self, sequence_id: int) -> int:
        return self.engine.num_tokens(sequence_id) - self.engine.num_computed_tokens(sequence_id)

    def change(self, sequence_id: int) -> None:
        """Forks, joins, preempts or ends a sequence, sometimes."""
        seq = self.live[sequence_id]
        if not seq.children and len(seq.drawn) >= seq.max_new:
            self.end(sequence_id)
        elif seq.children and self.rng.random() < 0.02:
            self.orphan(sequence_id)
        elif self.rng.random() < 0.03:
            self.engine.preempt_sequence(sequence_id)
            self.num_preempted += 1
        elif not seq.children and self.next_id < MAX_FORKS and self.rng.random() < 0.1:
            self.fork(sequence_id)

    def end(self, sequence_id: int) -> None:
        """Joins the family's last child into its parent; releases every other sequence."""
        seq = self.live.pop(sequence_id)
        self.runs.append((seq.given, seq.drawn))
        parent = None if seq.parent is None else self.live[seq.parent]
        if parent is not None:
            parent.children.remove(sequence_id)
        if parent is None or parent.children:
            self.engine.release_sequence(sequence_id)
            return
        if self.rng.random() < 0.3:
            self.engine.preempt_sequence(sequence_id)
        suffix = prompt(self.rng, self.rng.randint(0, 20))
        assert seq.parent is not None
        self.engine.join_sequence(seq.parent, sequence_id, suffix)
        self.runs.append((parent.given, parent.drawn))
        self.live[seq.parent] = Live(seq.tokens + suffix, 5, parent.parent)
        self.num_joined += 1

    def orphan(self, sequence_id: int) -> None:
        """Releases a sequence whose children, and whose parent, live on."""
        seq = self.live.pop(sequence_id)
        self.runs.append((seq.given, seq.drawn))
        self.engine.release_sequence(sequence_id)
        for child in seq.children:
            self.live[child].parent = seq.parent
        if seq.parent is not None:
            siblings = self.live[seq.parent].children
            siblings.remove(sequence_id)
            siblings.extend(seq.children)
        self.num_orphaned += len(seq.children)

    def fork(self, sequence_id: int) -> None:
        seq, engine = self.live[sequence_id], self.engine
        computed = engine.num_computed_tokens(sequence_id)
        for _ in range(self.rng.randint(1, 4)):
            suffix = prompt(self.rng, self.rng.randint(0, 9))
            shared = min(computed, len(seq.tokens) + len(suffix) - 1)
            child, self.next_id = self.next_id, self.next_id + 1
            free = engine.num_free_blocks
            engine.fork_sequence(sequence_id, child, shared, suffix, GREEDY)
            assert engine.num_free_blocks == free
            self.live[child] = Live(seq.tokens + suffix, self.rng.randint(1, 15), sequence_id)
            seq.children.append(child)

    def step(self) -> None:
        """A random subset, decode and chunks together."""
        decoding: list[int] = []
        chunks: list[PrefillChunk] = []
        for sequence_id, seq in self.live.items():
            pending = self.pending(sequence_id)
            if seq.children or len(seq.drawn) >= seq.max_new or self.rng.random() < 0.4:
                continue
            if pending == 1 and self.rng.random() < 0.9:
                decoding.append(sequence_id)
            else:
                n = min(pending, self.rng.choice((1, 3, 8, 30, 100)))
                chunks.append(PrefillChunk(sequence_id, n, n == pending))
        if not decoding and not chunks:
            return
        plan = StepPlan(tuple(decoding), (1,) * len(decoding), tuple(chunks))
        result = self.engine.step(plan)
        drawing = {*decoding, *(c.sequence_id for c in chunks if c.sample)}
        assert set(result.tokens) == drawing
        self.num_recomputed += result.num_recomputed_tokens
        for sequence_id, (token,) in result.tokens.items():
            self.live[sequence_id].drawn.append(token)


def sharing_engine(monkeypatch: pytest.MonkeyPatch, config: TorchEngineConfig = CONFIG) -> Engine:
    """An engine that reads every shared prefix once, however short."""
    monkeypatch.setattr(cascade_attention, "_MIN_SAVED_TOKENS", 0)
    return create_engine(config.model_copy(update={"prefix_sharing_attention": True}))


@pytest.mark.parametrize("shares", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_random_families_equal_unbatched_generation(
    oracle: Qwen3ForCausalLM, monkeypatch: pytest.MonkeyPatch, seed: int, shares: bool
) -> None:
    engine = sharing_engine(monkeypatch) if shares else create_engine(CONFIG)
    families = RandomFamilies(engine, seed)
    families.run()

    assert engine.num_free_blocks == CONFIG.num_kv_blocks
    assert families.num_joined > 3 and families.num_orphaned > 0
    assert families.num_preempted > 10 and families.num_recomputed > 100
    assert len({token for _, drawn in families.runs for token in drawn}) > 50
    for context, drawn in filter(lambda run: run[1], families.runs):
        assert drawn == generate(oracle, context, len(drawn))


# Rule 4, whole: executor, policy and engine together.
@pytest.mark.parametrize(
    ("policy", "shares"),
    [
        ("irp-off", False),
        ("irp-eager", False),
        ("fixed-cap:2", False),
        ("taper", False),
        ("irp-eager", True),
        ("taper", True),
    ],
)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    drawn=st.lists(requests(2), min_size=2, max_size=3), num_kv_blocks=st.sampled_from((250, 2048))
)
def test_programs_under_a_policy_equal_unbatched_generation(
    oracle: Qwen3ForCausalLM,
    policy: str,
    shares: bool,
    drawn: list[ForkJoinRequest],
    num_kv_blocks: int,
) -> None:
    config = CONFIG.model_copy(update={"num_kv_blocks": num_kv_blocks})
    with pytest.MonkeyPatch.context() as monkeypatch:
        engine = sharing_engine(monkeypatch, config) if shares else create_engine(config)
        check_programs(engine, oracle, policy, drawn)


def check_programs(
    engine: Engine, oracle: Qwen3ForCausalLM, policy: str, drawn: list[ForkJoinRequest]
) -> None:
    scheduler = SchedulerConfig(
        policy=policy, max_num_requests=4, max_batch_size=64, max_prefill_tokens=8
    )
    slo = SloTarget(ttft_ms=200, tpot_ms=5)
    executor = TaperExecutor(engine, toy_profile(), scheduler, RequestLimits(), slo)
    streamed: dict[tuple[str, str, int], list[int]] = defaultdict(list)

    def take(output: RequestOutput) -> None:
        assert output.error is None
        for branch in output.branches:
            key = output.request_id, branch.branch_path, branch.stage_index
            streamed[key].extend(branch.token_ids)

    greedy = [
        request.model_copy(
            update={
                "request_id": f"r{i}",
                "sampling": request.sampling.model_copy(update={"temperature": 0.0}),
            }
        )
        for i, request in enumerate(drawn)
    ]
    for request in greedy:
        executor.submit(request, take)
        executor.run_once()
    while executor.num_open_requests:
        executor.run_once()

    assert engine.num_free_blocks == engine.capabilities.num_kv_blocks
    for request in greedy:
        stop_ids = request.sampling.stop_ids

        def alone(
            path: str, context: Sequence[int], n: int, stop_ids: frozenset[int] = stop_ids
        ) -> list[int]:
            new = generate(oracle, list(context), n)
            ends = [i for i, token in enumerate(new) if token in stop_ids]
            return new[: ends[0] + 1] if ends else new

        for (path, stage), tokens in expected_outputs(request, alone).items():
            assert streamed[request.request_id, path, stage] == tokens


def test_branches_read_their_prefix_once(
    oracle: Qwen3ForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, rng = sharing_engine(monkeypatch), random.Random(9)
    prompts = [prompt(rng, 41), prompt(rng, 18)]
    for i, tokens in enumerate(prompts):
        engine.add_sequence(i, i, tokens, GREEDY)
        prefill(engine, i, len(tokens), sample=False)
    headers = {child: prompt(rng, 1 + child % 3) for child in range(2, 9)}
    for child, header in headers.items():
        engine.fork_sequence(child % 2, child, len(prompts[child % 2]), header, GREEDY)
    drawn = {child: prefill(engine, child, len(header)) for child, header in headers.items()}
    read = Counter[int]()
    select = torch.index_select

    def counting_select(source: torch.Tensor, dim: int, index: torch.Tensor, **out: Any) -> Any:
        if source.shape[0] == CONFIG.num_kv_blocks + 1:
            read.update(index.tolist())
        return select(source, dim, index, **out)

    monkeypatch.setattr(torch, "index_select", counting_select)
    for _ in range(5):
        for child, token in decode(engine, *headers).items():
            drawn[child].append(token)

    del read[PADDING_BLOCK]
    assert max(read.values()) == 2 * 5  # once in each layer and step
    for child, tokens in drawn.items():
        assert tokens == generate(oracle, prompts[child % 2] + headers[child], 6)


# ------------------------------------------------------------------ fork and join in detail


def test_a_fork_from_a_pending_token_decodes_at_once(
    engine: Engine, oracle: Qwen3ForCausalLM
) -> None:
    tokens = prompt(random.Random(1), 21)
    engine.add_sequence(0, 0, tokens, GREEDY)
    tokens = tokens + prefill(engine, 0, 21)
    for child in (1, 2):
        engine.fork_sequence(0, child, len(tokens) - 1, (), GREEDY)
    held = engine.num_blocks_held(0)
    assert [engine.num_blocks_needed(i, 1) for i in (0, 1, 2)] == [1, 1, 1]

    result = engine.step(StepPlan(decode=(0, 1, 2), max_new_tokens=(1, 1, 1)))

    assert {token for (token,) in result.tokens.values()} == set(generate(oracle, tokens, 1))
    assert result.num_recomputed_tokens == 0
    assert engine.num_blocks_held(0) == held + 2  # the last holder kept the tail


def test_a_flushed_parent_shares_all_tokens(engine: Engine, oracle: Qwen3ForCausalLM) -> None:
    rng = random.Random(2)
    tokens = prompt(rng, 22)
    engine.add_sequence(0, 0, tokens, GREEDY)
    tokens = tokens + prefill(engine, 0, 22)
    assert prefill(engine, 0, 1, sample=False) == []
    assert engine.num_computed_tokens(0) == 23
    held, headers = engine.num_blocks_held(0), [prompt(rng, 5) for _ in range(3)]
    for child, header in enumerate(headers, start=1):
        engine.fork_sequence(0, child, 23, header, GREEDY)
    assert engine.num_blocks_held(0) == held

    chunks = tuple(PrefillChunk(child, 5, sample=True) for child in (1, 2, 3))
    result = engine.step(StepPlan(prefill=chunks))

    assert result.prefilled == {1: 5, 2: 5, 3: 5} and result.num_recomputed_tokens == 0
    for child, header in enumerate(headers, start=1):
        first = list(result.tokens[child])
        rest = [decode(engine, child)[child] for _ in range(6)]
        assert first + rest == generate(oracle, tokens + header, 7)


def test_preemption_keeps_what_is_shared_and_a_released_parent_leaves_it(
    engine: Engine, oracle: Qwen3ForCausalLM
) -> None:
    rng = random.Random(4)
    tokens, header = prompt(rng, 30), prompt(rng, 9)
    engine.add_sequence(0, 0, tokens, GREEDY)
    prefill(engine, 0, 30, sample=False)
    engine.fork_sequence(0, 1, 30, header, GREEDY)
    drawn = run_alone(engine, 1, 4)
    free = engine.num_free_blocks

    engine.preempt_sequence(1)

    assert engine.num_free_blocks == free + 4  # 42 tokens with KV in blocks of 4; 7 blocks stay
    assert engine.num_computed_tokens(1) == 28 and engine.num_tokens(1) == 43
    engine.release_sequence(0)
    engine.check_integrity()
    assert engine.num_blocks_held(0) == 7
    result = engine.step(StepPlan(prefill=(PrefillChunk(1, 15, sample=True),)))
    assert result.num_recomputed_tokens == 14
    drawn += result.tokens[1]
    assert drawn == generate(oracle, tokens + header, 5)


@pytest.mark.parametrize("preempted", [False, True])
def test_join_takes_a_partly_computed_child(
    engine: Engine, oracle: Qwen3ForCausalLM, preempted: bool
) -> None:
    rng = random.Random(5)
    tokens, header, suffix = prompt(rng, 18), prompt(rng, 11), prompt(rng, 7)
    engine.add_sequence(0, 0, tokens, GREEDY)
    prefill(engine, 0, 18, sample=False)
    engine.fork_sequence(0, 1, 18, header, GREEDY)
    prefill(engine, 1, 6, sample=False)
    if preempted:
        engine.preempt_sequence(1)

    engine.join_sequence(0, 1, suffix)

    engine.check_integrity()
    assert engine.num_computed_tokens(0) == (18 if preempted else 24)
    assert run_alone(engine, 0, 6) == generate(oracle, tokens + header + suffix, 6)
    with pytest.raises(KeyError):
        engine.num_tokens(1)


def test_join_refuses_a_stranger(engine: Engine) -> None:
    engine.add_sequence(0, 0, [1, 2], GREEDY)
    engine.add_sequence(1, 0, [2, 1, 3], GREEDY)
    with pytest.raises(ValueError, match="sequence 1 does not begin with the tokens of 0"):
        engine.join_sequence(0, 1, ())


# ------------------------------------------------------------------ sampling


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.7, top_k=20),
        SamplingParams(temperature=1.3, top_p=0.8),
        SamplingParams(temperature=1.1, top_k=200, top_p=0.9),
    ],
)
def test_draws_do_not_depend_on_the_schedule(sampling: SamplingParams) -> None:
    rng = random.Random(6)
    prompts = [prompt(rng, rng.randint(3, 60)) for _ in range(6)]
    params = [SequenceParams(sampling, seed=i // 2) for i in range(6)]

    def run(gap: float) -> list[list[int]]:
        engine, outputs = create_engine(CONFIG), [list[int]() for _ in prompts]
        for i, tokens in enumerate(prompts):
            engine.add_sequence(i, i, tokens, params[i])
            outputs[i] += prefill(engine, i, len(tokens))
        while any(len(output) < 20 for output in outputs):
            ids = [i for i, o in enumerate(outputs) if len(o) < 20 and rng.random() >= gap]
            if ids:
                for i, token in decode(engine, *ids).items():
                    outputs[i].append(token)
        return outputs

    outputs = run(gap=0.0)
    assert run(gap=0.6) == outputs
    assert len({tuple(output) for output in outputs}) == len(outputs)


def test_draws_follow_the_filtered_distribution() -> None:
    logits = torch.tensor([[2.0, 1.5, 1.0, 0.0, -1.0]]).repeat(20000, 1)
    # After top-k 4, 0.47 + 0.29 < 0.9 <= 0.47 + 0.29 + 0.17: three candidates remain.
    sampling = SamplingParams(temperature=1.0, top_k=4, top_p=0.9)
    tokens = draw_tokens(logits, [SequenceParams(sampling, seed=9)] * 20000, range(20000))
    counts = torch.bincount(torch.tensor(tokens), minlength=5)
    expected = logits[0, :3].softmax(dim=-1) * 20000
    assert counts[3:].sum() == 0
    # Chi-squared with 2 degrees of freedom; the draws are fixed by the seed.
    assert ((counts[:3] - expected) ** 2 / expected).sum() < 9.2


# ------------------------------------------------------------------ memory and limits


def test_out_of_blocks_changes_nothing(oracle: Qwen3ForCausalLM) -> None:
    engine = create_engine(CONFIG.model_copy(update={"num_kv_blocks": 12}))
    rng = random.Random(7)
    first, second = prompt(rng, 30), prompt(rng, 17)
    engine.add_sequence(0, 0, first, GREEDY)
    engine.add_sequence(1, 1, second, GREEDY)
    drawn = prefill(engine, 0, 30)
    too_much = StepPlan(decode=(0,), max_new_tokens=(1,), prefill=(PrefillChunk(1, 17, True),))
    before = [(engine.num_tokens(i), engine.num_computed_tokens(i)) for i in (0, 1)]

    with pytest.raises(OutOfBlocksError, match="needs 5 KV blocks, 4 are free"):
        engine.step(too_much)

    assert [(engine.num_tokens(i), engine.num_computed_tokens(i)) for i in (0, 1)] == before
    assert engine.num_free_blocks == 4
    engine.check_integrity()
    drawn += [decode(engine, 0)[0] for _ in range(2)]
    assert drawn == generate(oracle, first, 3)
    engine.release_sequence(0)
    assert run_alone(engine, 1, 4) == generate(oracle, second, 4)
    engine.release_sequence(1)
    assert engine.num_free_blocks == 12


def test_wrong_calls_are_refused_before_anything_changes(engine: Engine) -> None:
    engine.add_sequence(0, 0, [1, 2, 3], GREEDY)
    plans = {
        "4 tokens of 3 pending": StepPlan(prefill=(PrefillChunk(0, 4, sample=False),)),
        "3 tokens are pending, so it cannot draw": StepPlan(decode=(0,), max_new_tokens=(1,)),
        "in the plan twice": StepPlan(prefill=(PrefillChunk(0, 1, False),) * 2),
        "takes 1..512 sequences, not 0": StepPlan(),
    }
    for message, plan in plans.items():
        with pytest.raises(ValueError, match=message):
            engine.step(plan)
    with pytest.raises(ValueError, match="sequence 0 exists already"):
        engine.add_sequence(0, 0, [1], GREEDY)
    with pytest.raises(ValueError, match=r"token ids must be in \[0, 512\)"):
        engine.add_sequence(1, 0, [512], GREEDY)
    with pytest.raises(ValueError, match=r"1025 tokens, must be 1\.\.1024"):
        engine.fork_sequence(0, 1, 0, [1] * 1022, GREEDY)
    assert engine.num_computed_tokens(0) == 0
    engine.check_integrity()


# ------------------------------------------------------------------ checkpoints


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("max_shard_size", ["5GB", "100KB"])
def test_checkpoint_round_trip(tmp_path: Path, tied: bool, max_shard_size: str) -> None:
    torch.manual_seed(0)
    shape = {**random_checkpoint(MODEL).config.to_hf(), "tie_word_embeddings": tied}
    model = Qwen3ForCausalLM(HfConfig(**shape, initializer_range=0.15)).eval()
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / "model.safetensors").exists() == (max_shard_size == "5GB")

    engine = create_engine(CONFIG.model_copy(update={"model_dir": tmp_path}))

    tokens = prompt(random.Random(8), 40)
    engine.add_sequence(0, 0, tokens, GREEDY)
    assert run_alone(engine, 0, 12) == generate(model, tokens, 12)


@pytest.mark.parametrize(
    ("name", "num_billions"),  # 0.6b ties its embeddings; ours never does: 0.16 more
    [("qwen3-0.6b", 0.752), ("qwen3-8b", 8.191), ("qwen3-32b", 32.762)],
)
def test_named_shapes_have_the_published_size(name: str, num_billions: float) -> None:
    config = TorchEngineConfig.model_validate({"random_model": name})
    shape = random_checkpoint(config.random_model).config
    with torch.device("meta"):
        model = Qwen3ForCausalLM(HfConfig(**shape.to_hf()))
    num_parameters = sum(p.numel() for p in model.parameters())
    assert num_parameters / 1e9 == pytest.approx(num_billions, abs=1e-3)


def test_config_json_of_transformers_4_and_5() -> None:
    new = random_checkpoint(MODEL).config.to_hf() | {"rope_theta": None}
    old = {k: v for k, v in new.items() if k != "rope_parameters"}
    old |= {"rope_theta": 1e6, "rope_scaling": None, "use_sliding_window": False}
    assert Qwen3Config.from_hf(old) == Qwen3Config.from_hf(new)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type 'llama' is not supported"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type 'yarn' is not supported"),
        ({"rope_scaling": {"type": "linear"}, "rope_parameters": None}, "rope_type 'linear'"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ],
)
def test_unsupported_checkpoints_are_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Qwen3Config.from_hf(random_checkpoint(MODEL).config.to_hf() | change)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_named() -> None:
    with pytest.raises(ConfigError, match=r"engine.device: torch .* finds no GPU here"):
        create_engine(CONFIG.model_copy(update={"device": "cuda"}))


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"model_dir": tmp_path})
    with pytest.raises(ConfigError, match=r"engine.model_dir: cannot read .*config\.json"):
        create_engine(config)
