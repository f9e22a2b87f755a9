from __future__ import annotations

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest

from perf.mixes import MIXES
from perf.offered_load import LoadConfig, LoadError, Offer, OfferedLoad
from perf.program import program_cost
from perf.simulate import main, write_chrome_trace
from perf.simulated_cell import Cell, Study, run_cell
from perf.simulated_result import run_figures
from perf.simulation import Deployment, SimulatedRequest, simulate
from perf.trace import TraceError
from perf.workload import DEFAULT_TRACE
from taper_trtllm.config import SchedulerConfig
from taper_trtllm.engines.simulated import Disturbance, SimulatedConfig
from taper_trtllm.output import RequestMetrics
from taper_trtllm.profile import DecodePoint, LatencyProfile, PrefillPoint
from taper_trtllm.request import ForkJoinRequest, SloTarget

STEP_MS = 10.0

SMALL = replace(
    MIXES["study"], input_len=(20, 80), output_len=20, serial_len=(5, 20), num_branches=(2, 8),
    branch_len=15,
)  # fmt: skip


def profile(extra_ms=0.0) -> LatencyProfile:
    """A step takes 10 ms and `extra_ms` per sequence beyond the first; prefill is free."""
    return LatencyProfile(
        fingerprint={},
        provenance={"kv_cache_tokens": "64000"},
        decode=tuple(
            DecodePoint(width=w, context_tokens=c, step_ms=STEP_MS + extra_ms * (w - 1))
            for w in (1, 2, 64)
            for c in (1, 40000)
        ),
        prefill=tuple(
            PrefillPoint(
                width=0, context_tokens=0, num_chunks=1, num_tokens=n, token_context=n * n / 2,
                step_ms=STEP_MS,
            )
            for n in (16, 1024)
        ),
    )  # fmt: skip


def study(extra_ms=0.5, noise=0.0, tpot_ms=30.0, **load) -> Study:
    config = LoadConfig(source=SMALL, num_kv_blocks=2000, **load)
    scheduler = SchedulerConfig(max_num_requests=64, max_batch_size=64, max_prefill_tokens=1024)
    deployment = Deployment(
        profile(extra_ms),
        profile(extra_ms),
        SimulatedConfig(2000, max_batch_size=64, disturbance=Disturbance(noise=noise)),
        scheduler,
        SloTarget(ttft_ms=1000, tpot_ms=tpot_ms),
        config.limits,
    )
    policies = {
        name: scheduler.model_copy(update={"policy": name})
        for name in ("irp-off", "irp-eager", "taper")
    }
    return Study(deployment, policies, config, warmup_s=2.0, duration_s=8.0, drain_s=60.0)


def take(load: OfferedLoad, rate: float, n: int) -> list[tuple[float, Offer]]:
    return list(itertools.islice(load.arrivals(rate), n))


def offer(request_id: str, **fields) -> Offer:
    request = ForkJoinRequest(request_id=request_id, input_ids=(0,) * 32, **fields)
    return Offer(request, "plain", fields.get("max_tokens", 1))


# ---------------------------------------------------------------------------------------- load


def test_prompts_that_are_computed_elsewhere_need_no_patience():
    """They cost nobody a step, so nothing changes; where they are computed here, it does."""

    def figures(request_admission, disaggregated):
        small = study(noise=0.02, tpot_ms=14.0)
        scheduler = small.policies["taper"].model_copy(
            update={"request_admission": request_admission, "max_prefill_tokens": 16}
        )
        engine = replace(small.deployment.engine, disaggregated_prefill=disaggregated)
        deployment = replace(small.deployment, engine=engine)
        changed = replace(small, deployment=deployment, policies={"taper": scheduler})
        return run_cell(changed, Cell("taper", 12.0, 0))

    assert figures("patient", True) == figures("tpot", True)
    assert figures("patient", False) != figures("tpot", False)


def test_rates_and_repetitions_of_a_seed_are_paired():
    slow = take(OfferedLoad(study().load, 3), 1.0, 50)
    fast = take(OfferedLoad(study().load, 3), 4.0, 50)
    assert [o.request for _, o in slow] == [o.request for _, o in fast]
    assert [t for t, _ in slow] == pytest.approx([4 * t for t, _ in fast])
    assert slow != take(OfferedLoad(study().load, 4), 1.0, 50)


@pytest.mark.parametrize("arrivals", ["poisson", "gamma"])
def test_gaps_have_the_rate_and_the_variation_that_was_asked(arrivals):
    cv = 2.0 if arrivals == "gamma" else 1.0
    times = [t for t, _ in take(OfferedLoad(study(arrivals=arrivals, cv=cv).load, 0), 5.0, 4000)]
    gaps = np.diff([0.0, *times])
    assert 1 / gaps.mean() == pytest.approx(5.0, rel=0.1)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.1)


def test_a_trace_is_replayed_in_its_order_at_the_asked_rate(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text(
        "arrival_s,prompt_tokens,output_tokens\n0,10,1\n1,10,2\n4,10,3\n6,9000,4\n9,10,5\n"
    )
    config = LoadConfig(source=path, arrivals="trace", max_seq_len=1000)
    assert config.recorded_rate() == pytest.approx(4 / 9)
    found = take(OfferedLoad(config, 0), 4 / 9, 9)
    lengths = [o.critical_tokens for _, o in found]
    order = ([1, 2, 3, 5] * 4)[[1, 2, 3, 5].index(lengths[0]) :]
    assert lengths == order[:9]  # cyclic, without the row over the limit
    gap_before = {1: 9 / 4, 2: 1, 3: 3, 5: 3}
    assert np.diff([t for t, _ in found]) == pytest.approx([gap_before[n] for n in lengths[1:]])


def test_dropped_requests_are_counted_and_replaced(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text("prompt_tokens,output_tokens\n90,10\n90,11\n")
    load = OfferedLoad(LoadConfig(source=path, max_seq_len=100), 0)
    found = take(load, 1.0, 20)
    assert {o.critical_tokens for _, o in found} == {10}
    assert 19 <= load.num_dropped(20) <= 20 and load.num_dropped(0) == 0
    with pytest.raises(LoadError, match="--max-seq-len"):
        take(OfferedLoad(LoadConfig(source=path, max_seq_len=50), 0), 1.0, 1)
    with pytest.raises(LoadError, match="--kv-cache-tokens"):
        take(OfferedLoad(LoadConfig(source=path, num_kv_blocks=1), 0), 1.0, 1)


def test_trace_arrivals_need_a_trace_that_has_them(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text("prompt_tokens,output_tokens\n90,10\n90,11\n")
    with pytest.raises(TraceError, match="arrival_s"):
        LoadConfig(source=path, arrivals="trace")
    with pytest.raises(LoadError, match="--arrivals"):
        LoadConfig(source=SMALL, arrivals="trace")


def test_the_study_mix_has_the_mean_length_of_the_study():
    rows = MIXES["study"].rows(np.random.default_rng(0))
    load = OfferedLoad(LoadConfig(source=MIXES["study"]), 0)
    output = [program_cost(o.request, 32).num_output_tokens for _, o in take(load, 1.0, 2000)]
    assert np.mean(output) == pytest.approx(1676, rel=0.08)
    families = [row.family for row in itertools.islice(rows, 4000)]
    assert families.count("plain") == pytest.approx(2000, rel=0.1)


@pytest.mark.parametrize("mix", MIXES)
def test_every_mix_can_be_served(mix):
    found = [o for _, o in take(OfferedLoad(LoadConfig(source=MIXES[mix]), 0), 1.0, 100)]
    assert any(o.is_branching for o in found) == (mix != "plain")


# ----------------------------------------------------------------------------------------- runs


def test_requests_alone_take_exactly_their_steps():
    """Hand-computed: one step for the prompt, which gives the first token, one for each other."""
    deployment = study().deployment
    arrivals = [(0.0, offer("a", max_tokens=5)), (1.0, offer("b", max_tokens=1))]
    a, b = simulate(deployment, arrivals, end_s=10.0)
    assert a.end_s == pytest.approx(5 * STEP_MS / 1e3, rel=1e-3)
    assert a.metrics.ttft_ms == pytest.approx(STEP_MS, rel=1e-3) and a.is_met
    assert a.metrics.tpot_ms == pytest.approx(STEP_MS, rel=1e-3)
    assert b.end_s == pytest.approx(1.0 + STEP_MS / 1e3, rel=1e-3)


def test_what_is_not_done_at_the_end_is_a_miss():
    deployment = study().deployment
    arrivals = [(0.0, offer("a", max_tokens=5)), (0.0, offer("b", max_tokens=500))]
    done, cut = simulate(deployment, arrivals, end_s=1.0)
    assert done.is_met and cut.metrics is None and not cut.is_met
    figures = run_figures([done, cut], 30.0, window_s=1.0)
    assert figures["slo_attainment"] == 0.5 and figures["num_unfinished"] == 1
    assert figures["request_goodput"] == 1.0 and figures["token_goodput"] == 5.0


def test_arrivals_after_the_scored_window_keep_the_load_up():
    """They end with the last scored request, and go on as long as one is open."""
    load = OfferedLoad(study().load, 0)
    arrived = simulate(study().deployment, load.arrivals(20.0), end_s=100.0, scored_until_s=2.0)
    scored = [r for r in arrived if r.arrival_s < 2.0]
    assert scored and all(r.end_s is not None for r in scored)
    last_s = max(r.end_s for r in scored)
    later = [r.arrival_s for r in arrived if r.arrival_s >= 2.0]
    assert later and max(later) <= last_s < min(last_s + 1, 100)
    expected = sum(2.0 <= t <= last_s for t, _ in take(load, 20.0, len(arrived) + 50))
    assert abs(len(later) - expected) <= 1


def test_the_same_seed_gives_the_same_result_bit_for_bit():
    cells = [run_cell(study(noise=0.05), Cell("taper", 8.0, seed)) for seed in (0, 0, 1)]
    first, again, other = (json.dumps(cell) for cell in cells)
    assert first == again and first != other


def test_more_load_and_tighter_objectives_attain_less():
    attained = {
        (rate, tau): run_cell(study(tpot_ms=tau), Cell("irp-eager", rate, 0))["slo_attainment"]
        for rate in (4.0, 12.0)
        for tau in (20.0, 40.0)
    }
    assert attained[4.0, 40.0] > 0.95
    assert attained[4.0, 20.0] > attained[12.0, 20.0] < attained[12.0, 40.0]


def test_policies_do_what_they_are_named_for():
    off, eager = (run_cell(study(), Cell(name, 10.0, 0)) for name in ("irp-off", "irp-eager"))
    assert off["groups"]["branching"]["mean_width"] == 1.0
    assert eager["groups"]["branching"]["mean_width"] > 1.5
    assert eager["groups"]["branching"]["p50_stretch"] < off["groups"]["branching"]["p50_stretch"]
    assert (
        off["num_requests"]
        == eager["num_requests"]
        == sum(off["groups"][group]["num_requests"] for group in ("plain", "branching"))
    )


def simulated(arrival_s, ttft_s, end_s, branching=False, met=True, tokens=10) -> SimulatedRequest:
    metrics = RequestMetrics(
        num_prompt_tokens=1, num_output_tokens=tokens, arrival_time_ns=0,
        first_scheduled_time_ns=0, first_token_time_ns=0, last_token_time_ns=0,
        ttft_ms=1e3 * ttft_s, tpot_ms=20.0, serial_tpot_ms=None, join_wait_ms=0.0,
        num_forks=int(branching), num_reused_tokens=0, num_reused_blocks=0,
        num_recomputed_tokens=0, num_joined_tokens=0, num_deferred_branch_steps=0, mean_width=1.0,
        join_mode="concat", join_is_as_trained=None,
        slo_met=met,
    )  # fmt: skip
    stages = ({"type": "parallel", "branches": [{"max_tokens": 5}]},)
    request = ForkJoinRequest.model_validate(
        {"request_id": "r", "input_ids": (0,), "stages": stages}
        if branching
        else {"request_id": "r", "input_ids": (0,), "max_tokens": 5}
    )
    return SimulatedRequest(Offer(request, "x", 5), arrival_s, end_s, metrics)


def test_hand_computed_figures():
    requests = [
        simulated(0.0, 1.0, 2.0),  # ends before any branch decodes
        simulated(1.0, 1.5, 4.0, met=False),
        simulated(2.0, 1.0, 6.0, branching=True, tokens=40),
    ]
    figures = run_figures(requests, tpot_slo_ms=100.0, window_s=4.0)
    assert figures["slo_attainment"] == pytest.approx(2 / 3)
    assert figures["token_goodput"] == pytest.approx(50 / 4)
    assert figures["p50_e2el_ms"] == pytest.approx(3000) and figures["p50_ttft_ms"] == 1000
    assert figures["p99_serial_tpot_ms"] is None
    groups = figures["groups"]
    assert groups["victims"]["num_requests"] == 1 and groups["victims"]["slo_attainment"] == 0.0
    assert groups["branching"]["p50_stretch"] == pytest.approx(4.0 / (5 * 0.1))


# ----------------------------------------------------------------------------------- command line


@pytest.fixture
def command(tmp_path):
    profile(0.5).save(tmp_path / "profile.json")
    return [
        "--profile", str(tmp_path / "profile.json"), "--mix", "study", "--input-len", "20:80",
        "--output-len", "20", "--serial-len", "5:20", "--num-branches", "2:8", "--branch-len", "15",
        "--slo-tpot-ms", "25", "--slo-ttft-ms", "1000", "--seeds", "2", "--duration", "3",
        "--warmup-s", "0.5", "--max-batch-size", "64", "--processes", "2", "--no-progress",
        "--json", str(tmp_path / "out.json"),
    ]  # fmt: skip


def test_rates_from_the_command_line(command, tmp_path, capsys, caplog):
    more = ["--request-rate", "10,5", "--policy", "taper,taper@margin=0.3,irp-off"]
    files = ["--plot", str(tmp_path / "o.png"), "--chrome-trace", str(tmp_path / "t.json"),
             "--trace-window", "1:2"]  # fmt: skip
    assert main([*command, *more, *files]) == 0
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["schema_version"] == 1 and written["workload"].startswith("study")
    cells = [(r["policy"], r["request_rate"], r["seed"]) for r in written["results"]]
    policies = ["taper", "taper@margin=0.3", "irp-off"]
    assert cells == list(itertools.product(policies, [5.0, 10.0], [0, 1]))
    for result in written["results"]:
        assert result["capacity_rps"] is None
        for name in ("ttft", "tpot", "serial_tpot", "e2el"):
            assert 0 < result[f"p50_{name}_ms"] <= result[f"p99_{name}_ms"]
    assert (tmp_path / "o.png").stat().st_size > 0
    slices = [e for e in json.loads((tmp_path / "t.json").read_text())["traceEvents"]
              if e["ph"] == "X"]  # fmt: skip
    assert slices and all(0.9e6 <= e["ts"] <= 2e6 for e in slices)
    assert "margin=0.3" in capsys.readouterr().out and not caplog.records


def test_a_chrome_trace_ends_with_its_window(tmp_path):
    """Its run does, too: an hour would take minutes."""
    endless = replace(study(), duration_s=3600.0)
    cell = Cell("taper", 10.0, 0)
    num_steps = write_chrome_trace(endless, cell, (0.5, 1.0), tmp_path / "trace.json")
    assert 5 < num_steps < 100


def test_capacity_from_the_command_line(command, tmp_path):
    assert main([*command, "--find-capacity", "--policy", "irp-eager,taper"]) == 0
    first = json.loads((tmp_path / "out.json").read_text())
    eager, taper = (first["capacities"][p] for p in ("irp-eager", "taper"))
    assert eager["capacity_rps"] > 0 and taper["capacity_rps"] > 0
    times = taper["ratio_to"]["irp-eager"]["ratio"]
    assert times == pytest.approx(taper["capacity_rps"] / eager["capacity_rps"])
    near = [r["slo_attainment"] for r in first["results"] if r["policy"] == "taper"
            and r["request_rate"] < taper["capacity_rps"] < 1.1 * r["request_rate"]]  # fmt: skip
    assert 0.8 < np.mean(near) <= 1.0
    assert main([*command, "--find-capacity", "--policy", "irp-eager,taper"]) == 0
    assert json.loads((tmp_path / "out.json").read_text()) == first


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ([], "--request-rate"),
        (["--request-rate", "1", "--profile", "h900"], "h900"),
        (["--request-rate", "1", "--policy", "tapir"], "tapir"),
        (["--request-rate", "1", "--margin", "1.5"], "--margin"),
        (["--request-rate", "1", "--policy", "taper@marjin=0.1"], "marjin"),
        (["--request-rate", "1", "--policy", "taper@policy=irp-off"], "taper@policy"),
        (["--request-rate", "1", "--max-num-requests", "65"], "--max-num-requests"),
        (["--request-rate", "1", "--max-seq-len", "10"], "--max-seq-len"),
        (["--request-rate", "1", "--arrivals", "gamma"], "--cv"),
        (["--request-rate", "1", "--kv-cache-tokens", "8"], "--kv-cache-tokens"),
    ],
)
def test_errors_name_the_option(command, more, named, capsys):
    assert main([*command, *more]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error:") and named in error


@pytest.mark.parametrize(
    ("option", "value", "why"),
    [
        ("--json", "/proc/nowhere/x.json", "cannot write"),
        ("--json", "/", "cannot write"),
        ("--plot", "/proc/nowhere/x.png", "cannot write"),
        ("--plot", "x.jpeg", "must end in .png"),
        ("--chrome-trace", "/proc/nowhere/x.json", "cannot write"),
    ],
)
def test_what_cannot_be_written_is_refused_before_anything_runs(
    command, option, value, why, capsys
):
    with pytest.raises(SystemExit):
        main([*command, "--request-rate", "1", option, value])
    assert f"argument {option}: {why}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value"),
    [("--request-rate", "inf"), ("--duration", "inf"), ("--warmup-s", "inf"), ("--target", "0")],
)
def test_what_would_never_end_is_refused(command, option, value, capsys):
    with pytest.raises(SystemExit):
        main([*command, option, value])
    assert f"argument {option}: must be" in capsys.readouterr().err


def test_a_mix_option_needs_a_mix(capsys):
    command = ["--profile", "h200_fp8_tp1", "--workload", str(DEFAULT_TRACE), "--request-rate", "1",
               "--slo-tpot-ms", "30", "--slo-ttft-ms", "1000", "--branch-len", "5"]  # fmt: skip
    assert main(command) == 1
    assert "--branch-len" in capsys.readouterr().err
