"""Latency profiles: measured step times of one engine on one device, as versioned JSON.

A profile is written by `python -m engine_build calibrate`. It names what it was measured on;
serving another engine, model, device or version with it is refused, because a wrong profile
silently costs goodput.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from taper_trtllm.batch import FloatArray, PrefillLoad


class ProfileError(ValueError):
    """A profile that cannot be used, with the reason and what to do."""


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


_Milliseconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class DecodePoint(_Model):
    """One decode-only grid point: `width` sequences with `context_tokens` each."""

    width: Annotated[int, Field(ge=1)]
    context_tokens: Annotated[int, Field(ge=1)]
    step_ms: _Milliseconds


class PrefillPoint(_Model):
    """One step with prefill, beside `width` decoding sequences of `context_tokens` each."""

    width: Annotated[int, Field(ge=0)]
    context_tokens: Annotated[int, Field(ge=0)]
    num_chunks: Annotated[int, Field(ge=1)]
    num_tokens: Annotated[int, Field(ge=1)]
    token_context: Annotated[float, Field(ge=0)]
    step_ms: _Milliseconds

    @property
    def load(self) -> PrefillLoad:
        """The prefill work of the point."""
        return PrefillLoad(self.num_chunks, self.num_tokens, self.token_context)


_Point = TypeVar("_Point", DecodePoint, PrefillPoint)


class LatencyProfile(_Model):
    """Measured step times.

    Attributes:
        fingerprint: What the times depend on (`Engine.fingerprint`).
        provenance: Where they come from: tool, date, repetitions, licence of foreign data.
        width_buckets: Padded decode widths of the engine; None if it does not pad.
        shared_context_weight: Cost of a context token that another sequence of the request reads
            in the same step, as a share of one that nobody else reads. For engines that read it
            once (`EngineCapabilities.prefix_sharing_attention`): 0 where computing is free.
        decode: Decode grid; at least two widths, and two contexts for each.
        prefill: Steps with prefill.
    """

    schema_version: Literal[1] = 1
    fingerprint: dict[str, str]
    provenance: dict[str, str] = {}
    width_buckets: tuple[int, ...] | None = None
    shared_context_weight: Annotated[float, Field(ge=0, le=1)] = 0.0
    decode: Annotated[tuple[DecodePoint, ...], Field(min_length=4)]
    prefill: Annotated[tuple[PrefillPoint, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _can_be_fitted(self) -> LatencyProfile:
        contexts: dict[int, set[int]] = {}
        for point in self.decode:
            contexts.setdefault(point.width, set()).add(point.context_tokens)
        if len(contexts) < 2 or any(len(values) < 2 for values in contexts.values()):
            raise ValueError("decode needs at least two widths, each at two contexts")
        return self

    def padded_widths(self, max_width: int) -> FloatArray:
        """[max_width + 1] the width at which each decode width runs: itself without buckets."""
        widths = np.arange(max_width + 1).astype(float)
        if self.width_buckets is None:
            return widths
        buckets = np.array(sorted(self.width_buckets), dtype=float)
        above = np.minimum(np.searchsorted(buckets, widths), len(buckets) - 1)
        padded: FloatArray = np.maximum(buckets[above], widths)
        return padded

    def with_host_time(self, host_ms: float) -> LatencyProfile:
        """The profile of steps that take so much longer; noted in the provenance."""
        provenance = {**self.provenance, "host_ms": f"{host_ms:.3f}"}
        slower = self._with_times(lambda step_ms: step_ms + host_ms)
        return slower.model_copy(update={"provenance": provenance})

    def scaled(self, factor: float) -> LatencyProfile:
        """The profile of steps that take so many times as long."""
        return self._with_times(lambda step_ms: step_ms * factor)

    def _with_times(self, change: Callable[[float], float]) -> LatencyProfile:
        def changed(points: tuple[_Point, ...]) -> tuple[_Point, ...]:
            return tuple(p.model_copy(update={"step_ms": change(p.step_ms)}) for p in points)

        return self.model_copy(
            update={"decode": changed(self.decode), "prefill": changed(self.prefill)}
        )

    def check_fingerprint(self, fingerprint: Mapping[str, str]) -> None:
        """Refuses a profile of something else.

        Raises:
            ProfileError: Lists every differing entry.
        """
        keys = sorted(self.fingerprint.keys() | fingerprint.keys())
        differing = [
            f"{key}: profile {self.fingerprint.get(key, 'absent')!r}, "
            f"engine {fingerprint.get(key, 'absent')!r}"
            for key in keys
            if self.fingerprint.get(key) != fingerprint.get(key)
        ]
        if differing:
            raise ProfileError(
                "the latency profile was measured on something else ("
                + "; ".join(differing)
                + "); calibrate again with `python -m engine_build calibrate`"
            )

    def save(self, path: str | Path) -> None:
        """Writes the profile as JSON."""
        Path(path).write_text(self.model_dump_json(indent=1) + "\n")


def load_profile(path: str | Path) -> LatencyProfile:
    """Reads a profile.

    Raises:
        ProfileError: The file is missing, of another schema version, or malformed.
    """
    try:
        text = Path(path).read_text()
    except OSError as error:
        raise ProfileError(
            f"cannot read the latency profile {path} ({error.strerror}); "
            "write one with `python -m engine_build calibrate`"
        ) from None
    except UnicodeDecodeError as error:
        raise ProfileError(f"latency profile {path} is not UTF-8 text: {error.reason}") from None
    try:
        return LatencyProfile.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "profile"
        raise ProfileError(f"latency profile {path}: {where}: {first['msg']}") from None
