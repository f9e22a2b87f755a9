from __future__ import annotations

import json
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from test_simulate import SMALL

from perf import evaluate, random_cells
from perf.capacity import capacity, grid_rate, grid_step
from perf.evaluate import MARKERS, main, plan
from perf.evaluation_cells import CELLS, LEVERS, NamedCell, described, study_of
from perf.evaluation_runs import (
    EvaluationError,
    Scale,
    Task,
    TaskRuns,
    bound_of,
    load_all,
    load_task,
    save_task,
)
from perf.evaluation_summary import Outcome, Ratio, outcome_of, paired, peak
from perf.evaluation_tables import all_tables
from perf.random_cells import cell_named
from perf.rate_search import FULL, QUICK, wanted_seeds
from perf.result import save_json

# ---------------------------------------------------------------------------------------- search


def attainment(rate, true_capacity):
    """Falls through 95 % at the capacity."""
    return float(np.clip(0.95 - 0.8 * (rate / true_capacity - 1), 0.0, 1.0))


def search(grid, true_capacity, start, num_seeds, spread=0.0):
    """Runs the search against a made-up system whose seeds differ in capacity."""
    offsets = spread * np.linspace(-1, 1, num_seeds)
    measured = {}
    while wanted := wanted_seeds(measured, grid, start, num_seeds, 0.95):
        for step, n in wanted.items():
            assert len(measured.get(step, ())) < n <= num_seeds
            assert step % grid.spacing == 0
            rate = grid_rate(step)
            met = [attainment(rate, true_capacity * (1 + offset)) for offset in offsets[:n]]
            measured[step] = [(a, a * rate) for a in met]
    return measured


@pytest.mark.parametrize("grid", [QUICK, FULL])
@pytest.mark.parametrize("start", [0.4, 1.0, 1.36, 4.0])
@pytest.mark.parametrize("spread", [0.0, 0.05])
def test_the_search_finds_capacity_and_peak(grid, start, spread):
    measured = search(grid, 1.37, grid_step(start), 3, spread)
    complete = {s: v for s, v in measured.items() if len(v) == 3}
    found = capacity({s: [a for a, _ in v] for s, v in measured.items()}, 3, 0.95)
    assert found.rate == pytest.approx(1.37, rel=0.02)
    # Goodput r (0.95 - 0.8 (r/c - 1)) is highest at r = 1.09 c, the complete rates come near it.
    highest = max(np.mean([g for _, g in v]) for v in complete.values())
    assert highest == pytest.approx(1.37 * 1.09375 * 0.875, rel=0.03)


def test_a_quick_search_is_short_and_few_rates_are_measured_on_all_seeds():
    measured = search(QUICK, 1.37, grid_step(1.6), 3)
    assert sum(len(v) for v in measured.values()) <= 13
    assert sum(len(v) == 3 for v in measured.values()) <= 4


def test_a_target_out_of_reach_ends_the_search():
    measured = {}
    while wanted := wanted_seeds(measured, QUICK, 0, 3, 0.95):
        measured |= {step: [(0.5, 1.0)] * n for step, n in wanted.items()}
    assert 2 <= len(measured) <= QUICK.max_rates


# --------------------------------------------------------------------------------------- figures


def outcome(rates, num_seeds=3) -> Outcome:
    """Capacity and peak of made-up seeds."""
    runs = {}
    for step in range(grid_step(min(rates)) - 6, grid_step(max(rates)) + 7):
        for seed in range(num_seeds):
            met = attainment(grid_rate(step), rates[seed])
            runs[step, seed] = {
                "slo_attainment": met, "token_goodput": 100 * met * grid_rate(step)
            }  # fmt: skip
    return outcome_of(TaskRuns(Task("A", "shipped", "x"), runs), num_seeds, 0.95)


def test_ratios_are_paired_and_carry_the_error_of_the_mean():
    low, high = outcome([1.0, 1.05, 1.1]), outcome([1.2, 1.26, 1.32])
    same = paired(high, low, "capacity")
    assert same.value == pytest.approx(1.2, rel=0.01) and same.error < 0.01
    assert same.verdict == 1 and paired(low, high, "capacity").verdict == -1
    mixed = paired(outcome([1.0, 1.3, 1.6]), outcome([1.6, 1.3, 1.0]), "capacity")
    assert mixed.error > 0.1 and mixed.verdict == 0
    assert paired(high, low, "peak").value == pytest.approx(1.2, rel=0.02)
    assert paired(high, None, "peak") is None
    # A figure of which seed i gives i: standard error of three values, 1 / sqrt(3).
    spread = peak({0: [9.0, 10.0, 11.0], 3: [5.0, 5.0]}, 3)
    flat = peak({0: [10.0, 10.0, 10.0]}, 3)
    one, other = (
        Outcome(capacity({}, 3, 0.95), found, (), None) for found in (spread, flat)
    )  # fmt: skip
    assert paired(one, other, "peak").error == pytest.approx(0.1 / np.sqrt(3), rel=0.05)


def test_the_peak_is_read_from_complete_rates_alone():
    assert peak({0: [1.0, 3.0], 3: [2.0, 4.0], 6: [9.0]}, 2).rate == 3.0
    assert peak({0: [1.0]}, 2).rate is None


def test_verdicts_are_those_of_the_bounds():
    """Student's t for three seeds is 2.92."""
    found = Ratio(1.1, 0.04, 3), Ratio(0.9, 0.03, 3), Ratio(1.1, 0.03, 3), Ratio(1.1, None, 1)
    assert [ratio.verdict for ratio in found] == [0, -1, 1, 0]


def figures(met) -> dict:
    names = ("plain", "branching", "victims")
    group = dict.fromkeys(
        ("slo_attainment", "p50_tpot_ms", "p99_tpot_ms", "p99_serial_tpot_ms", "p50_stretch",
         "p99_stretch", "mean_width", "mean_join_wait_ms"), met
    )  # fmt: skip
    return {"slo_attainment": met, "token_goodput": met, "p99_ttft_ms": 1.0,
            "groups": dict.fromkeys(names, group)}  # fmt: skip


def measured(task, true_capacity) -> TaskRuns:
    runs = {
        (step, seed): figures(attainment(grid_rate(step), true_capacity))
        for step in range(-12, 24)
        for seed in range(2)
    }
    return TaskRuns(task, runs)


def test_tables_name_what_is_lost_and_tell_the_two_figures_of_regime_p():
    scale = Scale(2, QUICK, 10.0)
    tasks = {
        Task("P", "shipped", "taper"): 1.2, Task("P", "shipped", "irp-off"): 1.0,
        Task("P", "shipped", "step-ceiling:0.9"): 1.3, Task("P", "bare", "taper"): 1.1,
        Task("P", "bare", "irp-off"): 0.8, Task("A", "shipped", "taper"): 1.0,
        Task("P-free-joins", "shipped", "taper"): 1.5, Task("P-cascade", "shipped", "irp-off"): 1.1,
        Task("P", "shipped", "taper:no-slack"): 0.9,
        Task("P-free-extras", "shipped", "irp-eager"): 1.25,
    }  # fmt: skip
    outcomes = {t: outcome_of(measured(t, c), 2, 0.95) for t, c in tasks.items()}
    tables = all_tables(
        outcomes,
        {"P": 1.5, "A": 1.4, "P-free-joins": 2.0, "P-cascade": 2.0, "P-free-extras": 1.5},
        scale,
    )
    by_title = {table.title: {row[0]: row[1:] for row in table.rows} for table in tables}
    against = by_title["TAPER over each rival, SLO capacity"]
    assert against["P"][0].startswith("1.20") and "loses" not in against["P"][0]
    assert against["P"][1].startswith("0.92") and "loses" in against["P"][1]
    assert "A" not in against  # no rival was measured
    score = by_title["Cells won and lost"]["SLO capacity, step-ceiling:0.9"]
    assert score[1:] == ["0", "0", "1", "P"]
    aims = by_title["TAPER over the static policy that is best in each cell, SLO capacity"]
    assert list(aims) == ["P", "median"] and aims["P"][0] == "step-ceiling:0.9"
    ratio, bound, share = aims["P"][1:]
    assert ratio.startswith("0.92") and float(bound) <= 0.92
    assert float(share) == pytest.approx(0.96, abs=0.011)  # of 1.25, which is less than 1.5
    capacities = by_title["SLO capacity, requests per second"]
    assert capacities["P"][:2] == ["1.5", "1.25"] and capacities["A"][:2] == ["1.4", ""]
    assert "P-free-extras" not in capacities
    shipped, bare, both = by_title["Regime P"]["irp-off, SLO capacity"]
    ratios = [float(r[:4]) for r in (shipped, bare, both)]
    assert ratios == pytest.approx([1.2, 1.375, 1.5], abs=0.011)
    levers = by_title["Levers: SLO capacity with other levers over that with the shipped ones"]
    assert [r[:4] for r in levers["P, bare"]] == ["0.92", "0.80"]
    joins = next(rows for title, rows in by_title.items() if title.startswith("Joins"))
    assert joins["P"][0].startswith("1.25")
    cascade = next(rows for title, rows in by_title.items() if title.startswith("Prefix-sharing"))
    assert len(cascade["P"]) == 1 and cascade["P"][0].startswith("1.10")
    ablations = by_title["Variants and ablations over TAPER"]
    assert ablations["P, SLO capacity"][0].startswith("0.75")
    assert not any("no-slack" in row for row in by_title["Cells won and lost"])
    for table in tables:
        assert all(len(row) == len(table.header) for row in table.rows)
        assert table.markdown().count("\n") == len(table.rows) + 4
        table.rich()


# ------------------------------------------------------------------------------------------ plans


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("levers", LEVERS)
def test_every_cell_is_a_study(cell, levers):
    found = study_of(CELLS[cell], "taper", levers, 10.0, 20.0)
    scheduler = found.policies["taper"]
    assert (scheduler.prefill_chunking == "slack") == (levers == "slack-chunks")
    assert (scheduler.request_admission == "slots") == (levers in ("bare", "slots"))
    assert (scheduler.late_requests == "fcfs") == (levers in ("bare", "fcfs"))
    assert scheduler.max_num_requests == (64 if cell == "C" else 512)


def test_random_cells_are_drawn_by_number():
    """Equal numbers give equal cells, and every one of them is a study that can be served."""
    cells = [cell_named(f"random-{i}") for i in range(4)]
    assert len({cell.title for cell in cells}) == 4
    assert random_cells._random_cell.__wrapped__(3) == cells[3]
    for i, cell in enumerate(cells):
        assert bound_of(f"random-{i}") > 0 and cell.quick_duration_s >= 30
        assert described(cell)["profile"] == cell.profile
    for name in ("random-x", "random-", "-free-extras"):
        with pytest.raises(KeyError):
            cell_named(name)


def test_a_cell_can_have_free_extras():
    for name in ("A", "random-2"):
        cell = cell_named(f"{name}-free-extras")
        assert replace(cell, title="", free_extras=False) == replace(cell_named(name), title="")
        assert study_of(cell, "irp-eager", "shipped", 1.0, 1.0).deployment.engine.free_extras


def test_plans_begin_with_what_matters_most():
    quick = plan(True, None, None, None)
    assert list(dict.fromkeys(t.cell for t in quick))[:5] == ["A", "E", "P", "C", "public"]
    assert {t.levers for t in quick if t.cell == "P"} == {"shipped", "bare"}
    full = plan(False, None, None, None)
    assert len(full) == len(set(full)) and set(quick) < set(full)
    cells = {t.cell for t in full}
    assert cells == {*CELLS, *(f"{cell}-free-extras" for cell in CELLS)}
    assert {t.levers for t in full} == set(LEVERS)
    assert plan(True, ["B"], None, None)[-1] == Task("B-free-extras", "shipped", "irp-eager")
    assert {t.cell for t in plan(True, ["B-free-extras"], None, None)} == {"B-free-extras"}
    assert plan(True, ["B"], ["taper"], ["bare"]) == [Task("B", "bare", "taper")]
    assert len({t.path for t in full}) == len(full)


def test_a_file_of_other_settings_is_refused(tmp_path):
    task, scale = Task("A", "shipped", "taper"), Scale(2, QUICK, 10.0)
    saved = measured(task, 1.0)
    save_task(saved, tmp_path, scale)
    assert load_task(task, tmp_path, scale) == saved
    assert load_task(task, tmp_path, replace(scale, num_seeds=5)) == saved
    with pytest.raises(EvaluationError, match=r"taper\.json"):
        load_task(task, tmp_path, replace(scale, duration_s=20.0))
    assert load_task(Task("A", "bare", "taper"), tmp_path, scale) is None
    other = measured(Task("A", "bare", "step-ceiling:0.9"), 1.0)
    save_task(other, tmp_path, scale)
    assert load_all(tmp_path, scale) == {other.task: other, task: saved}
    assert load_all(tmp_path, replace(scale, duration_s=20.0)) == {}


def test_a_file_of_more_seeds_is_searched_as_it_is_read():
    """The first three seeds cross the target elsewhere than all six."""
    capacities = [1.0, 1.0, 1.0, 1.5, 1.5, 1.5]
    found = TaskRuns(Task("A", "shipped", "taper"))
    for num_seeds in (6, 3):
        while wanted := found.wanted(Scale(num_seeds, QUICK, 10.0)):
            for step, seed in wanted:
                met = attainment(grid_rate(step), capacities[seed])
                found.runs[step, seed] = {"slo_attainment": met, "token_goodput": met}
    assert outcome_of(found, 3, 0.95).capacity.rate == pytest.approx(1.0, rel=0.02)


def test_a_policy_that_misses_at_every_rate_is_below_the_lowest():
    task = Task("A", "shipped", "taper")
    runs = {(s, i): figures(0.5) for s in (-3, 0) for i in range(2)}
    found = outcome_of(TaskRuns(task, runs), 2, 0.95)
    assert found.capacity.rate is None and found.below == pytest.approx(10 ** (-3 / 80))


@pytest.mark.parametrize("text", ["{", "[]", '"settings"'])
def test_a_file_that_is_no_result_is_named_or_left_alone(tmp_path, text):
    path = tmp_path / "A" / "shipped" / "taper.json"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    scale = Scale(2, QUICK, 10.0)
    with pytest.raises(EvaluationError, match=r"taper\.json"):
        load_task(Task("A", "shipped", "taper"), tmp_path, scale)
    if text == "{":
        with pytest.raises(EvaluationError, match=r"taper\.json"):
            load_all(tmp_path, scale)
    else:
        assert load_all(tmp_path, scale) == {}


def test_files_of_something_else_are_left_alone(tmp_path):
    task, scale = Task("A", "shipped", "taper"), Scale(2, QUICK, 10.0)
    save_task(measured(task, 1.0), tmp_path, scale)
    content = json.loads((tmp_path / task.path).read_text())
    for change in ({"cell": "of old"}, {"levers": "of old"}, {"scheduler": {}}):
        path = tmp_path / "B" / "shipped" / f"{next(iter(change))}.json"
        save_json(content | {"settings": content["settings"] | change}, path)
    save_json({"results": []}, tmp_path / "other" / "kind" / "file.json")
    assert list(load_all(tmp_path, scale)) == [task]


def test_nothing_runs_before_every_file_is_checked(command, tmp_path, capsys):
    assert main(command) == 0
    out = tmp_path / "out"
    path = out / "P" / "shipped" / "irp-eager.json"
    content = json.loads(path.read_text())
    save_json(content | {"settings": content["settings"] | {"warmup_s": 7}}, path)
    (out / "P" / "shipped" / "taper.json").unlink()
    assert main(command) == 1
    assert "irp-eager.json" in capsys.readouterr().err
    assert not (out / "P" / "shipped" / "taper.json").exists()


# ----------------------------------------------------------------------------------- command line


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Two small cells, in this process."""
    cell = NamedCell(
        "small", "h200_fp8_tp1", replace(SMALL, input_len=(100, 200)), tpot_ms=13, ttft_ms=1000,
        kv_cache_tokens=3000, max_num_requests=16, warmup_s=0.5, quick_duration_s=3, drain_s=5,
    )  # fmt: skip
    for name in ("P", "A"):
        monkeypatch.setitem(CELLS, name, cell)
    monkeypatch.setattr(evaluate, "worker_pool", InThisProcess)
    (tmp_path / "README.md").write_text(f"before\n{MARKERS[0]}\nold\n{MARKERS[1]}\nafter\n")
    return [
        "--quick", "--cells", "P", "--policies", "taper,irp-eager", "--seeds", "2",
        "--levers", "shipped", "--output-dir", str(tmp_path / "out"), "--no-progress",
    ]  # fmt: skip


class InThisProcess:
    """A pool without processes, so that changed cells are seen."""

    def __init__(self, num_processes):
        self.num_runs = 0

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def submit(self, function, *arguments):
        future: Future = Future()
        future.set_result(function(*arguments))
        return future


def test_the_command_measures_resumes_and_reports(command, tmp_path, capsys):
    readme = tmp_path / "README.md"
    assert main([*command, "--readme", str(readme)]) == 0
    out = tmp_path / "out"
    first = {p: p.read_text() for p in sorted(out.rglob("*.json"))}
    assert [p.name for p in first] == ["irp-eager.json", "taper.json"]
    content = json.loads(next(iter(first.values())))
    assert {run["seed"] for run in content["runs"]} == {0, 1}
    assert content["upper_bound_rps"] > 0 and content["settings"]["cell"] == "P"
    assert (out / "P.png").stat().st_size and (out / "ratios.png").stat().st_size
    tables = (out / "tables-2-seeds.md").read_text()
    assert "Everything that was asked for is measured." in tables
    assert tables in readme.read_text() and "old" not in readme.read_text()
    assert readme.read_text().startswith("before") and readme.read_text().endswith("after\n")
    # All is there: nothing runs again. A file cut short is completed, with the same figures.
    capsys.readouterr()
    assert main(command) == 0 and "\n0 runs" in "\n" + capsys.readouterr().out
    path = out / "P" / "shipped" / "taper.json"
    whole = json.loads(path.read_text())
    path.write_text(json.dumps(whole | {"runs": whole["runs"][:1]}))
    assert main(command) == 0
    assert "Everything" in (out / "tables-2-seeds.md").read_text()
    again = {(r["request_rate"], r["seed"]): r for r in json.loads(path.read_text())["runs"]}
    for run in whole["runs"]:
        assert again.get((run["request_rate"], run["seed"]), run) == run


def test_runs_that_take_their_time_are_waited_for_without_a_limit(command, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "worker_pool", ThreadPoolExecutor)
    assert main(command) == 0
    assert "Everything" in (tmp_path / "out" / "tables-2-seeds.md").read_text()


def test_a_run_without_time_says_what_is_missing(command, tmp_path, capsys):
    assert main([*command, "--budget-min", "1e-9"]) == 0
    assert "Not or not wholly measured (2): P shipped taper" in capsys.readouterr().out
    assert not list((tmp_path / "out").rglob("*.json"))


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--cells", "Z"], "'Z'"),
        (["--levers", "all"], "'all'"),
        (["--policies", "tapir"], "tapir"),
        (["--readme", "/dev/null"], "perf.evaluate: begin"),
        (["--readme", "swapped.md"], "below it"),
    ],
)
def test_errors_name_the_option(command, more, named, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "swapped.md").write_text("\n".join(reversed(MARKERS)))
    assert main([*command, *more]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error:") and named in error
