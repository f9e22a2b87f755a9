"""What the executor remembers of sequences and requests equals what it would find out anew."""

from __future__ import annotations

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from programs import requests
from toy_engine import ToyEngine, toy_profile

from taper_trtllm.admission import POLICIES
from taper_trtllm.config import SchedulerConfig
from taper_trtllm.engines.paged_sequences import PagedSequences
from taper_trtllm.executor import TaperExecutor
from taper_trtllm.fork_join import BranchStatus
from taper_trtllm.kv_budget import serial_footprint_blocks
from taper_trtllm.live_request import LiveRequest
from taper_trtllm.request import RequestLimits, SloTarget
from taper_trtllm.sequence_table import SequenceTable

SPECS = [p.replace(":N", ":2").replace(":F", ":0.9") for p in POLICIES]


def check_rows(table: SequenceTable, running: list[LiveRequest], engine: PagedSequences) -> None:
    """Every row against the engine and the branch, and places have what they need."""
    table.refresh()
    live = [sequence for request in running for sequence in request.sequences()]
    assert {s.sequence_id for s in live} == set(engine._sequences) == set(table._sequences)
    assert len({s.row for s in live}) == len(live), "two sequences in one row"
    for sequence in live:
        sequence_id, node = sequence.sequence_id, sequence.node
        row = table._rows[sequence.row]
        assert row["sequence_id"] == sequence_id
        assert row["num_tokens"] == engine.num_tokens(sequence_id)
        assert row["num_computed"] == engine.num_computed_tokens(sequence_id)
        assert row["num_tokens"] - row["num_computed"] >= 0
        if node.status is BranchStatus.DECODING:
            assert row["num_generated"] == node.num_generated
            assert row["num_stage_tokens_left"] == node.num_stage_tokens_left
            if row["num_tokens"] - row["num_computed"] == 1:
                needed = engine.num_blocks_needed(sequence_id, table.lease_of(sequence))
                assert row["blocks_needed"] == (0 if sequence_id in table.holding else needed)


def findings(request: LiveRequest) -> tuple:
    needs = [(n.sequence.sequence_id, n.num_tokens, n.sample) for n in request.prefill_needs]
    return request.ready_rows.tolist(), request.ready_paths, needs


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
)
@given(
    drawn=st.lists(requests(), min_size=2, max_size=5),
    policy=st.sampled_from(SPECS),
    spare=st.integers(0, 20),
    fraction=st.sampled_from([1.0, 0.5, 0.2]),
    prefill=st.sampled_from([1, 3, 16]),
    events=st.lists(
        st.tuples(st.integers(0, 60), st.integers(0, 4), st.sampled_from(["cancel", "fail"])),
        max_size=3,
    ),
)
def test_nothing_remembered_is_stale(drawn, policy, spare, fraction, prefill, events):
    """At every step, through forks, joins, preemption, suspension, cancels and failures."""
    batch = [r.model_copy(update={"request_id": f"r{i}"}) for i, r in enumerate(drawn)]
    footprint = max(serial_footprint_blocks(len(r.input_ids), r.program, 4) for r in batch)
    engine = ToyEngine(num_kv_blocks=footprint + spare)
    scheduler = SchedulerConfig(
        policy=policy,
        max_batch_size=64,
        max_num_requests=4,
        max_prefill_tokens=prefill,
        kv_reserve_fraction=fraction,
    )
    slo = SloTarget(ttft_ms=200, tpot_ms=8)
    executor = TaperExecutor(engine, toy_profile(), scheduler, RequestLimits(), slo)
    table, planner = executor._sequences, executor._planner
    survey = planner._survey

    def checked_survey(running, now_s):
        ready = survey(running, now_s)
        check_rows(table, running, engine)
        for request in running:
            remembered = findings(request)
            request.survey(table)
            assert findings(request) == remembered
        leaves = [row for request in running for row in request.ready_rows.tolist()]
        assert ready.rows.tolist() == leaves
        return ready

    planner._survey = checked_survey
    for request in batch:
        executor.submit(request, lambda output: None)
    for step in range(5000):
        if not executor.num_open_requests:
            break
        for at, index, kind in events:
            if at == step and kind == "cancel":
                executor.cancel(f"r{index}")
            elif at == step and engine._sequences:
                victim = sorted(engine._sequences)[index % len(engine._sequences)]
                engine.fail_next[victim] = "NaN logits"
        executor.run_once()
        check_rows(table, executor._running, engine)
    assert not executor.num_open_requests and not table._sequences
    assert len(set(table._free_rows)) == len(table._free_rows) == len(table._rows)
