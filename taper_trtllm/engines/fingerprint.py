"""What a latency profile of the embedded engine depends on."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from taper_trtllm.config import TorchEngineConfig
from taper_trtllm.engines.checkpoint import Checkpoint


def fingerprint(
    config: TorchEngineConfig, checkpoint: Checkpoint, device: torch.device
) -> dict[str, str]:
    """Engine, model, processor and settings, as strings; switches only where they are on."""
    switches = {
        "prefix_sharing_attention": config.prefix_sharing_attention,
        "cuda_graphs": config.cuda_graphs and device.type == "cuda",
    }
    return {
        "engine": "torch",
        "model": f"{checkpoint.name}-{checkpoint.digest}",
        "device": _device_name(device),
        "dtype": config.dtype,
        "num_threads": str(config.num_threads),
        "tokens_per_block": str(config.tokens_per_block),
        "torch": torch.__version__,
        **{name: "on" for name, is_on in switches.items() if is_on},
    }


def _device_name(device: torch.device) -> str:
    """The processor, as far as its kind says: latency profiles do not carry over."""
    if device.type == "cuda":
        return f"cuda {torch.cuda.get_device_name(device)}"
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{device.type} {names[0] if names else platform.machine()}"
