"""Whether a converted checkpoint and a built engine are whole and are what was asked for.

The builder overrides options that it finds unsuitable with no more than a line in its log
(tensorrt_llm/builder.py @008b2b8d, `build`), so what the engine says of itself is what counts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine_build.commands import BuildOptions, expected_build_config, expected_plugin_config


def clear_checkpoint(options: BuildOptions) -> None:
    """Deletes what an earlier attempt left of the checkpoint."""
    _delete(options.checkpoint_dir, "rank*.safetensors", "config.json")


def clear_engine(options: BuildOptions) -> None:
    """Deletes what an earlier attempt left of the engine."""
    _delete(options.output_dir, "rank*.engine", "config.json", "manifest.json")


def engine_files(options: BuildOptions) -> tuple[Path, ...]:
    """The engine of each rank."""
    return tuple(options.output_dir / f"rank{rank}.engine" for rank in range(options.tp_size))


def checkpoint_faults(options: BuildOptions) -> list[str]:
    """What is wrong with the converted checkpoint; nothing if it is whole."""
    directory = options.checkpoint_dir
    ranks = [directory / f"rank{rank}.safetensors" for rank in range(options.tp_size)]
    config, faults = _read_config(directory / "config.json")
    if config is not None:
        faults += _model_faults(config, options)
    return faults + _empty_files(ranks)


def engine_faults(options: BuildOptions) -> list[str]:
    """What is wrong with the engine; nothing if it is whole and as asked for."""
    config, faults = _read_config(options.output_dir / "config.json")
    if config is not None:
        faults += _model_faults(_section(config, "pretrained_config"), options)
        build = _section(config, "build_config")
        plugins = _section(build, "plugin_config")
        kv_cache_type = str(build.get("kv_cache_type")).rsplit(".", 1)[-1].upper()
        build = {**build, "kv_cache_type": kv_cache_type}
        faults += _differences("build_config", build, expected_build_config(options))
        prefix = "build_config.plugin_config"
        faults += _differences(prefix, plugins, expected_plugin_config(options))
        faults += [
            f"{prefix}.{name}: is off"
            for name in ("gpt_attention_plugin", "gemm_plugin")
            if not plugins.get(name)
        ]
    return faults + _empty_files(engine_files(options))


def _model_faults(config: Mapping[str, Any], options: BuildOptions) -> list[str]:
    """Faults of a TensorRT-LLM model configuration, that of a checkpoint or of an engine."""
    expected_quantization = {
        "quant_algo": "FP8" if options.dtype == "fp8" else None,
        "kv_cache_quant_algo": "FP8" if options.kv_cache_dtype == "fp8" else None,
    }
    return [
        *_differences("config", config, {"dtype": "bfloat16"}),
        *_differences("mapping", _section(config, "mapping"), {"tp_size": options.tp_size}),
        *_differences("quantization", _section(config, "quantization"), expected_quantization),
    ]


def _differences(name: str, found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    return [
        f"{name}.{key}: asked for {value!r}, is {found.get(key)!r}"
        for key, value in expected.items()
        if found.get(key) != value
    ]


def _empty_files(paths: tuple[Path, ...] | list[Path]) -> list[str]:
    return [
        f"{path}: missing or empty"
        for path in paths
        if not path.is_file() or not path.stat().st_size
    ]


def _read_config(path: Path) -> tuple[dict[str, Any] | None, list[str]]:
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError):
        return None, [f"{path}: missing or not JSON"]
    return (config, []) if isinstance(config, dict) else (None, [f"{path}: not a JSON object"])


def _section(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    section = config.get(name)
    return section if isinstance(section, dict) else {}


def _delete(directory: Path, *patterns: str) -> None:
    for pattern in patterns:
        for path in directory.glob(pattern):
            path.unlink()
