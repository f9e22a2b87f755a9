"""Workload traces: token counts and arrival times of real requests, read from CSV.

The format is described in `perf/workloads/README.md`.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taper_trtllm.request import MAX_DEPTH, MAX_FAN_OUT

HEADER_TOKENS = 4

TraceStages = list[Any]


class TraceError(ValueError):
    """A trace that cannot be replayed, naming the file, the line and the field."""


@dataclass(frozen=True, slots=True)
class TraceRow:
    """One request of a trace.

    Attributes:
        arrival_s: Arrival since the start of the trace; None if the file has no arrivals.
        prompt_tokens: Prompt length.
        stages: The program, as `["s", n]` and `["p", h, [b...], c]`.
        family: Kind of request, as the file names it.
    """

    arrival_s: float | None
    prompt_tokens: int
    stages: TraceStages
    family: str


def read_trace(path: str | Path) -> list[TraceRow]:
    """Reads a trace.

    Raises:
        TraceError: The file cannot be read, or a field of it is missing or malformed.
    """
    path = Path(path)
    try:
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            fields = set(reader.fieldnames or ())
            for needed in ("prompt_tokens", "output_tokens"):
                if needed not in fields:
                    raise TraceError(f"{path}: no column {needed}")
            rows = [_read_row(row, f"{path}:{n}") for n, row in enumerate(reader, start=2)]
    except OSError as error:
        raise TraceError(f"{path}: {error.strerror}") from None
    if not rows:
        raise TraceError(f"{path}: no rows")
    return rows


def _read_row(row: dict[str, str], where: str) -> TraceRow:
    output_tokens = _count(row["output_tokens"], f"{where}: output_tokens", minimum=1)
    stages: TraceStages = [["s", output_tokens]]
    if row.get("stages"):
        try:
            stages = json.loads(row["stages"])
        except ValueError as error:
            raise TraceError(f"{where}: stages: not valid JSON ({error})") from None
        _check_stages(stages, f"{where}: stages", depth=0)
    arrival = row.get("arrival_s")
    try:
        arrival_s = float(arrival) if arrival else None
    except ValueError:
        raise TraceError(f"{where}: arrival_s: not a number (got {arrival!r})") from None
    if arrival_s is not None and not math.isfinite(arrival_s):
        raise TraceError(f"{where}: arrival_s: must be finite (got {arrival!r})")
    prompt_tokens = _count(row["prompt_tokens"], f"{where}: prompt_tokens", minimum=1)
    return TraceRow(arrival_s, prompt_tokens, stages, row.get("family") or "plain")


def _count(value: Any, where: str, minimum: int) -> int:
    try:
        count = int(value)
    except (TypeError, ValueError):
        raise TraceError(f"{where}: not a whole number (got {value!r})") from None
    if count < minimum:
        raise TraceError(f"{where}: must be at least {minimum} (got {count})")
    return count


def _check_stages(stages: Any, where: str, depth: int) -> None:
    if not isinstance(stages, list) or not stages:
        raise TraceError(f"{where}: must be a non-empty list")
    for i, stage in enumerate(stages):
        at = f"{where}[{i}]"
        match stage:
            case ["s", n]:
                _count(n, at, minimum=0)
            case ["p", plan, [*branches], reduce]:
                _count(plan, f"{at} plan", minimum=0)
                _count(reduce, f"{at} reduce", minimum=0)
                _check_branches(branches, at, depth + 1)
            case _:
                raise TraceError(f'{at}: expected ["s", n] or ["p", h, [b...], c]')


def _check_branches(branches: list[Any], where: str, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise TraceError(f"{where}: nested deeper than {MAX_DEPTH}")
    if not 1 <= len(branches) <= MAX_FAN_OUT:
        raise TraceError(f"{where}: fan-out {len(branches)} is outside 1..{MAX_FAN_OUT}")
    for j, branch in enumerate(branches):
        if isinstance(branch, list):
            _check_stages(branch, f"{where} branch {j}", depth)
        else:
            _count(branch, f"{where} branch {j}", minimum=1)


def scale_count(n: int, scale: float) -> int:
    """A token count after scaling: at least 1, and 0 stays 0."""
    return max(1, round(n * scale)) if n else 0


def to_wire_stages(
    stages: TraceStages, scale: float, headers: Iterator[int], vocab_size: int
) -> list[dict[str, Any]]:
    """Turns a trace program into the `stages` of a request.

    A decoded plan and a reduce become serial stages around their parallel stage; each branch gets a
    header of `HEADER_TOKENS` given tokens that differs from its siblings' in the first one.

    Args:
        stages: The program of a trace row.
        scale: Factor on every decoded count.
        headers: Endless source of random token ids.
        vocab_size: Ids are in [0, vocab_size).
    """
    wire: list[dict[str, Any]] = []
    for stage in stages:
        if stage[0] == "s":
            _append_serial(wire, scale_count(stage[1], scale))
            continue
        _, plan, branches, reduce = stage
        _append_serial(wire, scale_count(plan, scale))
        first = next(headers)
        wire.append(
            {
                "type": "parallel",
                "branches": [
                    {
                        "header_ids": [
                            (first + j) % vocab_size,
                            *(next(headers) for _ in range(HEADER_TOKENS - 1)),
                        ],
                        **_branch_body(branch, scale, headers, vocab_size),
                    }
                    for j, branch in enumerate(branches)
                ],
            }
        )
        _append_serial(wire, scale_count(reduce, scale))
    return wire


def _append_serial(wire: list[dict[str, Any]], max_tokens: int) -> None:
    if max_tokens:
        wire.append({"type": "serial", "max_tokens": max_tokens})


def _branch_body(
    branch: int | TraceStages, scale: float, headers: Iterator[int], vocab_size: int
) -> dict[str, Any]:
    if isinstance(branch, list):
        return {"stages": to_wire_stages(branch, scale, headers, vocab_size)}
    return {"max_tokens": scale_count(branch, scale)}
