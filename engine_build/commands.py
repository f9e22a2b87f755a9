"""From build options to command lines, and to what the finished engine must say of itself.

Options of the scripts are those of TensorRT-LLM 1.2 (examples/models/core/qwen/
convert_checkpoint.py @65b31db1, examples/quantization/quantize.py @c8c6df08,
tensorrt_llm/commands/build.py @65f1d153, tensorrt_llm/plugin/plugin.py @c20322ff). Pure.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONVERT_SCRIPT = Path("models/core/qwen/convert_checkpoint.py")
QUANTIZE_SCRIPT = Path("quantization/quantize.py")
BUILD_COMMAND = "trtllm-build"
# Where the Triton container keeps the examples (the TensorRT-LLM release container:
# /app/tensorrt_llm/examples).
DEFAULT_EXAMPLES_DIR = Path("/app/examples")


@dataclass(frozen=True)
class BuildOptions:
    """What is built.

    Attributes:
        model_dir: Hugging Face directory of a dense Qwen3.
        output_dir: Engine directory; conversion and logs go to its ``build`` directory.
        dtype: ``bfloat16``, or ``fp8`` for FP8 weights and activations.
        kv_cache_dtype: ``auto`` keeps bfloat16; ``fp8`` needs FP8 weights.
        tp_size: Tensor parallel size.
        max_batch_size: Sequences in one iteration: all live branches of all requests.
        max_num_tokens: Tokens in one iteration: one of each sequence that decodes, and prefill.
        max_seq_len: Tokens of one sequence, prompt and output.
        tokens_per_block: Tokens of one KV block, the unit of prefix sharing.
        calib_size: Samples that FP8 scales are calibrated on.
        calib_dataset: Their Hugging Face name, or a local directory.
        workers: Ranks converted or built at a time.
        examples_dir: TensorRT-LLM's ``examples`` directory.
    """

    model_dir: Path
    output_dir: Path
    dtype: str
    kv_cache_dtype: str
    tp_size: int
    max_batch_size: int
    max_num_tokens: int
    max_seq_len: int
    tokens_per_block: int
    calib_size: int
    calib_dataset: str
    workers: int
    examples_dir: Path

    @property
    def work_dir(self) -> Path:
        """Directory of everything that is not the engine."""
        return self.output_dir / "build"

    @property
    def checkpoint_dir(self) -> Path:
        """Directory of the converted checkpoint."""
        return self.work_dir / "checkpoint"

    @property
    def script(self) -> Path:
        """The script that makes the checkpoint."""
        return self.examples_dir / (QUANTIZE_SCRIPT if self.dtype == "fp8" else CONVERT_SCRIPT)

    @property
    def uses_fp8_context_fmha(self) -> bool:
        """FP8 attention in prefill; paged context FMHA allows it with an FP8 KV cache alone."""
        return self.dtype == "fp8" and self.kv_cache_dtype == "fp8"


@dataclass(frozen=True)
class Step:
    """One command of a build; `name` is what messages, logs and the state file call it."""

    name: str
    argv: tuple[str, ...]


def build_steps(options: BuildOptions) -> tuple[Step, ...]:
    """The commands of a build, in order."""
    convert = _quantize(options) if options.dtype == "fp8" else _convert(options)
    return convert, _build(options)


def expected_build_config(options: BuildOptions) -> dict[str, Any]:
    """Fields of ``build_config`` in the engine's config.json, as asked for."""
    return {
        "max_batch_size": options.max_batch_size,
        "max_num_tokens": options.max_num_tokens,
        "max_seq_len": options.max_seq_len,
        "max_input_len": options.max_seq_len - 1,
        "max_beam_width": 1,
        "kv_cache_type": "PAGED",
    }


def expected_plugin_config(options: BuildOptions) -> dict[str, Any]:
    """Fields of ``build_config.plugin_config`` that branch execution depends on."""
    return {
        "use_paged_context_fmha": True,
        "use_fp8_context_fmha": options.uses_fp8_context_fmha,
        "context_fmha": True,
        "paged_kv_cache": True,
        "remove_input_padding": True,
        "tokens_per_block": options.tokens_per_block,
    }


def _convert(options: BuildOptions) -> Step:
    return Step(
        "convert",
        (
            *(sys.executable, str(options.script)),
            *("--model_dir", str(options.model_dir)),
            *("--output_dir", str(options.checkpoint_dir)),
            *("--dtype", "bfloat16"),
            *("--tp_size", str(options.tp_size)),
            *("--workers", str(options.workers)),
        ),
    )


def _quantize(options: BuildOptions) -> Step:
    kv_cache = ("--kv_cache_dtype", "fp8") if options.kv_cache_dtype == "fp8" else ()
    return Step(
        "quantize",
        (
            *(sys.executable, str(options.script)),
            *("--model_dir", str(options.model_dir)),
            *("--output_dir", str(options.checkpoint_dir)),
            *("--dtype", "bfloat16"),
            *("--qformat", "fp8"),
            *kv_cache,
            *("--calib_size", str(options.calib_size)),
            *("--calib_dataset", options.calib_dataset),
            *("--tp_size", str(options.tp_size)),
        ),
    )


def _build(options: BuildOptions) -> Step:
    return Step(
        "build",
        (
            BUILD_COMMAND,
            *("--checkpoint_dir", str(options.checkpoint_dir)),
            *("--output_dir", str(options.output_dir)),
            *("--workers", str(options.workers)),
            *("--gpt_attention_plugin", "auto"),
            *("--gemm_plugin", "auto"),
            *("--kv_cache_type", "paged"),
            *("--context_fmha", "enable"),
            *("--use_paged_context_fmha", "enable"),
            # Stated in either case: the builder's default is to enable it, and then not to.
            *("--use_fp8_context_fmha", "enable" if options.uses_fp8_context_fmha else "disable"),
            *("--remove_input_padding", "enable"),
            *("--tokens_per_block", str(options.tokens_per_block)),
            *("--max_batch_size", str(options.max_batch_size)),
            *("--max_seq_len", str(options.max_seq_len)),
            # A branch is resumed by a prompt of all its tokens so far.
            *("--max_input_len", str(options.max_seq_len - 1)),
            *("--max_num_tokens", str(options.max_num_tokens)),
            *("--max_beam_width", "1"),
            # By default the builder writes this file to the current directory.
            *("--output_timing_cache", str(options.work_dir / "timing.cache")),
        ),
    )
