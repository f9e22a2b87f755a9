"""Engines: what runs an iteration and owns KV. `base` has the interface."""

from __future__ import annotations

from taper_trtllm.config import EngineConfig, TrtllmEngineConfig
from taper_trtllm.engines.base import Engine


def create_engine(config: EngineConfig) -> Engine:
    """Creates the engine that the configuration names.

    Raises:
        ConfigError: The model or the compiled engine cannot be served.
        WorkerRank: Another process leads the engine.
    """
    # Imported here: the decision core works without torch, compiled engines too.
    if isinstance(config, TrtllmEngineConfig):
        from taper_trtllm.engines.trtllm import TrtllmEngine

        return TrtllmEngine(config)
    from taper_trtllm.engines.torch_engine import TorchEngine

    return TorchEngine(config)
