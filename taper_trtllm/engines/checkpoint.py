"""Where a model's weights come from: a Hugging Face directory, or a seed."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from taper_trtllm.config import ConfigError, RandomModelConfig
from taper_trtllm.engines.qwen3 import Qwen3Config

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_CPU = torch.device("cpu")

# Wide enough that greedy outputs of a random model vary; the customary 0.02 repeats one token.
_INITIALIZER_RANGE = 0.08


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model to load.

    Attributes:
        name: For people.
        digest: Identifies shape and weights as far as that is cheap.
        config: Shape.
        read: Returns the tensor of a Hugging Face name.
    """

    name: str
    digest: str
    config: Qwen3Config
    read: Callable[[str], torch.Tensor]


def open_checkpoint(directory: Path) -> Checkpoint:
    """Opens a directory saved by `save_pretrained`: `config.json` and safetensors, sharded or not.

    Raises:
        ConfigError: Something is missing, unreadable or not supported.
    """
    raw = _read_json(directory / "config.json")
    config = Qwen3Config.from_hf(raw)
    files = _files_by_tensor(directory)
    opened = {file: _open(directory / file) for file in sorted(set(files.values()))}

    def read(name: str) -> torch.Tensor:
        if name not in files:
            raise ConfigError(f"engine.model_dir: {directory} has no tensor {name}")
        tensor: torch.Tensor = opened[files[name]].get_tensor(name)
        return tensor

    sizes = {file: (directory / file).stat().st_size for file in opened}
    identity = json.dumps([raw, sizes], sort_keys=True)
    return Checkpoint(directory.name, _digest(identity), config, read)


def random_checkpoint(model: RandomModelConfig, device: torch.device = _CPU) -> Checkpoint:
    """A seeded random Qwen3 with an output head of its own.

    Tensors are made when they are read, on the device; each kind of device has its own numbers.
    """
    config = Qwen3Config(
        **model.model_dump(exclude={"seed"}),
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        tie_word_embeddings=False,
        max_position_embeddings=1 << 20,
    )
    shapes = _tensor_shapes(config)

    def read(name: str) -> torch.Tensor:
        return _random_weight(name, shapes[name], model.seed, device)

    return Checkpoint("random-qwen3", _digest(model.model_dump_json()), config, read)


def random_weights(config: Qwen3Config, seed: int) -> dict[str, torch.Tensor]:
    """Float32 weights under their Hugging Face names, all at once."""
    shapes = _tensor_shapes(config)
    return {name: _random_weight(name, shape, seed, _CPU) for name, shape in shapes.items()}


def _random_weight(
    name: str, shape: tuple[int, ...], seed: int, device: torch.device
) -> torch.Tensor:
    if len(shape) == 1:  # a norm
        return torch.ones(shape, device=device)
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode(), seed % (1 << 32)))
    weight = torch.randn(shape, generator=generator, device=device)
    return weight.mul_(_INITIALIZER_RANGE)


def _tensor_shapes(config: Qwen3Config) -> dict[str, tuple[int, ...]]:
    hidden, middle, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    num_q, num_kv = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (num_q, hidden),
        "self_attn.k_proj": (num_kv, hidden),
        "self_attn.v_proj": (num_kv, hidden),
        "self_attn.q_norm": (head_dim,),
        "self_attn.k_norm": (head_dim,),
        "self_attn.o_proj": (hidden, num_q),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (middle, hidden),
        "mlp.up_proj": (middle, hidden),
        "mlp.down_proj": (hidden, middle),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (config.vocab_size, hidden)}
    for index in range(config.num_hidden_layers):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    shapes |= {"model.norm": (hidden,), "lm_head": (config.vocab_size, hidden)}
    return {f"{name}.weight": shape for name, shape in shapes.items()}


def _files_by_tensor(directory: Path) -> dict[str, str]:
    if (directory / _INDEX).exists():
        index: dict[str, str] = _read_json(directory / _INDEX)["weight_map"]
        return index
    return dict.fromkeys(_open(directory / _SINGLE).keys(), _SINGLE)


def _open(path: Path) -> Any:
    """A lazily read safetensors file; it is closed when nobody refers to it any more."""
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"engine.model_dir: cannot read {path}: {error}") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"engine.model_dir: cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"engine.model_dir: {path} is not JSON: {error}") from None
    return content


def _digest(identity: str) -> str:
    return hashlib.sha256(identity.encode()).hexdigest()[:16]
