"""The kernels of `triton_decode` as a `DecodeAttention`."""

from __future__ import annotations

import torch

from taper_trtllm.config import ConfigError
from taper_trtllm.engines import triton_decode
from taper_trtllm.engines.prefix_tiles import SharedPrefixes
from taper_trtllm.engines.qwen3 import Qwen3Config


class TritonAttention:
    """Implements `bucket_runner.DecodeAttention` on a GPU.

    Args:
        config: Shape of the model.
        max_batch_size: Most rows.
        num_sms: Multiprocessors of the device.
        device: The GPU; a CPU where Triton is interpreted.

    Raises:
        ConfigError: The kernels cannot work with this shape.
    """

    def __init__(
        self, config: Qwen3Config, max_batch_size: int, num_sms: int, device: torch.device
    ) -> None:
        try:
            self._workspace = triton_decode.DecodeWorkspace(
                max_batch_size,
                config.num_attention_heads,
                config.num_key_value_heads,
                config.head_dim,
                num_sms,
                device,
            )
        except ValueError as error:
            raise ConfigError(f"engine.device: {device} cannot serve this model: {error}") from None
        self.rows_per_tile = self._workspace.rows_per_tile

    def attend(
        self,
        queries: torch.Tensor,
        layer_kv: torch.Tensor,
        block_tables: torch.Tensor,
        context_lens: torch.Tensor,
        prefixes: SharedPrefixes | None,
    ) -> torch.Tensor:
        """See `DecodeAttention`."""
        if prefixes is None:
            return triton_decode.paged_decode_attention(
                queries, layer_kv, block_tables, context_lens, workspace=self._workspace
            )
        return triton_decode.cascade_decode_attention(
            queries, layer_kv, block_tables, context_lens, prefixes, workspace=self._workspace
        )
