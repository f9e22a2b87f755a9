"""What an engine was made of: hashes, versions, commands, and the fingerprint that a profile names.

`manifest.json` stands beside the engine. A latency profile measured on an engine carries its
fingerprint, and is refused by every other engine.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from engine_build.commands import BuildOptions, Step
from engine_build.memory_plan import MemoryPlan
from engine_build.model_shape import ModelShape
from taper_trtllm import __version__

MANIFEST_FILE = "manifest.json"
SCHEMA_VERSION = 1
_CHUNK_BYTES = 1 << 24


class FileHasher:
    """SHA-256 of files, remembered as long as a file's size and time of change stay.

    Attributes:
        known: What is remembered, JSON; keys are absolute paths.
        advance: Called with the bytes read, for progress.
    """

    def __init__(self, known: Mapping[str, Any], advance: Callable[[int], None]) -> None:
        self.known: dict[str, Any] = dict(known)
        self.advance = advance

    def hash_all(self, paths: Sequence[Path]) -> dict[str, str]:
        """Hashes by file name."""
        return {path.name: self._hash(path) for path in paths}

    def _hash(self, path: Path) -> str:
        stat = path.stat()
        stamp = [stat.st_size, stat.st_mtime_ns]
        key = str(path.resolve())
        entry = self.known.get(key)
        if isinstance(entry, dict) and entry.get("stamp") == stamp:
            self.advance(stat.st_size)
            return str(entry["sha256"])
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
                self.advance(len(chunk))
        self.known[key] = {"stamp": stamp, "sha256": digest.hexdigest()}
        return digest.hexdigest()


def make_manifest(
    options: BuildOptions,
    shape: ModelShape,
    steps: Sequence[Step],
    plan: MemoryPlan,
    *,
    versions: Mapping[str, str],
    gpu_name: str | None,
    input_hashes: Mapping[str, str],
    engine_hashes: Mapping[str, str],
) -> dict[str, Any]:
    """The manifest of a finished engine.

    Args:
        options: Of the build.
        shape: Of the model.
        steps: Commands that made it.
        plan: Its memory plan.
        versions: Of the software, those that are known.
        gpu_name: GPU that it was built on; None if it is not known.
        input_hashes: SHA-256 of the model's files by name.
        engine_hashes: SHA-256 of the rank files by name.
    """
    return {
        "schema_version": SCHEMA_VERSION,
        "tool": f"taper_trtllm {__version__} engine_build build",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": dict(versions),
        "gpu": gpu_name,
        "model": asdict(shape),
        "options": {
            name: str(value) if isinstance(value, Path) else value
            for name, value in asdict(options).items()
        },
        "commands": {step.name: list(step.argv) for step in steps},
        "inputs_sha256": dict(input_hashes),
        "engine_sha256": dict(engine_hashes),
        "memory_plan": plan.to_dict(),
        "fingerprint": {
            "engine": "trtllm",
            "model": shape.name,
            "dtype": options.dtype,
            "kv_cache_dtype": "fp8" if options.kv_cache_dtype == "fp8" else "bfloat16",
            "tp_size": str(options.tp_size),
            "gpu": gpu_name or "unknown",
            "tensorrt_llm": versions.get("tensorrt_llm", "unknown"),
            "tokens_per_block": str(options.tokens_per_block),
            "max_batch_size": str(options.max_batch_size),
            "max_num_tokens": str(options.max_num_tokens),
            "engine_sha256": combined_hash(engine_hashes),
        },
    }


def combined_hash(hashes: Mapping[str, str]) -> str:
    """One SHA-256 over the names and hashes of several files, whatever their order."""
    lines = "".join(f"{hashes[name]}  {name}\n" for name in sorted(hashes))
    return hashlib.sha256(lines.encode()).hexdigest()


def write_manifest(manifest: Mapping[str, Any], output_dir: Path) -> Path:
    """Writes the manifest beside the engine; returns its path."""
    path = output_dir / MANIFEST_FILE
    path.write_text(json.dumps(manifest, indent=2) + "\n")
    return path
