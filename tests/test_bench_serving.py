"""The benchmark against a real server, and its command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from perf.bench_arguments import bench_parser, score_of
from perf.bench_serving import main
from perf.metrics import SloScore
from perf.server_metrics import parse_metrics, server_figures
from taper_trtllm.triton_server import TritonServer


def bench(server: TritonServer, config: Path, *arguments: str) -> int:
    return main(
        [
            "--url", server.grpc_url, "--metrics-url", server.metrics_url,
            "--config", str(config), "--disable-tqdm", "--length-scale", "0.1", *arguments,
        ]
    )  # fmt: skip


@pytest.mark.triton
def test_a_trace_is_replayed_scored_and_saved(
    server: TritonServer, serving_config_path: Path, tmp_path: Path, capsys
):
    status = bench(
        server, serving_config_path, "--num-prompts", "24", "--request-rate", "20",
        "--num-warmups", "2", "--slo-ttft-ms", "60000", "--slo-tpot-ms", "60000",
        "--metric-percentiles", "50,99", "--save-detailed", "--result-dir", str(tmp_path),
        "--result-filename", "run.json", "--save-records", str(tmp_path / "records.jsonl"),
    )  # fmt: skip
    assert status == 0
    result = json.loads((tmp_path / "run.json").read_text())
    assert result["policy"] == result["label"] == "taper"
    assert result["completed"] == 24 and result["failed"] == 0 and result["errors"] == [""] * 24
    assert result["slo_attainment"] == 1.0
    assert result["request_goodput"] == pytest.approx(20)
    assert result["total_output_tokens"] == sum(result["output_lens"])
    assert result["token_goodput"] == pytest.approx(result["total_output_tokens"] / (24 / 20))
    groups = result["groups"]
    assert groups["plain"]["num_requests"] + groups["branching"]["num_requests"] == 24
    assert groups["branching"]["p99_serial_tpot_ms"] > 0 and result["mean_width"] >= 1
    assert result["num_steps"] > 0 and result["kv_cache_reused_blocks"] >= 0
    records = (tmp_path / "records.jsonl").read_text().splitlines()
    assert len(records) == 24
    output = capsys.readouterr().out
    assert " Serving Benchmark Result " in output and "Median TTFT (ms):" in output


@pytest.mark.triton
def test_lengths_arrive_exactly_as_the_trace_says(
    server: TritonServer, serving_config_path: Path, tmp_path: Path
):
    status = bench(
        server, serving_config_path, "--dataset-name", "fork-join", "--num-prompts", "6",
        "--fork-fraction", "1", "--num-branches", "3", "--branch-len", "5", "--branch-len-cv", "0",
        "--serial-len", "4", "--input-len", "30", "--length-scale", "1", "--save-detailed",
        "--result-dir", str(tmp_path), "--result-filename", "run.json",
    )  # fmt: skip
    assert status == 0
    result = json.loads((tmp_path / "run.json").read_text())
    assert result["output_lens"] == [4 + 3 * 5 + 4] * 6 and result["input_lens"] == [30] * 6
    assert result["request_goodput"] is None  # nothing was asked


@pytest.mark.triton
def test_withdrawn_requests_do_not_count(
    server: TritonServer, serving_config_path: Path, tmp_path: Path
):
    status = bench(
        server, serving_config_path, "--num-prompts", "12", "--request-rate", "30",
        "--request-cancellation-rate", "0.6", "--goodput", "ttft:60000", "--save-result",
        "--result-dir", str(tmp_path), "--result-filename", "run.json", "--seed", "4",
    )  # fmt: skip
    assert status == 0
    result = json.loads((tmp_path / "run.json").read_text())
    assert result["num_cancelled"] > 0 and result["failed"] == 0
    assert result["completed"] + result["num_cancelled"] == 12
    assert result["slo_attainment"] == 1.0


def test_without_a_server_the_error_says_what_to_do(capsys):
    assert main(["--url", "127.0.0.1:1", "--num-prompts", "1", "--disable-tqdm"]) == 1
    assert "no Triton server at 127.0.0.1:1" in capsys.readouterr().err


def test_goodput_overrides_the_objectives_that_are_sent():
    parse = bench_parser("").parse_args
    sent = ["--slo-ttft-ms", "100", "--slo-tpot-ms", "10"]
    assert score_of(parse(sent)) == SloScore(ttft_ms=100, tpot_ms=10)
    scored = parse([*sent, "--goodput", "tpot:30", "e2el:500"])
    assert score_of(scored) == SloScore(tpot_ms=30, e2el_ms=500)
    with pytest.raises(SystemExit):
        parse(["--goodput", "latency:3"])


def test_server_figures_are_differences_of_two_pages():
    page = """
# HELP taper_width Sequences per decode iteration
taper_width_sum{{model="taper",policy="fixed-cap:2",version="1"}} {width}
taper_width_count{{model="taper",policy="fixed-cap:2",version="1"}} {count}
taper_branched_steps_total{{policy="fixed-cap:2"}} {branched}
taper_branch_externality_realised_seconds_sum{{policy="fixed-cap:2"}} {realised}
taper_deferred_branches_total{{policy="fixed-cap:2",reason="cap"}} {cap}
taper_deferred_branches_total{{policy="fixed-cap:2",reason="slack"}} 2
nv_inference_count{{model="taper"}} 7
"""
    before = parse_metrics(page.format(width=10, count=5, branched=1, realised=0.5, cap=3))
    after = parse_metrics(page.format(width=70, count=15, branched=5, realised=0.48, cap=13))
    figures = server_figures(before, after)
    assert after.policy == "fixed-cap:2"
    assert figures["mean_step_width"] == 6 and figures["num_deferred_branch_steps"] == 10
    assert figures["mean_branch_externality_ms"] == pytest.approx(-5)  # it is signed
    assert figures["predictor_mape"] is None
