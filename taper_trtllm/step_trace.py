"""Step records as files: JSON lines to grep, a Chrome trace to look at.

`python -m taper_trtllm.step_trace steps.jsonl trace.json` turns a step log (`step_log` in the
serving configuration) into a trace for chrome://tracing or https://ui.perfetto.dev.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from taper_trtllm.batch import StepRecord


def record_json(record: StepRecord) -> dict[str, Any]:
    """A record as JSON values; each refusal is [request id, branch path, reason]."""
    values: dict[str, Any] = {field.name: getattr(record, field.name) for field in fields(record)}
    values["refusals"] = [[r, path, reason.value] for r, path, reason in record.refused_leaves]
    values["predicted_externality_ms"] = record.predicted_externality_ms
    values["realised_externality_ms"] = record.realised_externality_ms
    return values


class StepLog:
    """Writes every step to a JSONL file, anew; register `write` with `add_step_observer`."""

    def __init__(self, path: str | Path) -> None:
        self._file = Path(path).open("w")  # noqa: SIM115  (closed by `close`)

    def write(self, record: StepRecord) -> None:
        """Writes one record; the file is buffered, so that a step does not wait for the disk."""
        self._file.write(json.dumps(record_json(record)) + "\n")

    def close(self) -> None:
        """Flushes and closes the file."""
        self._file.close()


def chrome_trace(steps: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """A Chrome trace of steps as `record_json` gives them.

    One slice for each step with its plan before it, and counters for width, deferred branches,
    slack and budget.
    """
    return {"displayTimeUnit": "ms", "traceEvents": list(_events(steps))}


def _events(steps: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for step in steps:
        start_us = step["started_at_s"] * 1e6
        end_us = step["completed_at_s"] * 1e6
        plan_us = step["plan_ms"] * 1e3
        name = f"{step['num_admitted']} of {step['num_ready']} leaves"
        if step["num_prefill_tokens"]:
            name += f" + {step['num_prefill_tokens']} prefill tokens"
        common = {"pid": step["policy"], "tid": "executor", "ph": "X"}
        yield {**common, "name": "plan", "ts": start_us, "dur": plan_us}
        begin_us = start_us + plan_us
        yield {**common, "name": name, "ts": begin_us, "dur": end_us - begin_us, "args": step}
        counters = {
            "width": {"baseline": step["num_requests"], "extras": step["num_extras"]},
            "deferred": {"branches": len(step["refusals"])},
            "queued": {"requests": step["num_queued"]},
            "time_ms": {
                key: step[f"{key}_ms"]
                for key in ("step", "budget", "min_slack")
                if step[f"{key}_ms"] is not None
            },
        }
        for counter, values in counters.items():
            yield {
                "pid": step["policy"], "ph": "C", "name": counter, "ts": end_us, "args": values,
            }  # fmt: skip


def main() -> int:
    """Converts a step log into a Chrome trace."""
    parser = argparse.ArgumentParser(
        prog="python -m taper_trtllm.step_trace",
        description="Turn a step log (JSONL) into a Chrome trace.",
    )
    parser.add_argument("step_log", type=Path, help="JSONL file written through `step_log`")
    parser.add_argument("output", type=Path, help="Chrome trace to write")
    arguments = parser.parse_args()
    try:
        lines = arguments.step_log.read_text().splitlines()
        trace = chrome_trace(json.loads(line) for line in lines)
    except (OSError, ValueError, KeyError) as error:
        print(f"error: {arguments.step_log} is not a step log: {error}", file=sys.stderr)
        return 1
    arguments.output.write_text(json.dumps(trace))
    print(f"wrote {len(lines)} steps to {arguments.output}; open it in chrome://tracing")
    return 0


if __name__ == "__main__":
    sys.exit(main())
