"""How far a decode step is from the least time in which its bytes can be read."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import torch

from perf.gpu_model import ModelBytes
from taper_trtllm.profile import LatencyProfile

WANTED = {(1, 2048): 1.25, (64, 2048): 1.5}  # largest ratio to the floor, by width and context
_COPY_BYTES = {"cpu": 1 << 27, "cuda": 1 << 31}  # far beyond any cache
_NUM_COPIES = 8


def copy_bandwidth(device: str) -> float:
    """Bytes per second that a copy inside the device's memory moves, read *and* written ones."""
    num_bytes = _COPY_BYTES[device.split(":")[0]]
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times_s = []
    for _ in range(_NUM_COPIES + 2):  # the first ones warm up
        start_s = time.perf_counter()
        target.copy_(source)
        if device != "cpu":
            torch.cuda.synchronize(device)
        times_s.append(time.perf_counter() - start_s)
    return 2 * num_bytes / median(times_s[2:])


def roofline(profile: LatencyProfile, size: ModelBytes, bandwidth: float) -> dict[str, Any]:
    """Every decode point of a profile beside its floor: weights and KV over the bandwidth.

    Args:
        profile: Of the engine alone.
        size: Of its model.
        bandwidth: Bytes per second.

    Returns:
        ``points``: width, context_tokens, step_ms, floor_ms and their ratio. ``wanted``: those of
        `WANTED` by the nearest measured context, with the bar and whether it is kept; ratio None
        where the pool was too small to measure it.
    """
    points = []
    for point in profile.decode:
        floor_ms = 1e3 * size.step(point.width, point.context_tokens) / bandwidth
        ratio = point.step_ms / floor_ms
        points.append({**point.model_dump(), "floor_ms": floor_ms, "ratio": ratio})
    return {
        "bandwidth_bytes_per_s": bandwidth,
        "weight_bytes": size.weights,
        "kv_bytes_per_token": size.kv_per_token,
        "points": points,
        "wanted": [_wanted(points, *at, bar) for at, bar in WANTED.items()],
    }


def _wanted(points: list[dict[str, Any]], width: int, context: int, bar: float) -> dict[str, Any]:
    near = [p for p in points if p["width"] == width and 0.8 < p["context_tokens"] / context < 1.25]
    row = {"width": width, "context_tokens": context, "bar": bar, "ratio": None, "is_kept": None}
    if near:
        best = min(near, key=lambda p: abs(p["context_tokens"] - context))
        row |= {**best, "is_kept": best["ratio"] <= bar}
    return row
