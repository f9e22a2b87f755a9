"""The server's own figures: its Prometheus page before and after a run."""

from __future__ import annotations

import re
import urllib.request
from dataclasses import dataclass

from taper_trtllm import metrics as names

_SAMPLE = re.compile(r"^(?P<name>[A-Za-z_:][\w:]*)(?:\{(?P<labels>.*)\})?\s+(?P<value>\S+)")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True, slots=True)
class MetricsPage:
    """The samples of one page.

    Attributes:
        samples: (name, labels, value) of every sample whose name begins with ``taper_``.
    """

    samples: tuple[tuple[str, dict[str, str], float], ...]

    @property
    def policy(self) -> str | None:
        """The policy that the server runs; None if its metrics do not say."""
        return next((labels["policy"] for _, labels, _ in self.samples if "policy" in labels), None)

    def total(self, name: str) -> float | None:
        """Sum of a metric over its labels; None if there is no such metric."""
        values = [value for sample, _, value in self.samples if sample == name]
        return sum(values) if values else None


def parse_metrics(text: str) -> MetricsPage:
    """Reads a page in Prometheus' text format."""
    samples = []
    for line in text.splitlines():
        match = _SAMPLE.match(line)
        if match and match["name"].startswith("taper_"):
            labels = dict(_LABEL.findall(match["labels"] or ""))
            samples.append((match["name"], labels, float(match["value"])))
    return MetricsPage(tuple(samples))


def scrape(url: str, timeout_s: float = 10.0) -> MetricsPage:
    """Reads the page of a server.

    Raises:
        OSError: There is no page at the URL.
    """
    with urllib.request.urlopen(url, timeout=timeout_s) as response:
        return parse_metrics(response.read().decode())


def server_figures(before: MetricsPage, after: MetricsPage) -> dict[str, float | None]:
    """What the server did between two pages; None where there is nothing to divide by."""

    def increase(name: str) -> float:
        return (after.total(name) or 0.0) - (before.total(name) or 0.0)

    def ratio(part: float, whole: float) -> float | None:
        return part / whole if whole else None

    def mean(name: str) -> float | None:
        return ratio(increase(f"{name}_sum"), increase(f"{name}_count"))

    def milliseconds(seconds: float | None) -> float | None:
        return None if seconds is None else 1e3 * seconds

    branched_steps = increase(names.BRANCHED_STEPS)
    reused = increase(names.REUSED_TOKENS)
    return {
        "num_steps": increase(f"{names.STEP_DURATION}_count"),
        "mean_step_ms": milliseconds(mean(names.STEP_DURATION)),
        "mean_step_width": mean(names.WIDTH),
        "num_branched_steps": branched_steps,
        "num_admitted_branch_steps": increase(names.ADMITTED_BRANCHES),
        "num_deferred_branch_steps": increase(names.DEFERRED_BRANCHES),
        "mean_predicted_branch_externality_ms": milliseconds(
            ratio(increase(names.EXTERNALITY_PREDICTED), branched_steps)
        ),
        "mean_branch_externality_ms": milliseconds(
            ratio(increase(names.EXTERNALITY_REALISED), branched_steps)
        ),
        "mean_probe_residual_ms": milliseconds(
            ratio(increase(names.PROBE_RESIDUAL), increase(names.PROBE_STEPS))
        ),
        "predictor_mape": mean(names.PREDICTION_ERROR),
        "kv_cache_hit_rate": ratio(reused, reused + increase(names.PREFILL_TOKENS)),
        "num_recomputed_tokens": increase(names.RECOMPUTED_TOKENS),
        "num_preempted_sequences": increase(names.PREEMPTED_SEQUENCES),
        "time_to_cancel_ms": milliseconds(mean(names.CANCEL_LATENCY)),
    }
