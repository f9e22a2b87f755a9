"""Configurations that cannot be served are refused by field, before anything is loaded."""

from __future__ import annotations

import subprocess
import sys

import pytest
from fake_trtllm import write_serving

from perf.workload import vocab_size_of
from taper_trtllm.config import (
    ConfigError,
    TorchEngineConfig,
    load_config,
    parse_config,
)
from taper_trtllm.profile import ProfileError, load_profile

COMPILED = {"kind": "trtllm", "engine_dir": "engine"}
BAD = [
    ({"engine": {"device": "gpu"}}, r"engine\.device: .*pattern"),
    ({"engine": {"random_model": "qwen3-7b"}}, r"engine\.random_model: .*'qwen3-7b' is neither"),
    ({"engine": {"random_model": {"head_dim": 33}}}, r"engine\.random_model: .*head_dim"),
    (
        {"engine": {"random_model": {"num_attention_heads": 8, "num_key_value_heads": 3}}},
        r"engine\.random_model: .*multiple of num_key_value_heads",
    ),
    ({"scheduler": {"margin": 1.0}}, r"scheduler\.margin: .*less than 1"),
    ({"scheduler": {"max_num_requests": 9, "max_batch_size": 8}}, "scheduler: .*max_batch_size"),
    ({"limits": {"max_total_tokens": 1 << 20}}, "limits.max_total_tokens"),
    ({"shceduler": {}}, "shceduler: "),
    ({"engine": {"kind": "tensorrt"}}, "engine: .*'torch', 'trtllm'"),
    ({"engine": {"kind": "trtllm"}}, r"engine\.engine_dir: Field required"),
    ({"engine": {**COMPILED, "mode": "leases"}}, r"engine\.mode: .*'lease', 'slice' or 'lockstep'"),
    ({"engine": {**COMPILED, "device": "cuda"}}, r"engine\.device: Extra inputs"),
    (
        {"engine": COMPILED, "scheduler": {"prefill_chunking": "slack"}},
        r"scheduler\.prefill_chunking: slack needs an engine that is planned step by step",
    ),
]


@pytest.mark.parametrize(("data", "message"), BAD)
def test_a_bad_field_is_named(data, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(data)


def test_files_that_are_not_text_are_refused(tmp_path):
    path = tmp_path / "binary"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="binary is not UTF-8 text"):
        load_config(path)
    with pytest.raises(ProfileError, match="binary is not UTF-8 text"):
        load_profile(path)


def test_workloads_take_the_vocabulary_of_the_model(tmp_path):
    engine = TorchEngineConfig(model_dir=tmp_path)
    with pytest.raises(ConfigError, match=r"engine\.model_dir: no vocab_size"):
        vocab_size_of(engine)
    (tmp_path / "config.json").write_text('{"vocab_size": 321}')
    assert vocab_size_of(engine) == 321
    assert vocab_size_of(TorchEngineConfig()) == 8192
    compiled = load_config(write_serving(tmp_path / "compiled")).engine
    assert vocab_size_of(compiled) == 512


@pytest.mark.parametrize("program", ["quickstart", "sweep", "regime", "prove_prefix_reuse"])
def test_what_sizes_the_embedded_engine_refuses_a_compiled_one(program, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("engine: {kind: trtllm, engine_dir: engine}")
    options = {"sweep": ["--output-dir", str(tmp_path)], "regime": ["--profile", "p.json"]}
    command = [sys.executable, "-m", f"perf.{program}", "--config", str(path)]
    result = subprocess.run(
        [*command, *options.get(program, [])], capture_output=True, text=True, timeout=60
    )
    assert result.returncode in (1, 2)
    assert "engine.kind: this runs on the embedded engine" in result.stderr
    assert result.stderr.count("\n") == 1
