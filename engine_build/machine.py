"""What this machine has: GPUs, package versions, disk."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

_MIB = 1 << 20
_QUERY = "name,memory.total,compute_cap,driver_version"


@dataclass(frozen=True)
class Gpu:
    """One visible GPU."""

    name: str
    memory_bytes: int
    compute_capability: tuple[int, int]
    driver_version: str


def query_gpus() -> tuple[Gpu, ...]:
    """The GPUs that nvidia-smi lists; none if there is no nvidia-smi, or it fails."""
    try:
        listing = subprocess.run(
            ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    gpus = (_parse_gpu(line) for line in listing.splitlines())
    return tuple(gpu for gpu in gpus if gpu is not None)


def _parse_gpu(line: str) -> Gpu | None:
    """A GPU, or None for a line without figures (some devices have no memory of their own)."""
    try:
        name, memory, capability, driver = (field.strip() for field in line.split(","))
        major, _, minor = capability.partition(".")
        return Gpu(name, int(memory) * _MIB, (int(major), int(minor)), driver)
    except ValueError:
        return None


def installed_version(*packages: str) -> str | None:
    """Version of the first of `packages` that is installed; nothing is imported."""
    for package in packages:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def software_versions(gpus: tuple[Gpu, ...]) -> dict[str, str]:
    """Versions that an engine depends on; what is not known is left out."""
    versions = {
        "tensorrt_llm": installed_version("tensorrt_llm"),
        "tensorrt": installed_version("tensorrt", "tensorrt-cu13"),
        "torch": installed_version("torch"),
        "cuda_driver": gpus[0].driver_version if gpus else None,
    }
    return {name: version for name, version in versions.items() if version is not None}


def existing_ancestor(path: Path) -> Path:
    """`path` if it exists, else the closest directory above it that does."""
    path = path.resolve()
    return path if path.exists() else existing_ancestor(path.parent)


def free_disk_bytes(directory: Path) -> int:
    """Free space where `directory` is, or will be."""
    return shutil.disk_usage(existing_ancestor(directory)).free
