"""The study of leases: the adapter in virtual time, beside true per-step gating."""

from __future__ import annotations

import json

import pytest

from perf.leases import main, share
from perf.simulation import Deployment
from perf.virtual_trtllm import Leases, VirtualTrtllmEngine

SHORT = ["--warmup-s", "2", "--duration-s", "6", "--rate-scale", "0.6", "--seeds", "1"]


def test_the_study_writes_what_it_shows(tmp_path, capsys):
    arguments = ["--cells", "lists", "--policies", "taper,irp-off", "--lease-tokens", "2,64"]
    assert main([*arguments, *SHORT, "--output-dir", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "leases.json").read_text())["results"]
    assert [(r["policy"], r["mode"], r["lease_tokens"]) for r in results] == [
        ("irp-off", "lease", 256),
        ("irp-off", "per step", 0),
        ("taper", "lease", 2),
        ("taper", "lease", 64),
        ("taper", "per step", 0),
    ]
    *_, short, long, per_step = results
    assert per_step["losses"] is None
    assert short["losses"]["num_reentries"] > 5 * long["losses"]["num_reentries"] > 0
    kept = share(results, long, "token_goodput")
    assert kept is not None and kept[0] == pytest.approx(
        long["figures"]["token_goodput"] / per_step["figures"]["token_goodput"]
    )
    assert kept[0] > 0.9  # far below capacity
    shown = capsys.readouterr().out
    assert "lease 64" in shown and "per step" in shown
    assert (tmp_path / "leases.png").stat().st_size > 1000


def test_a_run_is_the_same_bit_for_bit(tmp_path):
    arguments = ["--cells", "lists", "--policies", "taper", "--lease-tokens", "16"]
    texts = []
    for name in ("one", "two"):
        assert main([*arguments, *SHORT, "--output-dir", str(tmp_path / name)]) == 0
        texts.append(json.loads((tmp_path / name / "leases.json").read_text())["results"])
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [("--cells", "E", "not a cell"), ("--policies", "best", "policy"), ("--seeds", "0", "seeds")],
)
def test_what_cannot_be_run_is_named(argument, value, message, capsys):
    with pytest.raises(SystemExit) as end:
        raise SystemExit(main([argument, value]))
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_prefill_elsewhere_is_refused():
    from perf.evaluation_cells import CELLS, study_of

    deployment: Deployment = study_of(CELLS["E"], "taper", "shipped", 1, 1).deployment
    with pytest.raises(ValueError, match="prompt"):
        VirtualTrtllmEngine(deployment.truth, deployment.engine, Leases())
