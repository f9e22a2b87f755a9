"""Latency profiles of Qwen3-32B on data-centre GPUs: ``scripts/make_profiles.sh``.

Step times are composed from NVIDIA's per-operator measurements in the package aiconfigurator-core.
They are not measurements of a running engine; `perf/profiles/README.md` says what they leave out.
Runs in an environment of its own, since the package needs numpy 2.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

from aiconfigurator_core.sdk import EngineHandle, estimate_kv_cache
from aiconfigurator_core.sdk.perf_database import resolve_query_version

from taper_trtllm.profile import DecodePoint, LatencyProfile, PrefillPoint

PACKAGE = "aiconfigurator-core"
BACKEND, DATA_SLOT = "trtllm", "current"
# Raw operator sums miss what lies between the kernels; NVIDIA's own command line multiplies decode
# by 1.08 and prefill by 1.10. One factor, since mixed steps are both.
HOST_FACTOR = 1.08

# Padded widths of TensorRT-LLM's CudaGraphConfig(enable_padding=True, max_batch_size=512): steps of
# 8 up to 128, then of 64 (releases up to 1.2 have powers of two beyond 128).
WIDTH_BUCKETS = (1, 2, 4, *range(8, 129, 8), *range(192, 513, 64))
DECODE_CONTEXTS = (128, 512, 1024, 2048, 4096, 8192, 16384, 32768)
MAX_KV_OVERCOMMIT = 4  # decode points beyond this multiple of the KV capacity are left out

PREFILL_WIDTHS = (0, 1, 8, 24, 56, 120, 240, 500)  # none at an edge, see below
PREFILL_DECODE_CONTEXT = 2048
# Rows of the matrices of a mixed step: decoding sequences and chunk tokens, unpadded. FP8 on Hopper
# is a staircase in their number, whose edges stand here on both sides.
PREFILL_ROWS = (
    4, 8, 16, 17, 32, 48, 64, 65, 80, 96, 128, 129, 160, 161, 192, 224, 256, 257, 320, 384, 448,
    512, 513, 640, 768, 769, 896, 1024, 1025, 1280, 1281, 1536, 1537, 1792, 1793, 2048, 2049, 2560,
    3072, 4096, 4608,
)  # fmt: skip
PRIOR_TOKENS = (64, 256, 1024, 4096)  # chunks that are also measured ...
PRIOR_CONTEXTS = (2048, 8192)  # ... behind so many computed tokens ...
PRIOR_WIDTHS = (0, 56)  # ... beside these widths

NUM_HELD_OUT, HELD_OUT_WIDTH, HELD_OUT_TOKENS = 100, 320, 2048

KV_MEMORY_FRACTION, KV_MAX_NUM_TOKENS, KV_MAX_BATCH_SIZE = 0.9, 2560, 512


@dataclass(frozen=True)
class Deployment:
    """One GPU type, weight format and tensor-parallel size."""

    gpu: str
    dtype: str
    tensor_parallel_size: int

    @property
    def name(self) -> str:
        """File name of the profile, without suffix."""
        return f"{self.gpu}_{self.dtype}_tp{self.tensor_parallel_size}"

    @property
    def system(self) -> str:
        """The package's name of the GPU type."""
        return f"{self.gpu}_sxm"

    @property
    def variant(self) -> str:
        """The checkpoint, which decides the quantisation: block-scaled FP8 with FP8 KV, or none."""
        return "Qwen/Qwen3-32B-FP8" if self.dtype == "fp8" else "Qwen/Qwen3-32B"


DEPLOYMENTS = (
    Deployment("h200", "fp8", 1),
    Deployment("h200", "bf16", 1),
    Deployment("h200", "bf16", 2),
    Deployment("h200", "fp8", 2),
    Deployment("h100", "fp8", 1),
    Deployment("h100", "bf16", 2),
    Deployment("b200", "fp8", 1),
)


class StepTimes:
    """Step times of a deployment, in milliseconds and without `HOST_FACTOR`."""

    def __init__(self, deployment: Deployment, data_version: str) -> None:
        self._engine = EngineHandle.compile(
            deployment.variant,
            deployment.system,
            BACKEND,
            backend_version=data_version,
            tp_size=deployment.tensor_parallel_size,
        )

    def decode_ms(self, width: int, context_tokens: int) -> float:
        """A decode-only step of `width` sequences with `context_tokens` each."""
        return float(self._engine.predict_decode_latency(width, context_tokens))

    def mixed_ms(self, width: int, context_tokens: int, num_tokens: int, prior: int) -> float:
        """A step of `width` decoding sequences and one chunk behind `prior` computed tokens.

        The package's own mixed step answers another question in two places: it spreads the
        attention over the chunks of a whole prompt, and it counts one row of logits instead of one
        per sequence.
        """
        shared, _, _ = self._engine.mixed_step_breakdown_per_op(
            num_tokens, width, isl=num_tokens, osl=1
        )
        chunk, _ = self._engine.run_static_per_op(
            batch_size=1, isl=prior + num_tokens, osl=1, prefix=prior, mode="static_ctx"
        )
        total_ms = sum(_by_name(shared).values())
        total_ms += _by_name(chunk)["context_attention"]
        if width:
            decode = _by_name(self._engine.decode_step_per_op(width, context_tokens, osl=1))
            sampled = _by_name(self._engine.decode_step_per_op(width + 1, context_tokens, osl=1))
            total_ms += decode["generation_attention"]
            total_ms += sampled["generation_logits_gemm"] - _by_name(shared)["context_logits_gemm"]
        return total_ms


def _by_name(operators: list[tuple[str, float, float, str]]) -> dict[str, float]:
    return {name: latency_ms for name, latency_ms, _, _ in operators}


def make_profile(deployment: Deployment) -> LatencyProfile:
    """Queries the package on the grids above."""
    data_version = resolve_query_version(deployment.system, BACKEND, DATA_SLOT)
    memory = estimate_kv_cache(
        deployment.variant,
        deployment.system,
        BACKEND,
        backend_version=data_version,  # 0.12.0 fails without one
        memory_fraction_kind="of_free",
        memory_fraction_value=KV_MEMORY_FRACTION,
        max_num_tokens=KV_MAX_NUM_TOKENS,
        max_batch_size=KV_MAX_BATCH_SIZE,
        tp_size=deployment.tensor_parallel_size,
    )
    times = StepTimes(deployment, data_version)
    return LatencyProfile(
        fingerprint={
            "engine": "simulated",
            "model": "Qwen/Qwen3-32B",
            "variant": deployment.variant,
            "device": f"NVIDIA {deployment.gpu.upper()} SXM",
            "dtype": deployment.dtype,
            "tensor_parallel_size": str(deployment.tensor_parallel_size),
            "backend": "TensorRT-LLM",
            "backend_version": data_version,
        },
        provenance={
            "tool": "perf/make_profiles.py",
            "package": f"{PACKAGE} {version(PACKAGE)}",
            "data": f"{deployment.system}, {BACKEND} {data_version} (slot {DATA_SLOT!r})",
            "date": datetime.now(timezone.utc).date().isoformat(),
            "licence": "Apache-2.0, Copyright (c) NVIDIA CORPORATION & AFFILIATES",
            "method": "sums of operator measurements; no engine was run",
            "host_factor": f"{HOST_FACTOR}, on every step",
            "width_buckets": "CUDA-graph padding: 1, 2, 4, steps of 8 to 128, of 64 to 512",
            "decode_grid": "every width bucket at equal contexts; the attention of more than about "
            "131k to 262k context tokens is extrapolated by the package",
            "prefill_grid": "one chunk; unpadded; token_context is tokens x (prior + tokens / 2)",
            "kv_cache_tokens": str(memory["total_kv_size_tokens"]),
            "kv_cache_bytes_per_token": str(memory["kv_size_per_token_bytes"]),
            "kv_cache_assumes": f"{KV_MEMORY_FRACTION} of free memory, max_num_tokens "
            f"{KV_MAX_NUM_TOKENS}, max_batch_size {KV_MAX_BATCH_SIZE}",
        },
        width_buckets=WIDTH_BUCKETS,
        decode=_decode_points(times, memory["total_kv_size_tokens"]),
        prefill=_prefill_points(times),
    )


def _decode_points(times: StepTimes, kv_cache_tokens: int) -> tuple[DecodePoint, ...]:
    return tuple(
        DecodePoint(
            width=width,
            context_tokens=context,
            step_ms=round(HOST_FACTOR * times.decode_ms(width, context), 4),
        )
        for width in WIDTH_BUCKETS
        for context in DECODE_CONTEXTS
        if width * context <= MAX_KV_OVERCOMMIT * kv_cache_tokens
    )


def _prefill_points(times: StepTimes) -> tuple[PrefillPoint, ...]:
    cases = [(width, 1, 0) for width in PREFILL_WIDTHS]
    cases += [(width, rows - width, 0) for width in PREFILL_WIDTHS for rows in PREFILL_ROWS]
    cases += [
        (width, num_tokens, prior)
        for width in PRIOR_WIDTHS
        for num_tokens in PRIOR_TOKENS
        for prior in (0, *PRIOR_CONTEXTS)
    ]
    points = []
    for width, num_tokens, prior in sorted({case for case in cases if case[1] > 0}):
        context = PREFILL_DECODE_CONTEXT if width else 0
        step_ms = times.mixed_ms(width, context, num_tokens, prior)
        points.append(
            PrefillPoint(
                width=width,
                context_tokens=context,
                num_chunks=1,
                num_tokens=num_tokens,
                token_context=num_tokens * (prior + num_tokens / 2),
                step_ms=round(HOST_FACTOR * step_ms, 4),
            )
        )
    return tuple(points)


def held_out_steps(deployment: Deployment) -> list[tuple[int, int, float]]:
    """Width, chunk tokens and time of mixed steps that the profile does not contain."""
    rng = random.Random(deployment.name)
    times = StepTimes(deployment, resolve_query_version(deployment.system, BACKEND, DATA_SLOT))
    steps = []
    for _ in range(NUM_HELD_OUT):
        width = round(2 ** rng.uniform(0, math.log2(HELD_OUT_WIDTH)))
        num_tokens = round(2 ** rng.uniform(2, math.log2(HELD_OUT_TOKENS)))
        step_ms = times.mixed_ms(width, PREFILL_DECODE_CONTEXT, num_tokens, 0)
        steps.append((width, num_tokens, round(HOST_FACTOR * step_ms, 4)))
    return steps


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Writes the latency profiles of Qwen3-32B.")
    parser.add_argument("--output-dir", type=Path, default=Path("perf/profiles"))
    parser.add_argument("--held-out", type=Path, help="also write steps for tests/test_profiles.py")
    arguments = parser.parse_args()
    output_dir: Path = arguments.output_dir
    output_dir.mkdir(parents=True, exist_ok=True)
    for deployment in DEPLOYMENTS:
        profile = make_profile(deployment)
        path = output_dir / f"{deployment.name}.json"
        profile.save(path)
        print(f"{path}: {len(profile.decode)} decode and {len(profile.prefill)} prefill steps")
    if arguments.held_out:
        steps = {deployment.name: held_out_steps(deployment) for deployment in DEPLOYMENTS}
        arguments.held_out.write_text(json.dumps(steps) + "\n")


if __name__ == "__main__":
    main()
