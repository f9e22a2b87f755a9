"""The compiled-engine adapter on the fake executor in virtual time: leases under any load."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from perf.trtllm_fake.engine_dir import (
    BuildConfig,
    FakeEngine,
    PluginConfig,
    ProfileDecoderConfig,
    pretrained_config,
    write_engine_dir,
)
from taper_trtllm.config import RandomModelConfig, TrtllmEngineConfig
from taper_trtllm.engines.simulated import SimulatedConfig
from taper_trtllm.engines.trtllm import TrtllmEngine
from taper_trtllm.profile import LatencyProfile

BINDINGS = "perf.trtllm_fake.bindings"


@dataclass(frozen=True, slots=True)
class Leases:
    """How places are given; see `TrtllmEngineConfig`.

    Attributes:
        max_num_tokens: Of the engine: a step's tokens, and so its longest prefill.
    """

    mode: Literal["lease", "slice", "lockstep"] = "lease"
    lease_tokens: int = 256
    hysteresis_steps: int = 4
    start_interval_steps: int = 8
    max_num_tokens: int = 4096


class VirtualTrtllmEngine(TrtllmEngine):
    """`TrtllmEngine` on a fake executor that takes its step times from a profile.

    Args:
        truth: Step times.
        config: Memory, limits, disturbance; prompts are always computed here.
        leases: How places are given.

    Raises:
        ValueError: The fake executor has no disaggregated prefill, and nothing is free on it.
    """

    def __init__(self, truth: LatencyProfile, config: SimulatedConfig, leases: Leases) -> None:
        if config.disaggregated_prefill or config.free_joins or config.free_extras:
            raise ValueError("the fake executor computes every prompt and every branch itself")
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory)
            _write(path, truth, config, leases)
            super().__init__(
                TrtllmEngineConfig(
                    kind="trtllm",
                    engine_dir=path,
                    bindings=BINDINGS,
                    mode=leases.mode,
                    lease_tokens=leases.lease_tokens,
                    hysteresis_steps=leases.hysteresis_steps,
                    start_interval_steps=leases.start_interval_steps,
                ),
                clock=lambda: self.runtime_now_s(),
            )

    def runtime_now_s(self) -> float:
        """Virtual time."""
        return float(self.session.executor.runtime.now_s())

    def advance_to(self, time_s: float) -> None:
        """Lets time pass without work; never back."""
        self.session.executor.runtime.advance_to(time_s)


def _write(path: Path, truth: LatencyProfile, config: SimulatedConfig, leases: Leases) -> None:
    """The engine directory."""
    truth.save(path / "profile.json")
    build = BuildConfig(
        max_input_len=config.max_seq_len - 1,
        max_seq_len=config.max_seq_len,
        max_batch_size=config.max_batch_size,
        max_num_tokens=leases.max_num_tokens,
        plugin_config=PluginConfig(tokens_per_block=config.tokens_per_block),
    )
    decoder = ProfileDecoderConfig(
        path=path / "profile.json", disturbance=config.disturbance, seed=config.seed
    )
    engine = FakeEngine(drive="virtual", num_kv_blocks=config.num_kv_blocks, decoder=decoder)
    shape = pretrained_config(RandomModelConfig(vocab_size=151_936), config.max_seq_len)
    write_engine_dir(path, build, engine, shape)
