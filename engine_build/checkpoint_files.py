"""The files of a Hugging Face checkpoint: which belong to a build, and whether they are whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_TEXT_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    _INDEX,
)
_MAX_HEADER_BYTES = 1 << 28


def input_files(model_dir: Path) -> tuple[Path, ...]:
    """Files that an engine is made from, in a fixed order; those that exist."""
    names = [*_TEXT_FILES, *sorted(path.name for path in model_dir.glob("*.safetensors"))]
    return tuple(model_dir / name for name in names if (model_dir / name).is_file())


def missing_files(model_dir: Path) -> list[str]:
    """Names of what has not been downloaded: the tokenizer, the weights or shards of them."""
    missing = []
    if not any((model_dir / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        missing.append("tokenizer.json")
    if (model_dir / _INDEX).is_file():
        try:
            names = sorted(set(_weight_map(model_dir).values()))
        except ValueError:
            return missing  # `damaged_files` says so
        missing += [name for name in names if not (model_dir / name).is_file()]
    elif not (model_dir / _SINGLE).is_file():
        missing.append(f"{_INDEX} or {_SINGLE}")
    return missing


def damaged_files(model_dir: Path) -> list[str]:
    """One line for every weight file that is cut short or does not hold what the index says.

    Only headers are read: the length of each file must be that of its tensors, and every tensor of
    the index must be in its shard.
    """
    if (model_dir / _INDEX).is_file():
        try:
            weight_map = _weight_map(model_dir)
        except ValueError as error:
            return [f"{_INDEX}: {error}"]
    else:
        weight_map = {}
    expected: dict[str, set[str]] = {}
    for tensor, name in weight_map.items():
        expected.setdefault(name, set()).add(tensor)
    if not weight_map and (model_dir / _SINGLE).is_file():
        expected[_SINGLE] = set()
    problems = []
    for name in sorted(expected):
        if (model_dir / name).is_file():
            problem = _damage(model_dir / name, expected[name])
            if problem:
                problems.append(f"{name}: {problem}")
    return problems


def _weight_map(model_dir: Path) -> dict[str, str]:
    try:
        index = json.loads((model_dir / _INDEX).read_text())
        weight_map = index["weight_map"]
        if not all(isinstance(name, str) for name in weight_map.values()):
            raise TypeError
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ValueError("no readable weight_map") from None
    return dict(weight_map)


def _damage(path: Path, tensors: set[str]) -> str | None:
    try:
        header, start = _read_header(path)
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name[0] != "_"]
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return "not a safetensors file"
    expected_bytes = start + max(ends, default=0)
    if path.stat().st_size != expected_bytes:
        return f"has {path.stat().st_size} bytes of {expected_bytes}"
    absent = tensors - set(header)
    if absent:
        return f"{len(absent)} tensors of the index are not in it, e.g. {min(absent)}"
    return None


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Header of a safetensors file, and where its data starts."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= _MAX_HEADER_BYTES:
            raise ValueError("header length")
        header = json.loads(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("header")
    return header, 8 + length
