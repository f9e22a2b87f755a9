"""Joins that merge KV: every schedule, memory and interruption, against each branch by itself."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from merging_toy import MergingEngine, alone
from programs import requests
from test_executor import (
    SPECS,
    Collector,
    make_executor,
    named,
    property_test,
    run_to_end,
    seed_of,
)
from test_written_forks import cancellable, decoded

from taper_trtllm.kv_budget import serial_footprint_blocks
from taper_trtllm.request import ForkJoinRequest, ParallelStage, SerialStage

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
    spare=st.integers(0, 40),
    fraction=st.sampled_from([1.0, 1.0, 0.5, 0.2]),
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
    collector = Collector()
    for request in batch:
        executor.submit(request, collector)
    run_to_end(executor, engine)
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
    spare=st.integers(0, 40),
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
    cancels = data.draw(
        st.lists(
            st.tuples(st.integers(0, 40), st.integers(0, 2), st.integers(0, 2), st.integers(0, 3)),
            max_size=6,
        )
    )
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
