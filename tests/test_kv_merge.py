"""Joins that merge KV: every schedule, memory and interruption, against each branch by itself."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from merging_toy import Context, MergingEngine, alone
from programs import branch_cancels, requests
from test_executor import (
    SPECS,
    Collector,
    make_executor,
    named,
    property_test,
    run_all,
    run_to_end,
    seed_of,
)
from test_written_forks import FORMATS, cancellable, decoded, make_talker
from toy_engine import ToyEngine, next_token

from taper_trtllm.engines.base import PrefillChunk, SequenceParams, SequencePiece, StepPlan
from taper_trtllm.kv_budget import serial_footprint_blocks
from taper_trtllm.request import (
    Branch,
    ForkJoinRequest,
    ParallelStage,
    RequestError,
    SamplingParams,
    SerialStage,
)
from taper_trtllm.token_spans import Span, Spans

SPARE = st.one_of(st.integers(0, 3), st.integers(0, 40))
JOIN_MODES = st.sampled_from(["kv_merge", "kv_merge", "concat"])


def with_join_text(stages):
    """Every parallel stage has some: `kv_merge` asks for it."""
    return stages and tuple(
        stage
        if isinstance(stage, SerialStage)
        else ParallelStage(
            branches=tuple(
                branch.model_copy(update={"stages": with_join_text(branch.stages)})
                for branch in stage.branches
            ),
            join_ids=stage.join_ids or (9,),
        )
        for stage in stages
    )


def merging(drawn: list[ForkJoinRequest], modes: list[str]) -> list[ForkJoinRequest]:
    return [
        r.model_copy(
            update={"stages": with_join_text(r.stages), "join_mode": modes[i % len(modes)]}
        )
        for i, r in enumerate(named(drawn))
    ]


def footprint_of(batch: list[ForkJoinRequest]) -> int:
    return max(serial_footprint_blocks(len(r.input_ids), r.program, 4) for r in batch)


@property_test
@given(
    drawn=st.lists(requests(), min_size=1, max_size=5),
    modes=st.lists(JOIN_MODES, min_size=1, max_size=3),
    policy=st.sampled_from(SPECS),
    spare=SPARE,
    fraction=st.sampled_from([1.0, 0.5, 0.2, 0.1]),
    prefill=st.sampled_from([1, 3, 16]),
    slots=st.integers(1, 4),
)
def test_merged_branches_equal_independent_generation_under_every_schedule(
    drawn, modes, policy, spare, fraction, prefill, slots
):
    """Rules 4, 5, 7, 8, with as little memory as the largest request needs alone."""
    batch = merging(drawn, modes)
    footprint = footprint_of(batch)
    engine = MergingEngine(num_kv_blocks=footprint + spare)
    executor = make_executor(
        engine,
        policy,
        max_num_requests=slots,
        max_prefill_tokens=prefill,
        kv_reserve_fraction=fraction,
    )
    collector = run_all(executor, engine, batch)
    for request in batch:
        last = collector.last(request.request_id)
        assert last.finish_reason == "completed"
        assert last.metrics.join_mode == request.join_mode
        assert collector.tokens(request.request_id) == alone(request, seed_of)
    assert engine.num_free_blocks == footprint + spare
    assert engine.num_sequences == 0


@property_test
@given(
    drawn=st.lists(requests(depth=2), min_size=1, max_size=3),
    policy=st.sampled_from(SPECS),
    spare=SPARE,
    fraction=st.sampled_from([1.0, 0.3]),
    data=st.data(),
)
def test_a_merge_goes_on_without_cancelled_branches(drawn, policy, spare, fraction, data):
    """Branches and requests are withdrawn at any moment; no block is lost."""
    batch = [
        r.model_copy(update={"events": True, "stages": cancellable(r.stages)})
        for r in merging(drawn, ["kv_merge"])
    ]
    footprint = footprint_of(batch)
    engine = MergingEngine(num_kv_blocks=footprint + spare)
    executor = make_executor(engine, policy, max_num_requests=2, kv_reserve_fraction=fraction)
    collector = Collector()
    for request in batch:
        executor.submit(request, collector)
    cancels = data.draw(branch_cancels)
    ends = dict(data.draw(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 2)), max_size=1)))
    for step in range(5000):
        for at, index, stage, branch in cancels:
            if at == step:
                executor.cancel_branch(f"r{index}", f"{stage}.{branch}")
                executor.cancel_branch(f"r{index}", f"{stage}.{branch}.0.0")
        if step in ends:
            executor.cancel(f"r{ends[step]}")
        if not executor.num_open_requests:
            break
        executor.run_once()
        engine.check_integrity()
    for request in batch:
        outputs = collector.outputs[request.request_id]
        if outputs[-1].finish_reason == "cancelled":
            continue
        assert outputs[-1].finish_reason == "completed"
        gone = {
            b.branch_path
            for output in outputs
            for b in output.branches
            if b.event == "branch_finished" and b.finish_reason == "cancelled"
        }
        expected, got = alone(request, seed_of, gone), decoded(outputs)
        assert {key: got[key] for key in expected} == expected
        for path, _ in got.keys() - expected.keys():
            assert any(f"{path}.".startswith(f"{g}.") for g in gone)
    assert engine.num_free_blocks == footprint + spare
    assert engine.num_sequences == 0


def test_merged_kv_is_never_found_by_its_tokens_alone():
    """A plain request with the very tokens of a merged sequence, beside it: KV of its own."""
    stages = (
        ParallelStage(
            branches=tuple(Branch(header_ids=(i,), max_tokens=5) for i in range(3)), join_ids=(7,)
        ),
        SerialStage(max_tokens=30),
    )
    merges = ForkJoinRequest(
        request_id="merges", input_ids=(1, 2, 3), stages=stages, join_mode="kv_merge"
    )
    engine, collector = MergingEngine(), Collector()
    executor = make_executor(engine, "irp-eager")
    executor.submit(merges, collector)
    while ("", 1) not in collector.tokens("merges"):
        executor.run_once()
    (running,) = executor._running
    text = (*merges.input_ids, *running.state.root.tokens)
    plain = ForkJoinRequest(request_id="plain", input_ids=text, max_tokens=9)
    num_drawn = len(collector.tokens("merges")["", 1])
    executor.submit(plain, collector)
    run_to_end(executor, engine)
    for request in (plain, merges):
        assert collector.tokens(request.request_id) == alone(request, seed_of)
    went_on = collector.tokens("merges")["", 1][num_drawn:]
    assert collector.tokens("plain")["", 0] != went_on[:9]


# ------------------------------------------------------------------------------ the engine's part

PARAMS = SequenceParams(SamplingParams(), seed=0)


def compute(engine: MergingEngine, sequence_id: int, num_tokens: int, sample: bool = False):
    result = engine.step(StepPlan(prefill=(PrefillChunk(sequence_id, num_tokens, sample),)))
    return result.tokens.get(sequence_id)


def branches(engine: MergingEngine, *lengths: int) -> list[SequencePiece]:
    """A prefix of six tokens, and children 1, 2, ... with so many of their own, all computed."""
    engine.add_sequence(0, 0, range(6), PARAMS)
    compute(engine, 0, 5)
    pieces = []
    for child, length in enumerate(lengths, start=1):
        engine.fork_sequence(0, child, 5, [10 * child + i for i in range(length)], PARAMS)
        compute(engine, child, 1 + length)
        pieces.append(SequencePiece(child, 6 if pieces else 0, 6 + length))
    return pieces


SPANS: Spans = (Span(), Span(9, 3, ((6, 9),)), Span(14, 8, ((6, 14),)), Span(15, 4))
"""Of a prefix of 6 and branches of 3, 5 and 1: the longest ends at position 11."""


def test_a_merged_sequence_that_is_preempted_is_computed_again_as_it_was():
    engine = MergingEngine(num_kv_blocks=64)
    pieces = branches(engine, 3, 5, 1)
    engine.assemble_sequence(0, pieces, (50, 51), SPANS)
    engine.check_integrity()
    assert engine.num_computed_tokens(0) == 15 and engine.num_blocks_held(0) == 4
    before = Context().then(range(6))
    begun = [
        before.then([10 * child + i for i in range(n)]) for child, n in enumerate((3, 5, 1), 1)
    ]
    whole = before.merged(begun).then((50, 51))
    expected = next_token(whole.kv[-1:])
    assert compute(engine, 0, 2, sample=True) == (expected,)

    engine.preempt_sequence(0)
    assert engine.num_computed_tokens(0) == 0
    for chunk in (5, 5, 5):  # across the borders of branches
        compute(engine, 0, chunk)
    assert compute(engine, 0, 3, sample=True) == (next_token(whole.then([expected]).kv[-1:]),)


@pytest.mark.parametrize("dropped", [1, 2, 3])
def test_what_a_dropped_branch_lacks_is_computed_in_the_merged_sequence(dropped):
    engine = MergingEngine(num_kv_blocks=64)
    pieces = branches(engine, 3, 5, 1)
    engine.preempt_sequence(dropped)
    engine.assemble_sequence(0, pieces, (50, 51), SPANS)
    engine.check_integrity()
    assert engine.num_computed_tokens(0) == {1: 5, 2: 9, 3: 14}[dropped]
    num_pending = engine.num_tokens(0) - engine.num_computed_tokens(0)
    intact = MergingEngine(num_kv_blocks=64)
    intact.assemble_sequence(0, branches(intact, 3, 5, 1), (50, 51), SPANS)
    assert compute(engine, 0, num_pending, True) == compute(intact, 0, 2, True)


def test_a_merge_needs_no_block_that_is_free_and_spares_what_others_hold():
    engine = MergingEngine(num_kv_blocks=8)
    pieces = branches(engine, 3, 5, 1)
    assert engine.num_free_blocks == 1
    engine.add_sequence(9, 9, range(4), PARAMS)
    compute(engine, 9, 4)
    assert engine.num_free_blocks == 0
    engine.assemble_sequence(0, pieces, (50,), SPANS)
    engine.check_integrity()
    assert engine.num_computed_tokens(0) == 15 and engine.num_free_blocks == 3

    engine = MergingEngine()
    pieces = branches(engine, 3, 5)
    engine.fork_sequence(1, 9, 9, (), PARAMS)
    with pytest.raises(ValueError, match="shared"):
        engine.assemble_sequence(0, pieces, (50,), SPANS)
    assert engine.num_tokens(0) == 6 and engine.num_sequences == 4
    engine.check_integrity()


# ------------------------------------------------------------------------------ what is refused


def test_requests_that_cannot_be_merged_are_refused_by_field():
    inner = ParallelStage(branches=(Branch(max_tokens=1),))
    outer = ParallelStage(
        branches=(Branch(stages=(inner, SerialStage(max_tokens=1))),), join_ids=(1,)
    )
    fields = {"request_id": "r", "input_ids": (1,), "join_mode": "kv_merge"}
    executor = make_executor(MergingEngine())
    with pytest.raises(RequestError, match=r"stages\[0\].branches\[0\].stages\[0\].join_ids: req"):
        executor.submit(ForkJoinRequest(**fields, stages=(outer,)))
    with pytest.raises(RequestError, match=r"join_mode: 'kv_merge' is not supported by .* 'toy'"):
        make_executor(ToyEngine()).submit(ForkJoinRequest(**fields, max_tokens=3))
    silent = FORMATS["tokens"].model_copy(update={"join_text": ""})
    talker = make_talker(MergingEngine(), "taper", silent)
    with pytest.raises(RequestError, match="join_mode: 'kv_merge' needs a join text, 'toy' has"):
        talker.submit(ForkJoinRequest(**fields, max_tokens=50, fork_format="toy"))
