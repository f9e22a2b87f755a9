"""`python -m perf.gpu` on a CPU: the script, parts and files that a GPU gets."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from reference_attention import ReferenceAttention

from engine_build.calibrate import Calibrator, Grid
from perf import correctness, gpu, live_comparison
from perf.gpu_model import ModelBytes, engine_config, shape_of
from perf.gpu_parts import PARTS
from perf.live_comparison import Experiment, crossing_load, live_cell, simulate_cell
from perf.regime import RegimeRules, regime_of
from perf.result import load_json
from perf.roofline import roofline
from taper_trtllm.config import ServingConfig
from taper_trtllm.engines import create_engine
from taper_trtllm.engines.checkpoint import random_checkpoint
from taper_trtllm.engines.simulated import SimulatedConfig, SimulatedEngine, StepTimes
from taper_trtllm.engines.torch_engine import TorchEngine
from taper_trtllm.profile import load_profile
from taper_trtllm.request import RequestLimits

PROFILE = Path(gpu.__file__).parent / "profiles" / "h200_bf16_tp1.json"
POLICIES = ("irp-off", "irp-eager", "taper")


def run(output: Path, options: str) -> int:
    return gpu.main(
        ["--device", "cpu", "--model", "tiny", "--output-dir", str(output), *options.split()]
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """Of all parts, one command for each: a part that begins in time ends, however slow it is."""
    output = tmp_path_factory.mktemp("gpu")
    for part in PARTS:
        options = f"--parts {part} --budget-min 0.05 --repetitions 1 --loads 0.3"
        assert run(output, options) == 0
    return output


def tiny_config():
    return engine_config("tiny", None, "cpu", "float32")


# -------------------------------------------------------------------------------- the whole script


def test_every_part_leaves_its_result_with_its_origin(results):
    page = (results / "results.md").read_text()
    for name in PARTS:
        origin = load_json(results / f"{name}.json")["provenance"]
        assert origin["device"] == "cpu" and origin["versions"]["torch"] == torch.__version__
        assert origin["git_sha"] and origin["date"] and origin["command"]
        assert f"## {name}" in page
    for plot in ("step_latency.png", "live.png"):
        assert (results / plot).read_bytes().startswith(b"\x89PNG") and plot in page


def test_logits_and_tokens_agree_whatever_is_deferred(results):
    check = load_json(results / "correctness.json")
    assert check["is_passed"]
    found = check["dtypes"]["float32"]
    assert found["logits"]["same_argmax"] == 1 and found["logits"]["rms_error"] < 1e-5
    assert [row["num_differing"] for row in found["deferral"]] == [0, 0, 0]
    assert {row["policy"]: row["num_deferred"] > 0 for row in found["deferral"]} == {
        "irp-off": False,  # its branches do not start
        "fixed-cap:2": True,
        "taper:uncorrected": True,
    }


def test_all_cells_are_kept_and_reported(results):
    cells = [load_json(path) for path in (results / "live/cells").glob("*.json")]
    assert sorted(cell["policy"] for cell in cells) == sorted(POLICIES)
    assert len({cell["num_prompts"] for cell in cells}) == 1  # the same requests
    for cell in cells:
        assert cell["num_requests"] == cell["num_prompts"]
        if cell["policy"] == "irp-off":
            assert cell["mean_width"] in (1, None)  # None: no request of so few branches
    rows = load_json(results / "agreement.json")["rows"]
    assert [row["policy"] for row in rows] == sorted(POLICIES)
    page = (results / "results.md").read_text()
    assert all(f"| {policy} | 0.3 |" in page for policy in POLICIES)


def test_a_part_is_run_again_and_the_others_are_kept(results):
    before = {name: (results / f"{name}.json").read_text() for name in PARTS}
    assert run(results, "--parts roofline") == 0
    changed = [name for name in PARTS if (results / f"{name}.json").read_text() != before[name]]
    assert changed == ["roofline"]
    assert "## live" in (results / "results.md").read_text()


def test_what_the_time_does_not_reach_is_said_and_the_rest_is_kept(tmp_path):
    assert run(tmp_path, "--parts calibration,roofline --budget-min 1e-4") == 1
    parts = load_json(tmp_path / "run.json")["parts"]
    assert [part["status"] for part in parts.values()] == ["done", "skipped"]
    page = (tmp_path / "results.md").read_text()
    assert "## calibration" in page and "**roofline: skipped**: the time is over" in page


def test_a_part_without_what_it_needs_fails_alone(tmp_path):
    assert run(tmp_path, "--parts roofline,live") == 1
    parts = load_json(tmp_path / "run.json")["parts"]
    assert [part["status"] for part in parts.values()] == ["failed", "failed"]
    assert all("--parts calibration" in part["error"] for part in parts.values())
    assert "**live: failed**" in (tmp_path / "results.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--device tpu", "--device tpu: cuda, cuda:N or cpu"),
        ("--device cpu --parts live,lives", "--parts: no lives"),
        ("--device cpu --policies irp-off,best", "best"),
        ("--device cpu --dataset-path no.csv", "--dataset-path: no such file"),
        ("--device cpu --model-dir nowhere", "--model-dir: cannot use nowhere/config.json"),
    ],
)
def test_a_wrong_option_is_one_line(arguments, message, capsys, tmp_path):
    assert gpu.main([*arguments.split(), "--output-dir", str(tmp_path)]) == 1
    errors = capsys.readouterr().err
    assert message in errors and errors.count("\n") <= 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_runs(capsys):
    assert gpu.main([]) == 1
    assert "--device cpu" in capsys.readouterr().err


# ------------------------------------------------------------------------------------- the checks


def test_fixed_shapes_are_checked_as_well(monkeypatch):
    """What a GPU runs, but for its kernels and the capture."""
    attention = ReferenceAttention()
    monkeypatch.setattr(
        correctness, "TorchEngine", partial(TorchEngine, decode_attention=attention)
    )
    check = correctness.check_correctness(tiny_config())
    assert check["is_passed"] and len(attention.widths) > 3
    assert check["dtypes"]["float32"]["logits"]["same_argmax"] == 1


def test_other_weights_are_found_out(monkeypatch):
    def other(model, device):
        return random_checkpoint(model.model_copy(update={"seed": model.seed + 1}), device)

    monkeypatch.setattr(correctness, "random_checkpoint", other)
    assert not correctness.check_correctness(tiny_config())["is_passed"]


def test_a_token_that_differs_is_found_and_what_follows_is_not_compared():
    engine = create_engine(tiny_config())
    requests = correctness.deferral_requests(engine.capabilities.vocab_size)
    runs = {
        name: correctness.run_policy(engine, name, requests) for name in ("irp-eager", "irp-off")
    }
    same = correctness.compare_runs(requests, runs, "irp-off", None)
    tokens = runs["irp-off"].tokens["request-0", "1.1", 0]  # a branch of the first fork
    tokens[2] = (tokens[2] + 1) % 512
    vocab_size = engine.capabilities.vocab_size
    found = correctness.compare_runs(
        requests, runs, "irp-off", lambda ids: torch.arange(vocab_size)[None].float()
    )
    assert (same["num_differing"], found["num_differing"]) == (0, 1)
    assert found["num_compared"] < same["num_compared"]
    assert found["largest_gap"] in (1, 511)


def test_the_floor_is_weights_and_kv_over_the_bandwidth():
    """Against the size that the published 8B model has: 8.19e9 parameters, 144 KiB per token."""
    shape = shape_of(
        engine_config("tiny", None, "cpu", "float32").model_copy(
            update={"random_model": gpu.PRESETS["qwen3-8b"]}
        )
    )
    size = ModelBytes.of(shape, "bfloat16")
    assert (size.weights + size.embedding) / 2 / 8.19e9 == pytest.approx(1, abs=0.001)
    assert size.kv_per_token == 144 * 1024
    result = roofline(load_profile(PROFILE), size, bandwidth=4e12)
    for point in result["points"]:
        num_bytes = size.weights + size.kv_per_token * point["width"] * point["context_tokens"]
        assert point["floor_ms"] * point["ratio"] == pytest.approx(point["step_ms"])
        assert point["floor_ms"] == pytest.approx(num_bytes / 4e9)
    wanted = {(row["width"], row["bar"]): row["ratio"] for row in result["wanted"]}
    assert wanted.keys() == {(1, 1.25), (64, 1.5)} and None not in wanted.values()


# -------------------------------------------------------------------------------- the calibration


@pytest.mark.parametrize(("budget_s", "num_contexts"), [(None, 5), (0.0, 2)])
def test_sequences_grow_and_a_short_time_leaves_contexts_out(budget_s, num_contexts):
    truth = load_profile(PROFILE)
    engine = SimulatedEngine(truth, SimulatedConfig(num_kv_blocks=4096))
    contexts = (32, 64, 200, 512, 1024)
    grid = Grid((1, 4, 16, 64), contexts, (16, 128), (0, 512), repetitions=3, num_checks=20)
    profile, report = Calibrator(engine, grid, budget_s=budget_s).measure({})
    assert engine.num_free_blocks == 4096
    engine.check_integrity()
    by_width = [[p for p in profile.decode if p.width == width] for width in grid.widths]
    times = StepTimes(truth, 64)
    for points in by_width:
        assert len(points) == num_contexts
        for point, context in zip(points, contexts, strict=False):
            assert context <= point.context_tokens < context + 20  # no further than its own level
            exact_ms = times.decode_ms(point.width, point.context_tokens)
            assert point.step_ms == pytest.approx(exact_ms, rel=0.01)
    assert report.mape < 0.03 and report.num_checks == (20 if budget_s is None else 12)


def test_the_last_check_fits_the_pool_that_the_grid_fits():
    engine = SimulatedEngine(load_profile(PROFILE), SimulatedConfig(num_kv_blocks=130))
    grid = Grid((1, 4, 16), (32, 200), (16,), (0,), repetitions=1, num_checks=100)
    _, report = Calibrator(engine, grid).measure({})
    assert report.num_checks == 100 and engine.num_free_blocks == 130


# ------------------------------------------------------------------------------------- the live run


def experiment(base: ServingConfig, window_s: float, **rules) -> Experiment:
    profile = load_profile(PROFILE)
    regime = regime_of(
        PROFILE, base, length_scale=0.25, prompt_scale=0.25, rules=RegimeRules(**rules)
    )
    return Experiment(regime, base, profile, window_s=window_s)


def test_the_load_is_the_least_at_which_eager_is_late(monkeypatch):
    base = ServingConfig()
    cell = experiment(base, window_s=5.0, tpot_slo_steps=1.5, max_num_requests=None)
    assert cell.regime.max_num_requests == cell.regime.widest_step
    monkeypatch.setattr(live_comparison, "LOADS", (0.3, 2.5, 3.0))
    assert crossing_load(cell, [0]) == 2.5
    met = [simulate_cell(cell, "irp-eager", load, 0)["slo_attainment"] for load in (0.3, 2.5)]
    assert met[0] >= live_comparison.CROSSING > met[1]


def test_a_live_run_sees_its_own_pool_and_leaves_the_engine_empty():
    """Objectives that nobody can meet end the run at once: what is open is withdrawn."""
    config = tiny_config()
    engine = create_engine(config)
    limits = RequestLimits(max_total_tokens=4096)
    base = ServingConfig(engine=config, limits=limits)
    cell = experiment(base, window_s=0.2)
    regime = replace(cell.regime, tpot_slo_ms=1e-3, ttft_slo_ms=1e-3, num_kv_blocks=400)
    cell = replace(cell, regime=regime)
    lent = live_comparison.LentEngine(engine, 400)
    assert lent.capabilities.num_kv_blocks == lent.num_free_blocks == 400
    result = live_cell(cell, engine, "irp-eager", 2.0, seed=0)
    assert result["num_unfinished"] > 0 and result["slo_attainment"] == 0
    assert engine.num_free_blocks == engine.capabilities.num_kv_blocks
    engine.check_integrity()
    assert json.dumps(result)  # what a cell's file holds
