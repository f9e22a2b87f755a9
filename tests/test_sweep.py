from __future__ import annotations

import pytest

from perf.sweep import schedule
from perf.sweep_summary import summarise, summary_tables, verdict


def result(goodput, attained=0.9):
    return {
        "token_goodput": goodput, "request_goodput": goodput / 100, "slo_attainment": attained,
        "mean_width": None,
    }  # fmt: skip


def test_every_cell_runs_once_and_each_policy_takes_every_turn():
    policies = ("a", "b", "c")
    cells = schedule(policies, (0.5, 1.0, 1.5), 3)
    assert len(cells) == len(set(cells)) == 27
    turns = {policy: set() for policy in policies}
    for i, cell in enumerate(cells):
        turns[cell.policy].add(i % 3)
    assert all(turn == {0, 1, 2} for turn in turns.values())
    assert len({cell.filename for cell in cells}) == 27


def test_differences_are_paired_by_repetition():
    """The repetitions differ by far more than the policies; pairing must see through that."""
    cells = {
        "taper": {0.5: [result(110), result(910)], 1.0: [result(130), result(930)]},
        "irp-off": {0.5: [result(100), result(900)], 1.0: [result(100), result(900)]},
    }
    summary = summarise(cells)
    rows = summary["differences"]["irp-off"]
    assert rows["0.5"] == {"mean": 10, "std": 0} and rows["1"]["mean"] == 30
    assert rows["all"]["mean"] == 20 and rows["all"]["std"] == 0
    assert rows["all"]["ratio"] == pytest.approx(520 / 500)
    assert summary["figures"]["taper"]["0.5"]["token_goodput"]["std"] == pytest.approx(565.7, 0.01)
    assert len(summary_tables(summary)) == 3


def test_a_difference_within_its_spread_is_a_tie():
    assert verdict({"mean": 5.0, "std": 6.0}) == "tie"
    assert verdict({"mean": 7.0, "std": 6.0}) == "win"
    assert verdict({"mean": -7.0, "std": 6.0}) == "loss"


def test_without_the_reference_there_are_no_differences():
    summary = summarise({"irp-off": {1.0: [result(100)]}})
    assert summary["differences"] == {} and len(summary_tables(summary)) == 2
