"""Stand-ins for TensorRT-LLM's scripts and commands: they take the real options and write files.

Each notes its run in `runs.txt` and fails while a file `fail_<step>` exists beside it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

QWEN3_32B = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 5120,
    "num_hidden_layers": 64,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 25600,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rope_scaling": None,
    "tie_word_embeddings": False,
}
TINY_QWEN3 = {
    **QWEN3_32B,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 128,
    "vocab_size": 512,
}

_COMMON = """
import argparse, json, os, sys
from pathlib import Path
HOME = Path({home!r})
def start(step):
    with (HOME / "runs.txt").open("a") as runs:
        runs.write(step + chr(10))
    print("stand-in", step, "runs")
def end(step):
    if (HOME / ("fail_" + step)).exists():
        print("no memory left on the device")
        sys.exit(3)
def options(*names):
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name in names:
        parser.add_argument("--" + name)
    return parser.parse_args()
def write_checkpoint(o, quantization):
    out = Path(o.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    config = dict(architecture="Qwen3ForCausalLM", dtype=o.dtype, quantization=quantization,
                  mapping=dict(tp_size=int(o.tp_size), world_size=int(o.tp_size)))
    (out / "config.json").write_text(json.dumps(config))
    for rank in range(int(o.tp_size)):
        (out / f"rank{{rank}}.safetensors").write_bytes(b"weights of a rank")
"""
_CONVERT = """
start("convert")
o = options("model_dir", "output_dir", "dtype", "tp_size", "workers")
write_checkpoint(o, dict(quant_algo=None, kv_cache_quant_algo=None))
end("convert")
"""
_QUANTIZE = """
start("quantize")
o = options("model_dir", "output_dir", "dtype", "tp_size", "qformat", "kv_cache_dtype",
            "calib_size", "calib_dataset")
write_checkpoint(o, dict(quant_algo=o.qformat.upper(),
                         kv_cache_quant_algo=o.kv_cache_dtype and o.kv_cache_dtype.upper()))
end("quantize")
"""
_BUILD = """
start("build")
flags = ("use_paged_context_fmha", "use_fp8_context_fmha", "context_fmha", "remove_input_padding")
sizes = ("max_batch_size", "max_num_tokens", "max_seq_len", "max_input_len", "max_beam_width")
o = options("checkpoint_dir", "output_dir", "workers", "gpt_attention_plugin", "gemm_plugin",
            "kv_cache_type", "tokens_per_block", "output_timing_cache", *flags, *sizes)
checkpoint = json.loads((Path(o.checkpoint_dir) / "config.json").read_text())
plugin = {{flag: getattr(o, flag) == "enable" for flag in flags}}
plugin |= dict(paged_kv_cache=o.kv_cache_type == "paged", gpt_attention_plugin="auto",
               tokens_per_block=int(o.tokens_per_block), gemm_plugin=checkpoint["dtype"])
plugin |= json.loads(os.environ.get("STAND_IN_PLUGIN", "{{}}"))
build = {{size: int(getattr(o, size)) for size in sizes}}
build |= dict(kv_cache_type=o.kv_cache_type.upper(), plugin_config=plugin)
out = Path(o.output_dir)
out.mkdir(parents=True, exist_ok=True)
(out / "config.json").write_text(json.dumps(
    dict(version="1.2.1", pretrained_config=checkpoint, build_config=build)))
end("build")
for rank in range(checkpoint["mapping"]["tp_size"] - int(os.environ.get("STAND_IN_MISSING", 0))):
    (out / f"rank{{rank}}.engine").write_bytes(b"an engine")
"""


class TensorRtLlm:
    """An installation of stand-ins.

    Attributes:
        examples_dir: For --examples-dir.
    """

    def __init__(self, home: Path) -> None:
        self.home = home
        self.examples_dir = home / "examples"
        convert = self.examples_dir / "models/core/qwen/convert_checkpoint.py"
        quantize = self.examples_dir / "quantization/quantize.py"
        for path, code in (
            (convert, _CONVERT),
            (quantize, _QUANTIZE),
            (home / "bin/trtllm-build", _BUILD),
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            text = (_COMMON + code).format(home=str(home))
            path.write_text(f"#!{sys.executable}\n{text}")
            path.chmod(0o755)

    @property
    def runs(self) -> list[str]:
        """Steps that were started, in order."""
        path = self.home / "runs.txt"
        return path.read_text().split() if path.exists() else []

    def fail(self, step: str, *, fails: bool = True) -> None:
        """Makes a step fail at its end, or not any more."""
        path = self.home / f"fail_{step}"
        path.write_text("") if fails else path.unlink()

    def add_gpus(self, *lines: str) -> None:
        """An nvidia-smi that lists these: name, MiB, compute capability, driver."""
        path = self.home / "bin/nvidia-smi"
        path.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines))
        path.chmod(0o755)


def add_packages(site: Path, versions: dict[str, str]) -> None:
    """Package metadata as pip leaves it."""
    for name, version in versions.items():
        directory = site / f"{name}-{version}.dist-info"
        directory.mkdir(parents=True)
        (directory / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )


def install(
    home: Path, monkeypatch: pytest.MonkeyPatch, versions: dict[str, str] | None = None
) -> TensorRtLlm:
    """Makes stand-ins all of PATH, and puts metadata on sys.path; there is no GPU."""
    if versions is None:
        versions = {"tensorrt_llm": "1.2.1", "tensorrt": "10.14.1.48"}
    add_packages(home / "site", versions)
    monkeypatch.syspath_prepend(str(home / "site"))
    tensorrt_llm = TensorRtLlm(home)
    monkeypatch.setenv("PATH", str(home / "bin"))
    return tensorrt_llm


def write_safetensors(path: Path, names: Iterable[str], *, num_bytes: int = 8) -> None:
    """A file with small tensors of zeros."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for number, name in enumerate(names):
        offsets = [number * num_bytes, (number + 1) * num_bytes]
        header[name] = {"dtype": "BF16", "shape": [num_bytes // 2], "data_offsets": offsets}
    text = json.dumps(header).encode()
    size = (len(header) - 1) * num_bytes
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))


def write_model(directory: Path, config: dict[str, Any] = TINY_QWEN3) -> Path:
    """A whole checkpoint of two shards, with weights that mean nothing."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text("{}")
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    for tensor, name in weight_map.items():
        write_safetensors(directory / name, [tensor])
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory
