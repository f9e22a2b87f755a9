"""The shape of a Qwen3 checkpoint, read from its Hugging Face ``config.json``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Published dense sizes, from the config.json of each.
_PUBLISHED: dict[tuple[int, ...], str] = {
    (1024, 28, 16, 8, 128, 3072): "Qwen3-0.6B",
    (2048, 28, 16, 8, 128, 6144): "Qwen3-1.7B",
    (2560, 36, 32, 8, 128, 9728): "Qwen3-4B",
    (4096, 36, 32, 8, 128, 12288): "Qwen3-8B",
    (5120, 40, 40, 8, 128, 17408): "Qwen3-14B",
    (5120, 64, 64, 8, 128, 25600): "Qwen3-32B",
}
_SIZES = (  # the fields of the keys above
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
)
_MODEL_TYPE = "qwen3"
_ARCHITECTURE = "Qwen3ForCausalLM"


class ModelError(ValueError):
    """A checkpoint that cannot be built.

    Attributes:
        problems: Every reason, each naming the file or field and what to do.
    """

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


@dataclass(frozen=True)
class ModelShape:
    """What the size of an engine depends on; names follow ``config.json``.

    Attributes:
        name: Name of the published size, or that of the directory.
        is_published: Whether the shape is that of a published dense Qwen3.
        max_seq_len: Longest sequence that the position embedding covers, rope scaling included.
    """

    name: str
    is_published: bool
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_seq_len: int
    tie_word_embeddings: bool

    @property
    def num_linear_params(self) -> int:
        """Parameters of the layers' matrices: what FP8 quantises."""
        query = self.num_attention_heads * self.head_dim
        key_value = self.num_key_value_heads * self.head_dim
        per_layer = (2 * query + 2 * key_value + 3 * self.intermediate_size) * self.hidden_size
        return self.num_hidden_layers * per_layer

    @property
    def num_norm_params(self) -> int:
        """Parameters of all norms, those of query and key included."""
        return self.num_hidden_layers * 2 * (self.hidden_size + self.head_dim) + self.hidden_size

    @property
    def num_embedding_params(self) -> int:
        """Parameters of the embedding, and of the output head where it is another matrix."""
        matrices = 1 if self.tie_word_embeddings else 2
        return matrices * self.vocab_size * self.hidden_size

    @property
    def num_params(self) -> int:
        """All parameters of the checkpoint."""
        return self.num_linear_params + self.num_norm_params + self.num_embedding_params


def read_model_shape(model_dir: Path) -> ModelShape:
    """Reads the shape of a dense Qwen3.

    Args:
        model_dir: Local Hugging Face directory; only its ``config.json`` is read.

    Raises:
        ModelError: There is no such file, or it is not that of a dense Qwen3.
    """
    path = model_dir / "config.json"
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise ModelError(
            [f"--model-dir: cannot read {path} ({error.strerror}); give a Hugging Face directory"]
        ) from None
    except ValueError as error:
        raise ModelError([f"{path}: not JSON ({error}); download the model again"]) from None
    if not isinstance(config, dict):
        raise ModelError([f"{path}: not a JSON object; download the model again"])
    return _ConfigReader(path, config).read()


class _ConfigReader:
    """Collects every problem of one ``config.json`` before it gives up."""

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        self._path = path
        self._config = config
        self._problems: list[str] = []

    def read(self) -> ModelShape:
        self._check_architecture()
        sizes = {field: self._positive(field) for field in _SIZES}
        vocab_size = self._positive("vocab_size")
        max_seq_len = self._max_seq_len()
        if self._problems:
            raise ModelError(self._problems)
        published = _PUBLISHED.get(tuple(sizes.values()))
        return ModelShape(
            name=published or self._path.resolve().parent.name,
            is_published=published is not None,
            **sizes,
            vocab_size=vocab_size,
            max_seq_len=max_seq_len,
            tie_word_embeddings=bool(self._config.get("tie_word_embeddings", False)),
        )

    def _check_architecture(self) -> None:
        model_type = self._config.get("model_type")
        architectures = self._config.get("architectures")
        if "moe" in str(model_type).lower() or "num_experts" in self._config:
            self._problem(
                f"model_type: {model_type!r} is a mixture of experts; only dense Qwen3 are built"
            )
            return
        if model_type != _MODEL_TYPE:
            self._problem(f"model_type: must be {_MODEL_TYPE!r} (got {model_type!r})")
        if architectures != [_ARCHITECTURE]:
            self._problem(f"architectures: must be [{_ARCHITECTURE!r}] (got {architectures!r})")
        if self._config.get("quantization_config"):
            self._problem(
                "quantization_config: the checkpoint is quantised already; "
                "give the bfloat16 one, and --dtype fp8 to quantise it here"
            )

    def _positive(self, field: str) -> int:
        value = self._config.get(field)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
        self._problem(f"{field}: must be a positive whole number (got {value!r})")
        return 0

    def _max_seq_len(self) -> int:
        scaling = self._config.get("rope_scaling") or {}
        factor = scaling.get("factor", 1.0) if isinstance(scaling, dict) else 1.0
        return int(self._positive("max_position_embeddings") * factor)

    def _problem(self, text: str) -> None:
        self._problems.append(f"{self._path}: {text}")
