from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

# Before anything imports the Triton language. Where there is a GPU, 0 runs its kernels there.
os.environ.setdefault("TRITON_INTERPRET", "1")

from taper_trtllm.config import ServingConfig, load_config
from taper_trtllm.engines import create_engine
from taper_trtllm.profile import DecodePoint, LatencyProfile, PrefillPoint
from taper_trtllm.triton_server import TritonServer

SERVING = {
    "engine": {
        "random_model": {
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "intermediate_size": 128,
            "vocab_size": 512,
        },
        "num_kv_blocks": 4096,
        "max_batch_size": 256,
        "max_seq_len": 4096,
    },
    "scheduler": {"max_num_requests": 16, "max_batch_size": 256},
    "limits": {"max_total_tokens": 4096, "max_leaves": 300},
}


def write_config(directory: Path, serving: dict[str, Any] = SERVING) -> Path:
    """A serving configuration of a very small model, with an invented latency profile."""
    path = directory / "config.yaml"
    path.write_text(yaml.safe_dump({**serving, "profile": "profile.json"}))
    engine = create_engine(load_config(path).engine)
    LatencyProfile(
        fingerprint=dict(engine.fingerprint),
        decode=tuple(
            DecodePoint(width=w, context_tokens=c, step_ms=2 + 0.05 * w + 1e-5 * w * c)
            for w in (1, 16, 256)
            for c in (16, 512)
        ),
        prefill=(
            PrefillPoint(
                width=1,
                context_tokens=64,
                num_chunks=1,
                num_tokens=128,
                token_context=8192,
                step_ms=6,
            ),
        ),
    ).save(directory / "profile.json")
    engine.shutdown()
    return path


@pytest.fixture(scope="session")
def serving_config_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("serving"))


@pytest.fixture(scope="module")
def server(serving_config_path: Path) -> Iterator[TritonServer]:
    """A real Triton server, one per module."""
    with TritonServer(serving_config_path) as running:
        yield running
        running.check_alive()


@pytest.fixture(scope="session")
def serving_config(serving_config_path: Path) -> ServingConfig:
    return load_config(serving_config_path)
