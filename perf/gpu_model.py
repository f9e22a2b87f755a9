"""What `perf.gpu` measures: a preset shape with random weights, or a checkpoint, and its memory."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from taper_trtllm.config import QWEN3_SHAPES, RandomModelConfig, TorchEngineConfig
from taper_trtllm.engines.checkpoint import random_checkpoint
from taper_trtllm.engines.qwen3 import Qwen3Config

PRESETS: dict[str, RandomModelConfig] = {
    "tiny": RandomModelConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, head_dim=16,
        intermediate_size=128, vocab_size=512,
    ),
    "small": RandomModelConfig(),
    **QWEN3_SHAPES,
}  # fmt: skip

_MAX_SEQ_LEN = {"cpu": 4096, "cuda": 9216}  # the longest context of the grid, and its steps
# KV tokens of the pool. More would let wider steps at long contexts be measured, but every one of
# them has to be computed first.
_MOST_KV_TOKENS = {"cpu": 1 << 14, "cuda": 1 << 18}
_RESERVE_BYTES = 6 << 30  # of GPU memory, for activations, workspaces and CUDA graphs
_MAX_LAYERS, _MAX_VOCAB_SIZE = 2, 1 << 15  # of the shape that is checked against Hugging Face


class GpuError(RuntimeError):
    """What `perf.gpu` cannot do, with the option at fault and what to do."""


@dataclass(frozen=True, slots=True)
class ModelBytes:
    """What a decode step reads, and what it does not.

    Attributes:
        weights: All matrices once: layers and output head.
        kv_per_token: Keys and values of one context token, all layers.
        embedding: Of the input tokens, of which a step reads a few rows; 0 if it is the head.
    """

    weights: int
    kv_per_token: int
    embedding: int

    @classmethod
    def of(cls, shape: Qwen3Config, dtype: str) -> ModelBytes:
        """Of a shape; dtype is that of weights and KV."""
        itemsize = getattr(torch, dtype).itemsize
        query = shape.num_attention_heads * shape.head_dim
        key_value = shape.num_key_value_heads * shape.head_dim
        layer = (2 * query + 2 * key_value + 3 * shape.intermediate_size) * shape.hidden_size
        head = shape.vocab_size * shape.hidden_size
        weights = shape.num_hidden_layers * layer + head
        kv_per_token = shape.num_hidden_layers * 2 * key_value
        embedding = 0 if shape.tie_word_embeddings else head
        return cls(itemsize * weights, itemsize * kv_per_token, itemsize * embedding)

    def step(self, width: int, context_tokens: float) -> float:
        """Bytes of a step of so many sequences of so many tokens each."""
        return self.weights + self.kv_per_token * width * context_tokens


def check_device(device: str) -> None:
    """Refuses a device that is not there.

    Raises:
        GpuError: There is no CUDA.
    """
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise GpuError(
            f"--device {device}: torch {torch.__version__} sees no CUDA device; "
            "--device cpu runs the same script on a small model"
        )


def device_name(device: str) -> str:
    """The GPU's name, or ``cpu``."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu"


def shape_of(config: TorchEngineConfig) -> Qwen3Config:
    """Shape of the model that a configuration serves, without its weights.

    Raises:
        GpuError: The checkpoint's config.json cannot be read.
        ConfigError: It is not that of a dense Qwen3.
    """
    if config.model_dir is not None:
        path = config.model_dir / "config.json"
        try:
            return Qwen3Config.from_hf(json.loads(path.read_text()))
        except (OSError, ValueError) as error:
            raise GpuError(f"--model-dir: cannot use {path}: {error}") from None
    return random_checkpoint(config.random_model).config


def engine_config(model: str, model_dir: Path | None, device: str, dtype: str) -> TorchEngineConfig:
    """The engine that is measured; its pool is what fits, up to what calibration can fill.

    Raises:
        GpuError: The model does not fit.
    """
    kind = device.split(":")[0]
    config = TorchEngineConfig(
        model_dir=model_dir,
        random_model=PRESETS[model],
        device=device,
        dtype=dtype,
        max_seq_len=_MAX_SEQ_LEN[kind],
    )
    shape, num_tokens = shape_of(config), _MOST_KV_TOKENS[kind]
    if kind == "cuda":
        size = ModelBytes.of(shape, dtype)
        free = torch.cuda.mem_get_info(device)[0] - size.weights - size.embedding - _RESERVE_BYTES
        num_tokens = min(num_tokens, free // size.kv_per_token)
    if num_tokens < 1 << 13:
        raise GpuError(
            f"--model {model}: its weights leave room for {max(0, num_tokens)} KV tokens on "
            f"{device_name(device)}; choose a smaller one"
        )
    return config.model_copy(update={"num_kv_blocks": num_tokens // config.tokens_per_block})


def lacks_room(config: TorchEngineConfig) -> str | None:
    """Why Hugging Face's copy in float32 does not fit beside a checkpoint's engine, if so."""
    if config.model_dir is None or config.device == "cpu":
        return None
    model = ModelBytes.of(shape_of(config), "float32")
    size = model.weights + model.embedding
    free = torch.cuda.mem_get_info(config.device)[0]
    if 2 * size + _RESERVE_BYTES <= free:
        return None
    return (
        f"{size / 1e9:.0f} GB of float32 weights for the reference do not fit beside the engine; "
        "a preset is checked with few layers"
    )


def checked_config(config: TorchEngineConfig, dtype: str) -> TorchEngineConfig:
    """A small engine of the same kind, to stand beside Hugging Face's copy in memory.

    A preset keeps its widths and heads, so that the kernels are those of the model, but few of its
    layers; a checkpoint is taken as it is.
    """
    random_model = config.random_model.model_copy(
        update={
            "num_hidden_layers": min(_MAX_LAYERS, config.random_model.num_hidden_layers),
            "vocab_size": min(_MAX_VOCAB_SIZE, config.random_model.vocab_size),
        }
    )
    return config.model_copy(
        update={
            "random_model": random_model,
            "dtype": dtype,
            "num_kv_blocks": 1024,
            "max_batch_size": 64,
            "max_seq_len": 2048,
        }
    )
