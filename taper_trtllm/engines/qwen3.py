"""The Qwen3 forward pass over a flat batch of tokens.

Attention is the caller's: it owns the KV, so the model hands it queries, keys and values of the new
tokens, whatever sequences they belong to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from taper_trtllm.config import ConfigError


@dataclass(frozen=True, slots=True)
class Qwen3Config:
    """Shape of a dense Qwen3, with Hugging Face's names."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    max_position_embeddings: int

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Qwen3Config:
        """Reads a checkpoint's `config.json`, written by transformers 4.57 or 5.x.

        Raises:
            ConfigError: The checkpoint is no dense Qwen3, or has a feature that is not implemented.
        """
        _refuse_unsupported(config)
        rope = config.get("rope_parameters") or config
        try:
            return cls(
                hidden_size=config["hidden_size"],
                num_hidden_layers=config["num_hidden_layers"],
                num_attention_heads=config["num_attention_heads"],
                num_key_value_heads=config["num_key_value_heads"],
                head_dim=config["head_dim"],
                intermediate_size=config["intermediate_size"],
                vocab_size=config["vocab_size"],
                rms_norm_eps=config["rms_norm_eps"],
                rope_theta=rope["rope_theta"],
                tie_word_embeddings=config["tie_word_embeddings"],
                max_position_embeddings=config["max_position_embeddings"],
            )
        except KeyError as error:
            raise ConfigError(f"config.json: {error.args[0]} is missing") from None

    def to_hf(self) -> dict[str, Any]:
        """The same as the content of a `config.json`."""
        shape = {name: getattr(self, name) for name in self.__dataclass_fields__}
        rope = {"rope_type": "default", "rope_theta": self.rope_theta}
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "hidden_act": "silu",
            "attention_bias": False,
            "rope_parameters": rope,
            **shape,
        }


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    layer_types = set(config.get("layer_types") or ["full_attention"])
    checks = {
        "model_type": (config.get("model_type"), "qwen3"),
        "rope_type": (rope_type, "default"),
        "use_sliding_window": (bool(config.get("use_sliding_window")), False),
        "layer_types": (sorted(layer_types), ["full_attention"]),
        "attention_bias": (bool(config.get("attention_bias")), False),
        "hidden_act": (config.get("hidden_act", "silu"), "silu"),
        "quantization_config": (config.get("quantization_config"), None),
    }
    for name, (value, supported) in checks.items():
        if value != supported:
            raise ConfigError(f"config.json: {name} {value!r} is not supported, only {supported!r}")


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer.

    Projections that read the same input are one matrix, and matrices are stored as [in, out]: a
    few percent faster on a CPU than [out, in].

    Attributes:
        input_norm: [hidden]; norms are float32 and scaled for `_rms_norm`.
        qkv: [hidden, (heads + 2 kv heads) x head_dim].
        qk_norm: [heads + kv heads, head_dim].
        output: [heads x head_dim, hidden].
        post_attention_norm: [hidden].
        gate_up: [hidden, 2 x intermediate].
        down: [intermediate, hidden].
    """

    input_norm: torch.Tensor
    qkv: torch.Tensor
    qk_norm: torch.Tensor
    output: torch.Tensor
    post_attention_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


class Attention(Protocol):
    """Stores the new keys and values of a layer and attends to everything stored."""

    def attend(self, layer: int, queries: torch.Tensor, keys_values: torch.Tensor) -> torch.Tensor:
        """Attention output of every token.

        Args:
            layer: Index of the layer.
            queries: [tokens, heads, head_dim].
            keys_values: [tokens, 2 x kv heads, head_dim], keys first.

        Returns:
            [tokens, heads x head_dim].
        """


class Qwen3Model:
    """Weights and forward pass.

    Args:
        config: Shape.
        read: Returns the tensor of a Hugging Face name. Layers are read and fused one by one, so a
            checkpoint is never in memory twice.
        max_seq_len: Largest sequence; sizes the rotary table.
        dtype: Of weights and activations.
        device: Where the weights live.
    """

    def __init__(
        self,
        config: Qwen3Config,
        read: Callable[[str], torch.Tensor],
        max_seq_len: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.config = config

        loader = _Loader(read, dtype, device)
        self._embedding = read("model.embed_tokens.weight").to(device, dtype)
        self._layers = [loader.layer(config, i) for i in range(config.num_hidden_layers)]
        self._norm = loader.norm("model.norm.weight")
        tied = config.tie_word_embeddings
        self._head = self._embedding.t() if tied else loader.matrix("lm_head.weight")
        self._epsilon_roots = {
            size: torch.tensor([math.sqrt(size * config.rms_norm_eps)], device=device)
            for size in (config.hidden_size, config.head_dim)
        }
        self._cos, self._sin = _rotary_tables(config, max_seq_len, dtype, device)

    def forward(
        self, token_ids: torch.Tensor, positions: torch.Tensor, attention: Attention
    ) -> torch.Tensor:
        """Runs all layers.

        Args:
            token_ids: [tokens].
            positions: [tokens] position of each token in its sequence.
            attention: Stores and attends.

        Returns:
            [tokens, hidden] for `logits`.
        """
        hidden = F.embedding(token_ids, self._embedding)
        cos, sin = self._cos[positions], self._sin[positions]
        for index, layer in enumerate(self._layers):
            normed = self._rms_norm(hidden, layer.input_norm)
            queries, keys_values = self._project(layer, normed, cos, sin)
            attended = attention.attend(index, queries, keys_values)
            hidden.addmm_(attended, layer.output)
            normed = self._rms_norm(hidden, layer.post_attention_norm)
            gate, up = (normed @ layer.gate_up).chunk(2, dim=-1)
            hidden.addmm_(F.silu(gate).mul_(up), layer.down)
        return hidden

    def logits(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """[n, vocab] next-token logits in float32 of n rows of `forward`'s result."""
        logits = self._rms_norm(hidden, self._norm) @ self._head
        return logits.float() if out is None else out.copy_(logits)

    def _rms_norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """RMS norm, x / sqrt(mean(x^2) + eps), in half the calls of torch's on a CPU.

        Args:
            x: [..., size].
            weight: [..., size], multiplied by sqrt(size).
        """
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = torch.hypot(norm, self._epsilon_roots[x.shape[-1]])
        return (x / scale).mul_(weight).to(x.dtype)

    def _project(
        self, layer: LayerWeights, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries, and keys with values; normed and rotated."""
        heads, head_dim = self.config.num_attention_heads, self.config.head_dim
        qkv = (x @ layer.qkv).view(len(x), -1, head_dim)
        qk = qkv[:, : heads + self.config.num_key_value_heads]
        normed = self._rms_norm(qk, layer.qk_norm)
        # Rolling by half a head swaps its halves; the sign of the first is in the sine table.
        swapped = normed.roll(head_dim // 2, dims=-1)
        torch.addcmul(normed.mul_(cos), swapped, sin, out=qk)
        return qkv[:, :heads], qkv[:, heads:]


@dataclass(frozen=True, slots=True)
class _Loader:
    """Brings weights into the form of `LayerWeights`."""

    read: Callable[[str], torch.Tensor]
    dtype: torch.dtype
    device: torch.device

    def matrix(self, *names: str) -> torch.Tensor:
        """[in, sum of out] of matrices that are stored as [out, in]."""
        parts = [self.read(name).to(self.device, self.dtype).t() for name in names]
        return torch.cat(parts, dim=1)

    def norm(self, name: str) -> torch.Tensor:
        weight = self.read(name).to(self.device, torch.float32)
        return weight * math.sqrt(len(weight))

    def layer(self, config: Qwen3Config, index: int) -> LayerWeights:
        prefix = f"model.layers.{index}"
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        norms = [self.norm(f"{attention}.q_norm.weight")] * config.num_attention_heads
        norms += [self.norm(f"{attention}.k_norm.weight")] * config.num_key_value_heads
        return LayerWeights(
            input_norm=self.norm(f"{prefix}.input_layernorm.weight"),
            qkv=self.matrix(*(f"{attention}.{name}_proj.weight" for name in "qkv")),
            qk_norm=torch.stack(norms),
            output=self.matrix(f"{attention}.o_proj.weight"),
            post_attention_norm=self.norm(f"{prefix}.post_attention_layernorm.weight"),
            gate_up=self.matrix(f"{mlp}.gate_proj.weight", f"{mlp}.up_proj.weight"),
            down=self.matrix(f"{mlp}.down_proj.weight"),
        )


def _rotary_tables(
    config: Qwen3Config, max_seq_len: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and signed sine, [positions, 1, head_dim]."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    angles = torch.outer(torch.arange(max_seq_len, dtype=torch.float32), frequencies)
    cos = torch.cat([angles.cos(), angles.cos()], dim=-1)
    sin = torch.cat([-angles.sin(), angles.sin()], dim=-1)
    return cos.unsqueeze(1).to(device, dtype), sin.unsqueeze(1).to(device, dtype)
