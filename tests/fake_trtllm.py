"""Serving configurations of fake compiled engines, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from perf.trtllm_fake.engine_dir import (
    BuildConfig,
    FakeEngine,
    PluginConfig,
    ProfileDecoderConfig,
    TorchDecoderConfig,
    pretrained_config,
    write_engine_dir,
)
from taper_trtllm.config import RandomModelConfig
from taper_trtllm.engines.trtllm_engine_dir import read_engine_dir
from taper_trtllm.profile import DecodePoint, LatencyProfile, PrefillPoint

BINDINGS = "perf.trtllm_fake.bindings"
MODEL = RandomModelConfig(
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    intermediate_size=128,
    vocab_size=512,
)
DECODE = TorchDecoderConfig(random_model=MODEL, step_ms=2.0)
REPLAY = ProfileDecoderConfig(path=Path("../profile.json"))
NUM_KV_BLOCKS = 2048
_BUILD = BuildConfig(
    max_input_len=2047,
    max_seq_len=2048,
    max_batch_size=32,
    max_num_tokens=512,
    plugin_config=PluginConfig(tokens_per_block=16),
)


def write_serving(
    directory: Path,
    *,
    decoder: TorchDecoderConfig | ProfileDecoderConfig = DECODE,
    tp_size: int = 1,
    fail_at_iteration: int | None = None,
    engine: dict[str, Any] | None = None,
    scheduler: dict[str, Any] | None = None,
) -> Path:
    """Writes an engine, an invented latency profile of it and a serving configuration.

    Args:
        directory: Where.
        decoder: What computes: a tiny random model, or the profile.
        tp_size: Ranks.
        fail_at_iteration: See `FakeEngine`.
        engine: Changes to the `engine` section.
        scheduler: Changes to the `scheduler` section.
    """
    directory.mkdir(exist_ok=True)
    engine_dir = directory / "engine"
    fake = FakeEngine(
        drive="threaded",
        num_kv_blocks=NUM_KV_BLOCKS,
        decoder=decoder,
        fail_at_iteration=fail_at_iteration,
    )
    write_engine_dir(engine_dir, _BUILD, fake, pretrained_config(MODEL, 2048, tp_size))
    LatencyProfile(
        fingerprint=dict(read_engine_dir(engine_dir).fingerprint),
        decode=tuple(
            DecodePoint(width=w, context_tokens=c, step_ms=2 + 0.02 * w + 1e-5 * w * c)
            for w in (1, 8, 32)
            for c in (16, 512)
        ),
        prefill=tuple(
            PrefillPoint(
                width=0,
                context_tokens=0,
                num_chunks=1,
                num_tokens=n,
                token_context=n * n / 2,
                step_ms=2 + 0.02 * n,
            )
            for n in (16, 128)
        ),
    ).save(directory / "profile.json")
    serving = {
        "engine": {
            "kind": "trtllm",
            "engine_dir": "engine",
            "bindings": BINDINGS,
            "lease_tokens": 8,
            **(engine or {}),
        },
        "scheduler": {
            "max_num_requests": 8,
            "max_batch_size": 32,
            "max_prefill_tokens": 256,
            **(scheduler or {}),
        },
        "limits": {"max_total_tokens": 2048, "max_prompt_tokens": 1024, "max_leaves": 128},
        "profile": "profile.json",
    }
    path = directory / "config.yaml"
    path.write_text(yaml.safe_dump(serving))
    return path
