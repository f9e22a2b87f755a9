"""Forks that the model writes: any text it may write, under every policy, against its own rules.

The toy model draws from an alphabet of tags, so most of what it writes is forks, good and bad.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from pathlib import Path

import pytest
import test_trtllm_engine as trtllm
from hypothesis import given
from hypothesis import strategies as st
from merging_toy import Context, MergingEngine
from programs import branch_cancels, requests
from test_executor import (
    SPECS,
    Collector,
    alone,
    fan_out,
    make_executor,
    named,
    property_test,
    run_all,
    run_to_end,
    seed_of,
)  # fmt: skip
from toy_engine import ToyEngine, next_token, toy_profile

from perf.trtllm_fake.decoders import StepOutput
from taper_trtllm.config import ConfigError, SchedulerConfig, ServingConfig, TorchEngineConfig
from taper_trtllm.executor import TaperExecutor
from taper_trtllm.fork_format import BoundForkFormat, ForkFormat, ForkLimits
from taper_trtllm.fork_join import BranchStatus, ForkJoinState
from taper_trtllm.kv_budget import serial_footprint_blocks
from taper_trtllm.output import RequestOutput
from taper_trtllm.request import (
    ForkJoinRequest,
    RequestError,
    RequestLimits,
    SamplingParams,
    SerialStage,
    SloTarget,
    build_request,
)  # fmt: skip
from taper_trtllm.tokenizer import ByteTokenizer
from taper_trtllm.written_forks import WrittenForks

END_ID = ord("$")
ALPHABET = b"((((123123!!!)A)" * 5 + bytes([END_ID])


def fork_format(**changes) -> ForkFormat:
    fields = {
        "name": "toy", "trigger": "!", "scope_open": "(", "outline_pattern": "([123])",
        "branch_end": ")", "separator_first": "%", "separator_next": "/",
        "branch_header": "B{id}:", "join_text": ";J", "forced_close": "#)",
        "limits": ForkLimits(max_depth=2, max_branches=3), "trained_join": "concat",
    }  # fmt: skip
    return ForkFormat(**{**fields, **changes})


FORMATS = {
    "tokens": fork_format(),
    "text": fork_format(trigger="!!", scope_open="((", branch_end="A)", forced_close="A)"),
    "strict": fork_format(
        on_duplicate_ids="finish", on_too_many="first", on_no_outlines="finish",
        limits=ForkLimits(max_depth=1, max_branches=2, max_rounds=1, max_branch_tokens=9),
    ),
    "critical": fork_format(
        on_duplicate_ids="all", separator_next="",
        limits=ForkLimits(max_depth=3, max_branches=3, max_critical_tokens=20),
    ),
}  # fmt: skip


def speak(kv: int, seed: int = 0) -> int:
    return ALPHABET[next_token([kv], seed) % len(ALPHABET)]


class TalkingEngine(MergingEngine):
    """Draws tags more often than a model would."""

    def _say(self, kv: int, seed: int) -> int:
        return speak(kv, seed)


def make_talker(engine: ToyEngine, policy: str, form: ForkFormat, **scheduler) -> TaperExecutor:
    config = SchedulerConfig(policy=policy, max_batch_size=64, **scheduler)
    bound = [BoundForkFormat(form, ByteTokenizer())]
    slo = SloTarget(ttft_ms=200, tpot_ms=8)
    return TaperExecutor(engine, toy_profile(), config, RequestLimits(), slo, fork_formats=bound)


class Alone:
    """One request by the rules of its format, each branch decoded by itself."""

    def __init__(self, request: ForkJoinRequest, form: ForkFormat) -> None:
        self.request, self.form = request, form
        self.outputs: dict[tuple[str, int], list[int]] = {}
        self.refusals: Counter[str] = Counter()
        limit = form.limits.max_critical_tokens
        context = Context().then(request.input_ids)
        self.text, *_ = self.run("", context, [], request.max_tokens, limit, 0)

    def run(self, path, context, header, max_tokens, critical, depth):
        """The branch's own tokens, how it ended, and its context without an end token.

        `critical` decoded tokens at most in a row.
        """
        form, own, stage, num_forks, on_path = self.form, [*header], 0, 0, 0
        context = context.then(header)
        while True:
            left = max_tokens - len(own)
            left = left if critical is None else min(left, critical - on_path)
            new, end, ids = self.stretch(path, context, left, depth, num_forks,
                                         len(own), max_tokens, critical, on_path)  # fmt: skip
            self.outputs[path, stage] = new
            own, on_path = own + new, on_path + len(new)
            context = context.then(new[:-1] if end == "eos" else new)
            if end != "fork":
                return own, (end, on_path), context
            num_forks += 1
            share = self.share(ids, max_tokens - len(own), critical, on_path)
            texts, longest, branches = [], 0, []
            merges = self.request.join_mode == "kv_merge"
            for index, outline in enumerate(ids):
                head = list(f"{form.separator_first}{form.branch_header}".encode())
                head = list(bytes(head).replace(b"{id}", outline.encode()))
                text, (end, count), branch = self.run(
                    f"{path}.{stage + 1}.{index}" if path else f"{stage + 1}.{index}",
                    context, head, len(head) + share,
                    None if critical is None else critical - on_path - 1, depth + 1,
                )  # fmt: skip
                text = text[len(head) :]
                text = text[:-1] if end == "eos" else text
                close = b"" if end == "tag" else form.forced_close.encode()
                as_begun = index == 0 or merges
                between = form.separator_first if as_begun else form.separator_next
                again = (between + form.branch_header).replace("{id}", outline).encode()
                texts += [*again, *text, *close]
                longest = max(longest, count)
                branches.append(branch.then(close))
            join = form.join_text.encode()
            own, on_path = [*own, *texts, *join], on_path + longest
            context = context.merged(branches) if merges else context.then(texts)
            context = context.then(join)
            stage += 2

    def stretch(self, path, context, left, depth, num_forks, num_own, max_tokens, critical, done):
        """Decodes until a tag, the end or the limit; returns tokens, why, and outline ids."""
        form, new, text, unread, scope = self.form, [], "", 0, None
        seed = seed_of(self.request, path) if self.request.sampling.temperature else 0
        while True:
            new.append(speak(context.kv[-1], seed))
            context = context.then(new[-1:])
            text += chr(new[-1])
            may_fork = depth < form.limits.max_depth
            if depth and text[unread:].endswith(form.branch_end):
                return new, "tag", ()
            if may_fork and text[unread:].endswith(form.scope_open):
                unread = scope = len(text)
            elif may_fork and text[unread:].endswith(form.trigger):
                inside = text[scope : -len(form.trigger)] if scope is not None else ""
                unread, scope = len(text), None
                ids = re.findall(form.outline_pattern, inside)
                verdict = self.verdict(ids, num_forks, max_tokens - num_own - len(new), critical,
                                       done + len(new))  # fmt: skip
                if isinstance(verdict, tuple):
                    return new, "fork", verdict
                self.refusals[verdict] += 1
                policy = {"no_outlines": form.on_no_outlines, "too_many_branches": form.on_too_many,
                          "duplicate_ids": form.on_duplicate_ids}.get(verdict)  # fmt: skip
                if policy == "finish":
                    return new, "stopped", ()
            if new[-1] == END_ID:
                return new, "eos", ()
            if len(new) == left:
                return new, "length", ()

    def verdict(self, ids, num_forks, num_left, critical, on_path):
        form = self.form
        if not ids:
            return "no_outlines"
        if len(set(ids)) < len(ids):
            if form.on_duplicate_ids == "finish":
                return "duplicate_ids"
            if form.on_duplicate_ids == "first":
                ids = list(dict.fromkeys(ids))
        if len(ids) > form.limits.max_branches:
            if form.on_too_many != "first":
                return "too_many_branches"
            ids = ids[: form.limits.max_branches]
        if num_forks == form.limits.max_rounds:
            return "too_many_rounds"
        return tuple(ids) if self.share(ids, num_left, critical, on_path) > 0 else "no_budget"

    def share(self, ids, num_left, critical, on_path):
        form = self.form
        first = len(form.separator_first + form.branch_header) - len("{id}") + 1
        joined = len(form.separator_next + form.branch_header) + 3
        given = len(form.join_text) + 1 + len(ids) * (max(first, joined) + len(form.forced_close))
        share = (num_left - given) // (len(ids) + 1)
        if form.limits.max_branch_tokens is not None:
            share = min(share, form.limits.max_branch_tokens)
        return share if critical is None else min(share, critical - on_path - 1)


def decoded(outputs: list[RequestOutput]) -> dict[tuple[str, int], list[int]]:
    tokens: dict[tuple[str, int], list[int]] = {}
    for output in outputs:
        for branch in output.branches:
            if not branch.event:
                tokens.setdefault((branch.branch_path, branch.stage_index), []).extend(
                    branch.token_ids
                )
    return tokens


def check_events(outputs: list[RequestOutput], refusals: Counter[str]) -> None:
    """Every branch begins, then decodes, then ends, then is joined; once each."""
    state: dict[str, str] = {"": "begun"}
    for branch in (b for output in outputs for b in output.branches):
        path, parent = branch.branch_path, branch.branch_path.rpartition(".")[0].rpartition(".")[0]
        match branch.event:
            case "":
                assert state[path] == "begun" and branch.token_ids
            case "stage_started":
                assert state[path] == "begun"
                state[f"{path}/{branch.stage_index}"] = "open"
            case "branch_started":
                assert path not in state and branch.token_ids
                stage = path.rpartition(".")[0].rpartition(".")[2]
                assert state[f"{parent}/{stage}"] == "open"
                state[path] = "begun"
            case "branch_finished":
                assert state[path] == "begun" and branch.finish_reason
                state[path] = "ended"
            case "joined":
                assert state[f"{path}/{branch.stage_index}"] == "open"
                state[f"{path}/{branch.stage_index}"] = "joined"
                below = f"{path}.{branch.stage_index}." if path else f"{branch.stage_index}."
                children = [s for p, s in state.items() if p.startswith(below)]
                assert children and set(children) <= {"ended", "joined"}
            case refused:
                reason = refused.removeprefix("fork_refused:")
                assert reason != refused
                refusals[reason] -= 1
    assert set(state.values()) <= {"begun", "ended", "joined"}
    assert not any(refusals.values())


talks = st.builds(
    lambda prompt, n, warm, name, mode: (
        ForkJoinRequest(
            request_id="r", input_ids=tuple(prompt), max_tokens=n, fork_format="toy", events=True,
            sampling=SamplingParams(end_id=END_ID, temperature=float(warm)), join_mode=mode,
        ),
        name,
    ),
    st.lists(st.integers(0, 96), min_size=1, max_size=12),
    st.one_of(st.integers(1, 100), st.integers(200, 400)), st.booleans(),
    st.sampled_from(list(FORMATS)), st.sampled_from(["concat", "kv_merge"]),
)  # fmt: skip


@property_test
@given(
    drawn=st.lists(talks, min_size=1, max_size=4), name=st.sampled_from(list(FORMATS)),
    policy=st.sampled_from(SPECS), spare=st.integers(0, 60), slots=st.integers(1, 4),
    fraction=st.sampled_from([1.0, 0.5, 0.2]),
)  # fmt: skip
def test_written_forks_equal_their_rules_under_every_schedule(
    drawn, name, policy, spare, slots, fraction
):
    """Rules 4, 5, 7 and 8, with as little memory as the largest request needs alone."""
    form = FORMATS[name]
    batch = [
        talk.model_copy(update={"request_id": f"r{index}"}) for index, (talk, _) in enumerate(drawn)
    ]
    depth = form.limits.max_depth
    footprint = max(
        serial_footprint_blocks(len(r.input_ids), r.program, 4, depth) for r in batch
    )  # fmt: skip
    engine = TalkingEngine(num_kv_blocks=footprint + spare)
    executor = make_talker(
        engine, policy, form, max_num_requests=slots, kv_reserve_fraction=fraction
    )
    collector = run_all(executor, engine, batch)
    for request in batch:
        alone = Alone(request, form)
        outputs = collector.outputs[request.request_id]
        assert outputs[-1].finish_reason == "completed"
        assert decoded(outputs) == alone.outputs
        assert len(alone.text) <= request.max_tokens
        check_events(outputs, alone.refusals)
    assert engine.num_free_blocks == footprint + spare
    assert engine.num_sequences == 0


@property_test
@given(
    drawn=st.lists(requests(depth=2), min_size=1, max_size=3), policy=st.sampled_from(SPECS),
    spare=st.integers(0, 40), fraction=st.sampled_from([1.0, 0.3]), data=st.data(),
)  # fmt: skip
def test_a_join_goes_on_without_cancelled_branches(drawn, policy, spare, fraction, data):
    """Branches are withdrawn at any moment; the rest is what would have been without them."""
    batch = [
        r.model_copy(update={"events": True, "stages": cancellable(r.stages)}) for r in named(drawn)
    ]
    footprint = max(serial_footprint_blocks(len(r.input_ids), r.program, 4) for r in batch)
    engine = ToyEngine(num_kv_blocks=footprint + spare)
    executor = make_executor(engine, policy, max_num_requests=2, kv_reserve_fraction=fraction)
    collector = Collector()
    for request in batch:
        executor.submit(request, collector)
    cancels = data.draw(branch_cancels)
    for step in range(5000):
        for at, index, stage, branch in cancels:
            if at == step:
                executor.cancel_branch(f"r{index}", f"{stage}.{branch}")
                for below in range(3):  # of one that is there, or has just been withdrawn
                    executor.cancel_branch(f"r{index}", f"{stage}.{branch}.0.{below}")
        if not executor.num_open_requests:
            break
        executor.run_once()
        engine.check_integrity()
    for request in batch:
        outputs = collector.outputs[request.request_id]
        assert outputs[-1].finish_reason == "completed"
        entries = [b for output in outputs for b in output.branches]
        ends = {
            b.branch_path: b.finish_reason for b in entries if b.event == "branch_finished"
        }  # fmt: skip
        assert len(ends) == sum(b.event == "branch_finished" for b in entries)
        gone = {path for path, reason in ends.items() if reason == "cancelled"}
        expected = alone(request, gone)
        got = decoded(outputs)
        for key, tokens in expected.items():
            assert got[key] == tokens
        for path, _ in got.keys() - expected.keys():
            assert any(f"{path}.".startswith(f"{g}.") for g in gone)
    assert engine.num_free_blocks == footprint + spare
    assert engine.num_sequences == 0


@property_test
@given(talk=talks, name=st.sampled_from(list(FORMATS)), seed=st.integers(0, 1 << 32))
def test_what_may_still_be_decoded_covers_the_serial_stages(talk, name, seed):
    """Else a request that forks again and again would count as one that cannot be saved."""
    request, _ = talk
    bound = BoundForkFormat(FORMATS[name], ByteTokenizer())
    state = ForkJoinState(request, WrittenForks(bound, request.max_tokens, RequestLimits()))
    rng = random.Random(seed)
    while not state.is_finished:
        assert 0 < state.num_remaining_serial_tokens <= state.num_remaining_tokens
        leaf = rng.choice(state.leaves)
        if leaf.status is BranchStatus.FORKING:
            state.fork(leaf)
        elif leaf.status is BranchStatus.CLOSING:
            state.close(leaf)
        else:
            state.advance(leaf, (rng.choice(ALPHABET),))
    assert state.num_remaining_tokens == state.num_remaining_serial_tokens == 0


def cancellable(stages):
    return stages and tuple(
        stage
        if isinstance(stage, SerialStage)
        else stage.model_copy(
            update={
                "allow_branch_cancel": True,
                "branches": tuple(
                    branch.model_copy(update={"stages": cancellable(branch.stages)})
                    for branch in stage.branches
                ),
            }
        )
        for stage in stages
    )


def test_only_what_the_program_allows_is_cancelled():
    engine = ToyEngine()
    executor = make_executor(engine)
    request, collector = fan_out("r0", 3), Collector()
    executor.submit(request, collector)
    while not any(b.branch_path == "1.0" for o in collector.outputs["r0"] for b in o.branches):
        executor.run_once()
    for path in ("", "1.0", "1.7", "nonsense", "9.9.9"):
        executor.cancel_branch("r0", path)
    executor.cancel_branch("unknown", "1.0")
    run_to_end(executor, engine)
    assert collector.tokens("r0") == alone(request)


def test_formats_are_read_before_the_model(tmp_path):
    """A model may take minutes to load, and a checkpoint that is not there is noticed later."""
    (tmp_path / "formats.yaml").write_text("mine: {base: mine}")
    toy_profile().save(tmp_path / "profile.json")
    config = ServingConfig(
        engine=TorchEngineConfig(model_dir=tmp_path / "nowhere"),
        profile=tmp_path / "profile.json",
        fork_formats=tmp_path / "formats.yaml",
    )
    with pytest.raises(ConfigError, match=r"formats\.yaml: mine\.base: 'mine'"):
        TaperExecutor.from_config(config)


class OddTokenizer(ByteTokenizer):
    """Has a digit outside the model's vocabulary."""

    def encode(self, text, *, add_special_tokens):
        return [200 if i == ord("3") else i for i in super().encode(text, add_special_tokens=False)]


def test_a_fork_that_the_engine_does_not_take_ends_its_request_alone():
    engine, form = TalkingEngine(), FORMATS["tokens"]
    config = SchedulerConfig(max_batch_size=64)
    bound = [BoundForkFormat(form, OddTokenizer())]
    slo = SloTarget(ttft_ms=200, tpot_ms=8)
    executor = TaperExecutor(
        engine, toy_profile(), config, RequestLimits(), slo, fork_formats=bound
    )
    collector = Collector()
    batch = [
        ForkJoinRequest(
            request_id=f"r{i}", input_ids=(i, 7), max_tokens=300, fork_format="toy", events=True,
            sampling=SamplingParams(end_id=END_ID),
        )
        for i in range(20)
    ]  # fmt: skip
    for request in batch:
        executor.submit(request, collector)
    while executor.num_open_requests:
        executor.run_once()
        engine.check_integrity()
    ends = Counter(collector.last(request.request_id).finish_reason for request in batch)
    assert ends.keys() == {"completed", "error"}
    for request in batch:
        last = collector.last(request.request_id)
        if last.finish_reason == "error":
            assert "token ids must be in [0, 97)" in last.error
        else:
            assert decoded(collector.outputs[request.request_id]) == Alone(request, form).outputs
    assert engine.num_sequences == 0 and engine.num_free_blocks == 256


# ----------------------------------------------------------------------------- compiled engines


class TalkingDecoder(trtllm.ToyDecoder):
    """The same on the fake of TensorRT-LLM's executor."""

    def step(self, step):
        output = super().step(step)
        drawn = [speak(Context().then(r.text.tokens).kv[-1]) for r in step.drawing]
        return StepOutput(drawn, output.duration_s)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engine")


def make_lease_talker(engine, policy: str, form: ForkFormat, **scheduler) -> TaperExecutor:
    return make_talker(engine, policy, form, **{"max_prefill_tokens": 64, **scheduler})


@trtllm.property_test
@given(
    drawn=st.lists(talks, min_size=1, max_size=3),
    name=st.sampled_from([name for name in FORMATS if name != "text"]),
    policy=st.sampled_from(SPECS), mode=st.sampled_from(trtllm.MODES),
    lease_tokens=st.integers(1, 12), spare=st.integers(0, 60), fraction=st.sampled_from([1.0, 0.3]),
)  # fmt: skip
def test_places_end_at_tags(path, drawn, name, policy, mode, lease_tokens, spare, fraction):
    """Engines that draw several tokens at a time stop where the model forks, and nowhere else."""
    form = FORMATS[name]
    batch = trtllm.greedy([talk.model_copy(update={"join_mode": "concat"}) for talk, _ in drawn])
    depth = form.limits.max_depth
    footprint = max(serial_footprint_blocks(len(r.input_ids), r.program, 4, depth) for r in batch)
    engine = trtllm.make_engine(
        path, decoder=TalkingDecoder(), num_kv_blocks=footprint + spare, mode=mode,
        lease_tokens=lease_tokens,
    )  # fmt: skip
    executor = make_lease_talker(
        engine, policy, form, max_num_requests=2, kv_reserve_fraction=fraction
    )
    collector = run_all(executor, engine, batch)
    for request in batch:
        expected = Alone(request, form)
        outputs = collector.outputs[request.request_id]
        assert outputs[-1].finish_reason == "completed"
        assert decoded(outputs) == expected.outputs
        check_events(outputs, expected.refusals)
    engine.assert_idle()


def test_formats_that_cannot_be_served_are_refused_by_name(path):
    engine = trtllm.make_engine(path, mode="lease")
    executor = make_lease_talker(engine, "taper", FORMATS["text"])
    request = ForkJoinRequest(request_id="r", input_ids=(1,), max_tokens=5, fork_format="toy")
    with pytest.raises(RequestError, match="'toy' cannot be served: its tags are not single"):
        executor.submit(request)
    with pytest.raises(RequestError, match="fork_format: 'other' is not one of toy"):
        executor.submit(request.model_copy(update={"fork_format": "other"}))
    with pytest.raises(RequestError) as refused:
        executor.submit(request.model_copy(update={"fork_format": "x" * 100_000}))
    assert len(str(refused.value)) < 200
    with pytest.raises(RequestError, match="needs a tokenizer"):
        make_executor(ToyEngine()).submit(request)
    foreign = make_talker(ToyEngine(), "taper", fork_format(join_text="\x7f"))
    with pytest.raises(RequestError, match="tokens outside the vocabulary of 97"):
        foreign.submit(request)
    with pytest.raises(RequestError, match="fork_format: give stages or fork_format, not both"):
        build_request(
            request_id="r",
            input_ids=[1],
            fork_format="toy",
            stages=[{"type": "serial", "max_tokens": 1}],
        )


# --------------------------------------------------------------------------------------- fuzzing


class FuzzEngine(ToyEngine):
    """Draws documents of tags at random: quick, and the same however the step was composed."""

    def _compute(self, plan, decode, chunks, copies):
        self.clock_s += 1e-3
        drawn = {i: self._letter(s) for i, s in zip(plan.decode, decode, strict=True)}
        return drawn | {c.sequence_id: self._letter(c.sequence) for c in chunks if c.sample}

    def _letter(self, sequence) -> int:
        return ALPHABET[hash((sequence.params.seed, len(sequence.tokens))) % len(ALPHABET)]


@pytest.mark.parametrize("name", list(FORMATS))
def test_ten_thousand_documents_end_without_a_leak(name):
    """2500 of each format, a dozen at a time, in little memory; some are cancelled."""
    form = FORMATS[name]
    rng = random.Random(name)
    engine = FuzzEngine(num_kv_blocks=400)
    executor = make_talker(engine, "taper", form, max_num_requests=12, kv_reserve_fraction=0.3)
    collector, num_submitted = Collector(), 0
    while num_submitted < 2500 or executor.num_open_requests:
        while num_submitted < 2500 and executor.num_open_requests < 24:
            executor.submit(
                ForkJoinRequest(
                    request_id=f"r{num_submitted}", input_ids=(1, 2), fork_format="toy",
                    max_tokens=rng.randint(1, 120), events=True,
                    sampling=SamplingParams(end_id=END_ID, seed=num_submitted),
                ),
                collector,
            )  # fmt: skip
            num_submitted += 1
        if rng.random() < 0.02:
            executor.cancel(f"r{rng.randrange(max(0, num_submitted - 20), num_submitted)}")
        assert executor.run_once() is not None
    reasons = Counter(outputs[-1].finish_reason for outputs in collector.outputs.values())
    assert reasons.keys() == {"completed", "cancelled"} and reasons.total() == 2500
    assert any(
        b.event == "joined" for o in collector.outputs.values() for r in o for b in r.branches
    )
    engine.check_integrity()
    assert engine.num_free_blocks == 400 and engine.num_sequences == 0
