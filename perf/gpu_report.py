"""The results of `perf.gpu` as one Markdown page with plots, from the files of its parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from perf.plots import colours
from perf.result import load_json

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

Result = dict[str, Any]

PAGE, LATENCY_PLOT, LIVE_PLOT = "results.md", "step_latency.png", "live.png"
_WIDTHS, _CONTEXTS = (1, 8, 32, 64, 128, 256, 512), (128, 512, 2048, 8192)


def write_report(directory: Path) -> Path:
    """Writes the page and the plots of what the directory holds; returns the page's path."""
    run = load_json(directory / "run.json")
    results = {
        name: load_json(directory / f"{name}.json")
        for name in _SECTIONS
        if (directory / f"{name}.json").exists()
    }
    lines = _header(run)
    for name, section in _SECTIONS.items():
        status = run["parts"].get(name, {})
        if status.get("status") in ("failed", "skipped"):
            lines += ["", f"**{name}: {status['status']}**: {status['error']}"]
        if name in results:
            lines += ["", f"## {name}", "", *section(results[name])]
            if results[name]["provenance"]["date"] != run["date"]:  # of another run
                lines += ["", _origin(results[name]["provenance"])]
    if "roofline" in results:
        plot_latency(results["roofline"], directory / LATENCY_PLOT)
    if "live" in results:
        plot_live(results["live"], results.get("agreement"), directory / LIVE_PLOT)
    page = directory / PAGE
    page.write_text("\n".join(lines) + "\n")
    return page


def _header(run: Result) -> list[str]:
    engine, versions = run["engine"], run["versions"]
    shape = engine["random_model"]
    model = engine["model_dir"] or (
        f"random Qwen3, {shape['num_hidden_layers']} layers of {shape['hidden_size']}, "
        f"{shape['num_attention_heads']}/{shape['num_key_value_heads']} heads of "
        f"{shape['head_dim']}, vocabulary {shape['vocab_size']}"
    )
    return [
        f"# {run['device']}, {run['date'][:10]}",
        "",
        f"`{run['command']}`, commit {(run['git_sha'] or 'unknown')[:10]}",
        "",
        f"{model}; {engine['dtype']}; {engine['num_kv_blocks']} KV blocks of "
        f"{engine['tokens_per_block']} tokens. "
        + ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
        + ".",
    ]


def _origin(source: Result) -> str:
    return f"({source['date']}, commit {(source['git_sha'] or 'unknown')[:10]})"


def _verdict(is_passed: bool | None) -> str:
    return {None: "not measured", True: "kept", False: "**missed**"}[is_passed]


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [columns, ["---"] * len(columns), *rows]
    return [f"| {' | '.join(row)} |" for row in cells]


# ------------------------------------------------------------------------------------- sections


def _correctness(result: Result) -> list[str]:
    if "skipped" in result:
        return [f"Skipped: {result['skipped']}."]
    lines = [
        "Errors of logits are relative to their standard deviation, against Hugging Face in "
        "float32; in a shorter type the bound is 1.5 times the error of Hugging Face in that type.",
        "",
    ]
    rows = []
    for dtype, check in result["dtypes"].items():
        logits = check["logits"]
        if "skipped" in logits:
            lines.append(f"{dtype}: logits not compared, {logits['skipped']}.")
            continue
        rows.append(
            [
                dtype,
                f"{logits['rms_error']:.2g}",
                f"{logits['bound']:.2g}",
                f"{logits['largest_error']:.2g}",
                f"{logits['same_argmax']:.1%}",
                str(logits["num_logit_vectors"]),
                _verdict(logits["is_passed"]),
            ]
        )
    columns = ("type", "RMS error", "bound", "largest", "same argmax", "vectors", "")
    lines += _table(columns, rows)
    lines += ["", "Tokens under each policy against irp-eager, by stage of a branch:", ""]
    rows = [
        [
            dtype,
            row["policy"],
            str(row["num_deferred"]),
            f"{row['num_compared'] - row['num_differing']} of {row['num_compared']}",
            "-" if row["largest_gap"] is None else f"{row['largest_gap']:.2g}",
        ]
        for dtype, check in result["dtypes"].items()
        for row in check["deferral"]
    ]
    columns = ("type", "policy", "deferred branch steps", "equal", "largest logit gap where not")
    lines += _table(columns, rows)
    return [*lines, "", f"Tolerances {_verdict(result['is_passed'])}."]


def _calibration(result: Result) -> list[str]:
    return [
        f"{result['num_points']} of {result['num_grid_points']} grid points fit in memory and time "
        f"({result['num_widths']} widths, contexts up to {result['longest_context']}). On "
        f"{result['num_checks']} random batches that were not fitted: MAPE {result['mape']:.1%} "
        f"(wanted {result['wanted_mape']:.0%}: {_verdict(result['is_passed'])}), externality error "
        f"{result['externality_error']:.1%}."
    ]


def _roofline(result: Result) -> list[str]:
    lines = [
        f"Copies inside the memory move {result['bandwidth_bytes_per_s'] / 1e12:.3f} TB/s, read "
        f"and written bytes counted. A step reads {result['weight_bytes'] / 1e9:.3f} GB of weights "
        f"and {result['kv_bytes_per_token'] / 1e3:.1f} kB per context token.",
        "",
    ]
    rows = []
    for want in result["wanted"]:
        ratio = "-" if want["ratio"] is None else f"{want['ratio']:.2f}"
        rows.append(
            [f"{want['width']} x {want['context_tokens']}", ratio, f"{want['bar']:.2f}",
             _verdict(want["is_kept"])]
        )  # fmt: skip
    lines += _table(("sequences x context", "step over floor", "wanted", ""), rows)
    lines += ["", "Step in ms (over the floor), by sequences and nearest measured context:", ""]
    rows = []
    for width in sorted({p["width"] for p in result["points"]} & set(_WIDTHS)):
        cells = [_nearest(result["points"], width, context) for context in _CONTEXTS]
        rows.append([str(width), *cells])
    lines += _table(("", *map(str, _CONTEXTS)), rows)
    return [*lines, "", f"![Step latency]({LATENCY_PLOT})"]


def _nearest(points: Sequence[Result], width: int, context: int) -> str:
    near = [p for p in points if p["width"] == width and 0.75 < p["context_tokens"] / context < 1.4]
    if not near:
        return "-"
    point = min(near, key=lambda p: abs(p["context_tokens"] - context))
    return f"{point['step_ms']:.2f} ({point['ratio']:.2f})"


def _live(result: Result) -> list[str]:
    regime = result["regime"]
    lines = [
        f"tau {regime['tpot_slo_ms']:.1f} ms, Y {regime['ttft_slo_ms']:.0f} ms, "
        f"{regime['max_num_requests']} slots, {regime['num_kv_blocks']} KV blocks, chunks of "
        f"{regime['max_prefill_tokens']}, R0 {regime['reference_rate']:.2f} requests/s, host time "
        f"{result['host_ms']:.2f} ms per step. {result['repetitions']} paired repetitions of "
        f"{result['window_s']:.0f} s of arrivals; load: {result['choice']}.",
        "",
    ]
    rows = [
        [
            policy, load, _spread(figures.get("token_goodput"), 1, ".0f"),
            _spread(figures.get("slo_attainment"), 100, ".1f"),
            _spread(figures.get("request_goodput"), 1, ".2f"),
            _spread(figures.get("mean_width"), 1, ".2f"),
        ]
        for policy, by_load in result["figures"].items()
        for load, figures in by_load.items()
    ]  # fmt: skip
    columns = ("policy", "load (R0)", "token goodput (tok/s)", "attainment (%)",
               "request goodput (req/s)", "mean width, branching")  # fmt: skip
    lines += _table(columns, rows)
    if result["differences"]:
        rows = [
            [rival, _spread(by_load["all"], 1, "+.0f"), _ratio(by_load["all"]["ratio"])]
            for rival, by_load in result["differences"].items()
        ]
        columns = (f"{result['reference']} minus", "token goodput (tok/s), paired", "ratio")
        lines += ["", *_table(columns, rows)]
    return [*lines, "", f"![Live comparison]({LIVE_PLOT})"]


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _spread(value: Result | None, scale: float, form: str) -> str:
    if value is None:
        return "-"
    mean = format(scale * value["mean"], form)
    if value["std"] is None:
        return mean
    return f"{mean} ± {format(scale * value['std'], form.lstrip('+'))}"


def _agreement(result: Result) -> list[str]:
    rows = []
    for row in result["rows"]:
        pairs = [
            f"{_spread(row[name]['live'], scale, form)} / "
            f"{_spread(row[name]['simulated'], scale, form)}"
            for name, scale, form in (
                ("token_goodput", 1, ".0f"), ("slo_attainment", 100, ".1f"),
                ("mean_step_ms", 1, ".2f"),
            )
        ]  # fmt: skip
        rows.append(
            [row["policy"], f"{row['load']:g}", *pairs, f"{row['difference']:+.1%}",
             _verdict(row["is_kept"])]
        )  # fmt: skip
    columns = ("policy", "load (R0)", "token goodput, live / simulated", "attainment (%)",
               "mean step (ms)", "difference", f"{result['bar']:.0%} or spread")  # fmt: skip
    return _table(columns, rows)


_SECTIONS: dict[str, Callable[[Result], list[str]]] = {
    "correctness": _correctness,
    "calibration": _calibration,
    "roofline": _roofline,
    "live": _live,
    "agreement": _agreement,
}


# ---------------------------------------------------------------------------------------- plots


def plot_latency(result: Result, path: Path) -> None:
    """Step latency over width and over context, the floor dashed.

    Args:
        result: Of the part ``roofline``.
        path: PNG to write.
    """
    figure, axes = plt.subplots(1, 2, figsize=(13, 5))
    points = result["points"]
    contexts = sorted({p["context_tokens"] for p in points})
    by_context = [
        [p for p in points if 0.9 < p["context_tokens"] / c < 1.1]
        for c in np.array(contexts)[np.linspace(0, len(contexts) - 1, 5).round().astype(int)]
    ]
    widths = sorted({p["width"] for p in points})
    by_width = [
        [p for p in points if p["width"] == w]
        for w in np.array(widths)[np.linspace(0, len(widths) - 1, 5).round().astype(int)]
    ]
    for groups, axis, key, other in (
        (by_context, axes[0], "width", "context_tokens"),
        (by_width, axes[1], "context_tokens", "width"),
    ):
        _draw_latency(axis, groups, key, other)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_latency(axis: Axes, groups: Sequence[Sequence[Result]], key: str, other: str) -> None:
    names = {"width": "sequences", "context_tokens": "context tokens"}
    for group in groups:
        ordered = sorted(group, key=lambda p: p[key])
        values = [p[key] for p in ordered]
        median = int(np.median([p[other] for p in ordered]))
        (line,) = axis.plot(
            values, [p["step_ms"] for p in ordered], marker=".", label=f"{median} {names[other]}"
        )
        axis.plot(values, [p["floor_ms"] for p in ordered], "--", color=line.get_color(), lw=0.8)
    axis.set(xscale="log", yscale="log", xlabel=names[key], ylabel="decode step (ms)")
    axis.set_title("dashed: weights and KV at the copy bandwidth", fontsize="medium")
    axis.grid(alpha=0.25, which="both")
    axis.legend(fontsize="small")


def plot_live(result: Result, agreement: Result | None, path: Path) -> None:
    """Goodput and attainment by policy: mean, spread, and what the simulation says.

    Args:
        result: Of the part ``live``.
        agreement: Of the part ``agreement``, if it ran.
        path: PNG to write.
    """
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5))
    policies = list(result["figures"])
    loads = list(next(iter(result["figures"].values())))
    simulated = {(r["policy"], f"{r['load']:g}"): r for r in (agreement or {"rows": []})["rows"]}
    places, size = np.arange(len(loads)), 0.8 / len(policies)
    panels = (("token_goodput", "tokens/s of requests that met their SLO"),
              ("slo_attainment", "share of requests that met it"))  # fmt: skip
    for axis, (name, label) in zip(axes, panels, strict=True):
        for i, (policy, colour) in enumerate(colours(policies).items()):
            values = [result["figures"][policy][load][name] for load in loads]
            means, spreads = [v["mean"] for v in values], [v["std"] or 0.0 for v in values]
            at = places + (i + 0.5) * size - 0.4
            axis.bar(at, means, size, yerr=spreads, color=colour, label=policy, capsize=3)
            for x, load in zip(at, loads, strict=True):
                if (policy, load) in simulated:
                    mean = simulated[policy, load][name]["simulated"]["mean"]
                    axis.plot(x, mean, "D", color="black", markersize=5)
        axis.set(ylabel=label, xlabel="load (multiple of R0)")
        axis.set_xticks(places, loads)
    axes[0].legend(fontsize="small")
    figure.suptitle("Live (bars), simulated on the measured profile (diamonds)")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
