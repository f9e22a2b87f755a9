"""Compiles what decode attention launches for a Hopper GPU, without one; JSON of it to stdout.

A process of its own: the other tests' kernels are interpreted. The tensors are on `meta`, so
nothing can look at what is in them.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from taper_trtllm.engines.prefix_tiles import SharedPrefixes
from taper_trtllm.engines.triton_decode import (
    DecodeWorkspace,
    cascade_decode_attention,
    paged_decode_attention,
)

META = torch.device("meta")
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class Hopper:
    """As much of a driver as compiling asks for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def resources(cubin: bytes) -> dict[str, int]:
    """Registers, and bytes of stack and local memory, per thread: the latter hold spills."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [CUOBJDUMP, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL")}


def main(num_heads: int, num_kv_heads: int, head_dim: int) -> None:
    launches: list[dict[str, Any]] = []
    launch = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        ptx = kernel.asm["ptx"]
        launches.append(
            {
                "kernel": self.__name__,
                "grid": grid,
                "shared_bytes": kernel.metadata.shared,
                "mma": len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async)", ptx)),
                "async_copies": ptx.count("cp.async.cg"),
                **resources(kernel.asm["cubin"]),
            }
        )

    driver.set_active(Hopper())
    JITFunction.run = compile_only
    workspace = DecodeWorkspace(64, num_heads, num_kv_heads, head_dim, 132, META)
    for n, tokens_per_block in ((1, 64), (64, 32)):
        block = (tokens_per_block, 2, num_kv_heads, head_dim)
        layer_kv = torch.empty((8192, *block), dtype=torch.bfloat16, device=META)
        qkv = torch.empty(
            (n, num_heads + 2 * num_kv_heads, head_dim), dtype=torch.bfloat16, device=META
        )
        block_tables = torch.empty((n, 1024), dtype=torch.int32, device=META)
        lens = torch.empty(n, dtype=torch.int32, device=META)
        inputs = (qkv[:, :num_heads], layer_kv, block_tables, lens)
        tiles = torch.empty((n, 3), dtype=torch.int32, device=META)
        paged_decode_attention(*inputs, workspace=workspace)
        cascade_decode_attention(*inputs, SharedPrefixes(tiles, lens), workspace=workspace)
    print(json.dumps(launches))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
