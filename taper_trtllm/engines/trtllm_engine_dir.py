"""A compiled engine on disk: what its directory says, and whether branches can run on it.

Layout as TensorRT-LLM 1.2 writes it: ``config.json`` (version, pretrained_config, build_config with
plugin_config) and one ``rank{r}.engine`` per rank; ``manifest.json`` is `engine_build`'s.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taper_trtllm.config import ConfigError

SUPPORTED_TENSORRT_LLM = "1.2"
"""The last line of TensorRT-LLM with a compiled backend."""


@dataclass(frozen=True, slots=True)
class EngineDir:
    """What an engine was built for.

    Attributes:
        path: The directory.
        version: TensorRT-LLM that built it.
        vocab_size: Token ids are below it.
        tokens_per_block: KV block size.
        max_batch_size: Most sequences in one iteration.
        max_num_tokens: Most tokens in one iteration, prefill and decode together.
        max_seq_len: Most tokens of one sequence.
        max_input_len: Most tokens of a prompt; a place that is given again has a branch's text so
            far in its prompt.
        num_ranks: Processes that it runs in.
        fingerprint: What a latency profile of it depends on.
    """

    path: Path
    version: str
    vocab_size: int
    tokens_per_block: int
    max_batch_size: int
    max_num_tokens: int
    max_seq_len: int
    max_input_len: int
    num_ranks: int
    fingerprint: Mapping[str, str]


def read_engine_dir(path: Path) -> EngineDir:
    """Reads and checks an engine directory.

    Raises:
        ConfigError: It is missing or incomplete, of another version, or built without what branch
            execution needs.
    """
    config = _read_json(path / "config.json")
    version = str(config.get("version", "unknown"))
    if not version.startswith(f"{SUPPORTED_TENSORRT_LLM}."):
        raise ConfigError(
            f"engine.engine_dir: {path} was built with TensorRT-LLM {version}; compiled engines "
            "are served with 1.2 only (later versions have no compiled backend): build it anew "
            "with `python -m engine_build build` in a 1.2 container"
        )
    try:
        model, build = config["pretrained_config"], config["build_config"]
        plugins = build["plugin_config"]
        engine = EngineDir(
            path=path,
            version=version,
            vocab_size=int(model["vocab_size"]),
            tokens_per_block=int(plugins["tokens_per_block"]),
            max_batch_size=int(build["max_batch_size"]),
            max_num_tokens=int(build["max_num_tokens"]),
            max_seq_len=int(build["max_seq_len"]),
            max_input_len=int(build["max_input_len"]),
            num_ranks=int(model.get("mapping", {}).get("world_size", 1)),
            fingerprint=_fingerprint(path, config),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"engine.engine_dir: {path / 'config.json'} is not an engine's ({error!r})"
        ) from None
    _check(engine, build, plugins)
    return engine


def _check(engine: EngineDir, build: Mapping[str, Any], plugins: Mapping[str, Any]) -> None:
    """Raises ConfigError for what branches cannot run on, all of it at once."""
    wrong = []
    if not plugins.get("use_paged_context_fmha"):
        wrong.append("built without --use_paged_context_fmha enable: no KV reuse, no branches")
    if not plugins.get("paged_kv_cache", True):
        wrong.append("built without --kv_cache_type paged")
    if int(build.get("max_beam_width", 1)) != 1:
        wrong.append("built for beam search; --max_beam_width must be 1")
    for rank in range(engine.num_ranks):
        if not (engine.path / f"rank{rank}.engine").exists():
            wrong.append(f"rank{rank}.engine is missing ({engine.num_ranks} ranks)")
    if wrong:
        raise ConfigError(f"engine.engine_dir: {engine.path}: " + "; ".join(wrong))


def _fingerprint(path: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """The manifest's, or what the engine itself says."""
    manifest = path / "manifest.json"
    if manifest.exists():
        fingerprint = _read_json(manifest).get("fingerprint")
        if not isinstance(fingerprint, dict):
            raise ConfigError(f"engine.engine_dir: {manifest} has no fingerprint; build it anew")
        return {key: str(value) for key, value in fingerprint.items()}
    model, build = config["pretrained_config"], config["build_config"]
    return {
        "engine": "trtllm",
        "tensorrt_llm": str(config["version"]),
        "model": f"{model.get('architecture')}-{model.get('num_hidden_layers')}x"
        f"{model.get('hidden_size')}",
        "dtype": str(model.get("dtype")),
        "tp_size": str(model.get("mapping", {}).get("tp_size", 1)),
        "tokens_per_block": str(build["plugin_config"]["tokens_per_block"]),
        "max_batch_size": str(build["max_batch_size"]),
        "max_num_tokens": str(build["max_num_tokens"]),
    }


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(
            f"engine.engine_dir: cannot read {path} ({error.strerror}); "
            "`python -m engine_build build` writes it"
        ) from None
    except ValueError as error:
        raise ConfigError(f"engine.engine_dir: {path} is not JSON ({error})") from None
    if not isinstance(data, dict):
        raise ConfigError(f"engine.engine_dir: {path} is not a JSON object")
    return data
