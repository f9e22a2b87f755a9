from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from perf.arrivals import gamma_arrivals_s, trace_arrivals_s
from perf.program import program_cost
from perf.trace import TraceError, read_trace, to_wire_stages
from perf.workload import DEFAULT_TRACE, WorkloadConfig, WorkloadError, build_workload
from taper_trtllm.request import (
    RequestLimits,
    build_request,
    check_request,
    fork_depth,
    max_new_tokens,
)

LIMITS = RequestLimits()


def _write(path, text):
    path.write_text(text)
    return path


def test_plan_and_reduce_become_serial_stages_around_distinct_branches():
    stages = [["s", 8], ["p", 6, [4, [["s", 2], ["p", 0, [1, 1], 3]]], 5], ["s", 0]]
    wire = to_wire_stages(stages, 1.0, iter(range(100, 200)), vocab_size=8192)
    assert [s["type"] for s in wire] == ["serial", "serial", "parallel", "serial"]
    assert [s["max_tokens"] for s in wire if s["type"] == "serial"] == [8, 6, 5]
    plain, nested = wire[2]["branches"]
    assert plain["max_tokens"] == 4 and len(plain["header_ids"]) == 4
    assert plain["header_ids"][0] != nested["header_ids"][0]
    assert [s["type"] for s in nested["stages"]] == ["serial", "parallel", "serial"]


def test_scaling_keeps_fan_out_and_at_least_one_token():
    wire = to_wire_stages([["p", 0, [1, 2, 40], 3]], 0.25, iter(range(100)), vocab_size=8192)
    assert [b["max_tokens"] for b in wire[0]["branches"]] == [1, 1, 10]
    assert wire[1]["max_tokens"] == 1  # the reduce; the plan of 0 tokens stays away


def test_the_shipped_trace_replays_with_exact_lengths():
    rows = read_trace(DEFAULT_TRACE)
    assert len(rows) == 6000 and {r.family for r in rows} > {"plain", "tot_bfs_wide"}
    config = WorkloadConfig(num_prompts=300, length_scale=0.25, seed=3)
    for item in build_workload(config).requests:
        check_request(item.request, LIMITS, config.vocab_size)
        assert build_request(**item.request.model_dump()) == item.request
        assert item.request.sampling.ignore_eos
        assert len(json.loads(item.stages_json)) == len(item.request.stages)
    unscaled = build_workload(
        WorkloadConfig(num_prompts=200, limits=RequestLimits(max_prompt_tokens=8000))
    ).requests
    counts = {(len(r.request.input_ids), max_new_tokens(r.request.stages)) for r in unscaled}
    with DEFAULT_TRACE.open() as file:
        recorded = {tuple(map(int, line.split(",")[1:3])) for line in list(file)[1:]}
    assert counts <= recorded


def test_costs_of_a_hand_computed_program():
    stages = [
        {"type": "serial", "max_tokens": 2},
        {
            "type": "parallel",
            "branches": [
                {"header_ids": [1], "max_tokens": 3},
                {"header_ids": [2, 3], "max_tokens": 1},
            ],
            "join_ids": [9],
        },
        {"type": "serial", "max_tokens": 1},
    ]
    cost = program_cost(build_request(request_id="r", input_ids=[5] * 10, stages=stages), 4)
    assert cost.num_output_tokens == 7 and cost.critical_tokens == 6
    assert cost.num_prefill_tokens == 10 + (1 + 2) + 3 + 1  # prompt, headers, text 1, join
    assert cost.num_prefill_chunks == 1 + 2 + 1
    assert cost.prefill_token_context == 45 + 12 + (12 + 13) + (16 + 17 + 18 + 19)
    assert cost.footprint_blocks == -(-(10 + 2 + (1 + 3) + (2 + 1) + 1 + 1) // 4) + 2 + 1
    # serial at 10, 11; branch 0 from 13; branch 1 at 14; after the join at 12 + 4 + 3 + 1
    assert cost.decode_context_tokens == (10 + 11) + (13 + 14 + 15) + 14 + 20


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 8.0])
def test_arrivals_hit_the_rate_and_burstiness_sets_their_variation(burstiness):
    arrivals = gamma_arrivals_s(4000, 5.0, burstiness, np.random.default_rng(0))
    assert arrivals[-1] == pytest.approx(4000 / 5.0)
    gaps = np.diff(arrivals)
    assert (gaps >= 0).all()
    assert gaps.std() / gaps.mean() == pytest.approx(burstiness**-0.5, rel=0.1)


def test_trace_arrivals_keep_their_shape():
    recorded = np.array([4.0, 5.0, 5.0, 9.0])
    assert trace_arrivals_s(recorded, float("inf")) == pytest.approx([0, 1, 1, 5])
    assert trace_arrivals_s(recorded, 2.0) == pytest.approx([0, 0.4, 0.4, 2.0])


def test_equal_seeds_give_equal_workloads():
    def build(**changes):
        return build_workload(
            WorkloadConfig(num_prompts=40, request_rate=3, length_scale=0.25, **changes)
        )

    assert build(seed=1) == build(seed=1)
    assert build(seed=1) != build(seed=2)
    window = build(seed=1, arrivals="trace")
    assert window == build(seed=1, arrivals="trace")
    assert window.requests[-1].arrival_s == pytest.approx(40 / 3)


def test_rows_over_the_limits_are_dropped_and_counted(tmp_path):
    trace = _write(tmp_path / "t.csv", "prompt_tokens,output_tokens\n5000,3\n10,2\n20,9000\n30,4\n")
    config = WorkloadConfig(dataset_path=trace, num_prompts=2)
    workload = build_workload(config)
    assert {len(r.request.input_ids) for r in workload.requests} == {10, 30}
    assert set(workload.dropped) <= {"input_ids", "stages"}
    with pytest.raises(WorkloadError, match="num_prompts"):
        build_workload(replace(config, limits=RequestLimits(max_prompt_tokens=5)))


def test_synthetic_fork_join_and_random():
    config = WorkloadConfig(
        dataset_name="fork-join", num_prompts=50, num_branches=3, fork_fraction=0.5,
        shared_prefix_len=16,
    )  # fmt: skip
    requests = [r.request for r in build_workload(config).requests]
    depths = [fork_depth(r.program) for r in requests]
    assert 10 < sum(depths) < 40
    assert len({r.input_ids[:16] for r in requests}) == 1
    assert len({r.input_ids[16:] for r in requests}) == 50
    plain = build_workload(WorkloadConfig(dataset_name="random", num_prompts=2))
    assert max_new_tokens(plain.requests[0].request.program) == 128


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('0,10,5,"[[""x"",5]]"', r"t.csv:2: stages\[0\]"),
        ('0,10,5,"[[""p"",1,[],0]]"', "fan-out 0"),
        ('0,10,5,"[[""p"",1,[0],0]]"', "at least 1"),
        ('0,x,5,"[[""s"",5]]"', "prompt_tokens"),
        ("a,10,5,", "arrival_s"),
    ],
)
def test_a_malformed_trace_names_its_line_and_field(tmp_path, line, message):
    trace = _write(tmp_path / "t.csv", f"arrival_s,prompt_tokens,output_tokens,stages\n{line}\n")
    with pytest.raises(TraceError, match=message):
        read_trace(trace)


def test_bad_options_are_named():
    with pytest.raises(WorkloadError, match="request_rate"):
        WorkloadConfig(request_rate=0)
    with pytest.raises(WorkloadError, match="fork_fraction"):
        WorkloadConfig(fork_fraction=1.5)
