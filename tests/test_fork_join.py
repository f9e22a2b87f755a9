"""The state machine alone: named cases, and random programs driven in random order."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import expected_outputs, requests

from taper_trtllm.fork_join import BranchStatus, DoneEvent, ForkJoinState, JoinEvent, TokenEvent
from taper_trtllm.request import Branch, ForkJoinRequest, ParallelStage, SerialStage


def make_state(*stages, prompt=(1, 2, 3)) -> ForkJoinState:
    return ForkJoinState(ForkJoinRequest(request_id="r", input_ids=prompt, stages=stages))


def paths(state: ForkJoinState) -> list[str]:
    return [leaf.path for leaf in state.leaves]


def test_fork_at_the_end_of_the_prompt_and_end_at_a_join():
    state = make_state(
        ParallelStage(branches=(Branch(header_ids=(7,), max_tokens=1), Branch(max_tokens=2)))
    )
    assert state.root.status is BranchStatus.FORKING
    assert state.root.num_fork_tokens == 2  # the second branch draws from the last one
    a, b = state.fork(state.root)
    assert paths(state) == ["0.0", "0.1"]
    assert [type(e) for e in state.advance(a, [50])] == [TokenEvent, DoneEvent]
    assert not state.is_finished
    assert not state.advance(b, [60])
    done = state.advance(b, [61])
    assert [type(e) for e in done] == [TokenEvent, DoneEvent, JoinEvent]
    assert done[-1].suffix_ids == (60, 61)
    assert state.is_finished and state.root.tokens == [7, 50, 60, 61]
    assert state.num_output_tokens == 3 and state.root.num_critical == 2


def test_a_join_waits_for_all_and_happens_once_in_program_order():
    state = make_state(
        ParallelStage(branches=tuple(Branch(max_tokens=1) for _ in range(3)), join_ids=(99,)),
        SerialStage(max_tokens=1),
    )
    children = state.fork(state.root)
    joins = []
    for child in reversed(children):
        events = state.advance(child, [10 + child.index])
        joins += [e for e in events if isinstance(e, JoinEvent)]
    assert [j.suffix_ids for j in joins] == [(11, 12, 99)]
    assert state.root.tokens == [10, 11, 12, 99]
    assert paths(state) == [""]


def test_nested_joins_cascade_and_leaves_stay_in_program_order():
    inner = ParallelStage(branches=(Branch(max_tokens=1), Branch(max_tokens=1)), join_ids=(8,))
    state = make_state(
        ParallelStage(branches=(Branch(stages=(inner,)), Branch(max_tokens=3))),
        SerialStage(max_tokens=1),
    )
    nested, _ = state.fork(state.root)
    first, second = state.fork(nested)
    assert paths(state) == ["0.0.0.0", "0.0.0.1", "0.1"]
    state.advance(first, [20])
    events = state.advance(second, [21])
    assert [type(e) for e in events] == [TokenEvent, DoneEvent, JoinEvent, DoneEvent]
    assert nested.tokens == [20, 21, 8] and paths(state) == ["0.1"]


def test_fan_out_of_one_and_stop_tokens():
    request = ForkJoinRequest(
        request_id="r",
        input_ids=(1,),
        stages=(ParallelStage(branches=(Branch(max_tokens=9),)), SerialStage(max_tokens=2)),
        sampling={"end_id": 5},
    )
    state = ForkJoinState(request)
    (only,) = state.fork(state.root)
    events = state.advance(only, [4, 5])
    assert events[0].finish_reason == "stop" and events[0].token_ids == (4, 5)
    assert state.num_remaining_tokens == 2  # the seven unused ones are forfeited
    assert state.root.status is BranchStatus.DECODING


def test_a_cancelled_branch_does_not_come_back_when_what_it_forked_is_cancelled_too():
    inner = ParallelStage(branches=(Branch(max_tokens=1),), allow_branch_cancel=True)
    outer = ParallelStage(
        branches=(Branch(max_tokens=2), Branch(stages=(inner, SerialStage(max_tokens=1)))),
        allow_branch_cancel=True,
    )
    state = make_state(outer, SerialStage(max_tokens=1))
    first, nested = state.fork(state.root)
    state.fork(nested)
    assert [e.node for e in state.cancel("0.1")] == [nested]
    assert not state.cancel("0.1.0.0") and not state.cancel("0.1")
    assert paths(state) == ["0.0"]
    state.advance(first, [1, 2])
    assert paths(state) == [""] and state.root.tokens == [1, 2]


def test_tokens_beyond_the_stage_or_for_a_waiting_branch_are_refused():
    state = make_state(SerialStage(max_tokens=2), ParallelStage(branches=(Branch(max_tokens=1),)))
    with pytest.raises(ValueError, match="beyond the end"):
        state.advance(state.root, [1, 2, 3])
    state.advance(state.root, [1, 2])
    with pytest.raises(ValueError, match="FORKING"):
        state.advance(state.root, [3])


@settings(deadline=None, max_examples=200)
@given(request=requests(), data=st.data())
def test_any_order_of_progress_gives_the_same_tree(request, data):
    """Random leaves advance by random numbers of tokens; the transcripts do not depend on it."""

    def generate(path, context, max_tokens):
        new = []
        while len(new) < max_tokens:
            new.append((sum(context) + 31 * len(new) + len(path)) % 97)
            if new[-1] in request.sampling.stop_ids:
                break
        return new

    expected = expected_outputs(request, generate)
    state = ForkJoinState(request)
    outputs: dict[tuple[str, int], list[int]] = {}
    while not state.is_finished:
        leaf = data.draw(st.sampled_from(state.leaves))
        if leaf.status is BranchStatus.FORKING:
            state.fork(leaf)
            continue
        key = (leaf.path, leaf.stage_index)
        have = len(outputs.get(key, []))
        count = data.draw(st.integers(1, len(expected[key]) - have))
        taken = expected[key][have : have + count]
        events = state.advance(leaf, taken)
        assert not events or events[0].token_ids == tuple(taken)
        outputs.setdefault(key, []).extend(taken)
    assert outputs == expected
    assert state.num_output_tokens == sum(map(len, expected.values()))
    assert state.num_remaining_tokens == 0 and state.num_remaining_serial_tokens == 0


def test_a_branch_that_has_ended_stays_in_the_join():
    branches = (Branch(max_tokens=1), Branch(max_tokens=9))
    state = make_state(ParallelStage(branches=branches, allow_branch_cancel=True))
    first, _ = state.fork(state.root)
    state.advance(first, [70])
    assert not state.cancel("0.0")
    assert state.cancel("0.1")[-1].first_child is first and state.root.tokens == [70]
