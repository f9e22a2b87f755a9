"""Everything that can be checked before a build starts; all of it is reported together."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass, field

from engine_build.checkpoint_files import damaged_files, missing_files
from engine_build.commands import BUILD_COMMAND, BuildOptions
from engine_build.machine import Gpu, existing_ancestor, free_disk_bytes, installed_version
from engine_build.memory_plan import MemoryPlan, most_num_tokens, weight_bytes
from engine_build.model_shape import ModelShape
from engine_build.step_runner import STATE_FILE
from taper_trtllm.engines.trtllm_engine_dir import SUPPORTED_TENSORRT_LLM

_RECORDED_TENSORRT_LLM = "1.2.1"
_SUPPORTED_TENSORRT = "10.14"
_FP8_CAPABILITY = (8, 9)  # Ada; below it the builder drops FP8 attention silently
_ALTERNATIVE = (
    "compiled engines end with 1.2 (the backend was removed on main at about 1.3.0rc22); use the "
    "1.2.1 container, or serve with the PyTorch flow (trtllm-serve, PyExecutor)"
)


@dataclass
class Findings:
    """What the checks found.

    Attributes:
        problems: Reasons not to build, each naming the option or field and the remedy.
        warnings: What deserves a look.
        not_checked: What a dry run could not check on this machine.
    """

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    not_checked: list[str] = field(default_factory=list)


def check_values(options: BuildOptions, findings: Findings) -> None:
    """Options that are wrong whatever the model is."""
    problems = findings.problems
    for name in ("tp_size", "max_batch_size", "tokens_per_block", "calib_size", "workers"):
        value = getattr(options, name)
        if value < 1:
            problems.append(f"{_flag(name)}: must be at least 1 (got {value})")
    block = options.tokens_per_block
    if block >= 1 and block & (block - 1):
        problems.append(f"--tokens-per-block: must be a power of two, such as 32 (got {block})")
    if options.max_seq_len <= max(1, block):
        problems.append(
            f"--max-seq-len: must be above --tokens-per-block, and 1 (got {options.max_seq_len})"
        )
    if options.kv_cache_dtype == "fp8" and options.dtype != "fp8":
        problems.append(
            "--kv-cache-dtype: fp8 needs --dtype fp8: with bfloat16 weights the builder turns "
            "paged context FMHA off, and without it there is no block reuse"
        )
    most = options.max_batch_size * options.max_seq_len
    least = options.max_batch_size + block
    if least <= most and not least <= options.max_num_tokens <= most:
        problems.append(
            f"--max-num-tokens: must be in {least}..{most}: at least --max-batch-size + "
            "--tokens-per-block, or decoding alone could keep a start out, and at most "
            f"--max-batch-size x --max-seq-len (got {options.max_num_tokens})"
        )


def check_model(options: BuildOptions, shape: ModelShape, findings: Findings) -> None:
    """Options that do not suit the model."""
    if not shape.is_published:
        findings.warnings.append(
            f"{options.model_dir}: a dense Qwen3 of no published size (0.6B to 32B); built as it is"
        )
    tp, kv_heads = max(1, options.tp_size), shape.num_key_value_heads
    for name in ("num_attention_heads", "intermediate_size"):
        if getattr(shape, name) % tp:
            findings.problems.append(
                f"--tp-size: {tp} does not divide {name} = {getattr(shape, name)}"
            )
    if kv_heads % tp and tp % kv_heads:
        findings.problems.append(
            f"--tp-size: {tp} neither divides num_key_value_heads = {kv_heads} nor is a multiple "
            "of it (heads are split or replicated)"
        )
    if options.max_seq_len > shape.max_seq_len:
        findings.problems.append(
            f"--max-seq-len: {options.max_seq_len} is beyond the model's {shape.max_seq_len} "
            "(max_position_embeddings, rope scaling included)"
        )
    most = most_num_tokens(shape, tp)
    if options.max_num_tokens > most:
        findings.problems.append(
            f"--max-num-tokens: at most {most} for this model and --tp-size {tp}: beyond it a "
            "tensor of the feed-forward layer exceeds 2^31 elements, which TensorRT cannot hold"
        )


def check_checkpoint(options: BuildOptions, findings: Findings, *, dry_run: bool) -> None:
    """Files of the model that are missing or damaged."""
    missing = missing_files(options.model_dir)
    if missing:
        names = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if missing[4:] else "")
        text = f"--model-dir: {options.model_dir} lacks {names}; download the whole model"
        (findings.warnings if dry_run else findings.problems).append(text)
    findings.problems.extend(
        f"--model-dir: {options.model_dir / problem}; download it again"
        for problem in damaged_files(options.model_dir)
    )


def check_output_dir(options: BuildOptions, findings: Findings) -> None:
    """An output directory that holds something else than a build of ours."""
    directory = options.output_dir
    if directory.resolve() == options.model_dir.resolve():
        findings.problems.append("--output-dir: is the model's directory; choose another one")
    elif directory.exists() and not directory.is_dir():
        findings.problems.append(f"--output-dir: {directory} is a file; choose another name")
    elif (directory / "config.json").exists() and not (options.work_dir / STATE_FILE).exists():
        findings.problems.append(
            f"--output-dir: {directory} has a config.json that was not built here; choose another "
            "directory"
        )
    elif not os.access(existing_ancestor(directory), os.W_OK):
        findings.problems.append(f"--output-dir: no permission to write {directory}")


def check_software(options: BuildOptions, findings: Findings, *, dry_run: bool) -> None:
    """Versions, scripts and commands of TensorRT-LLM."""
    absent = findings.not_checked if dry_run else findings.problems
    version = installed_version("tensorrt_llm")
    if version is None:
        absent.append(
            "tensorrt_llm: not installed; run in a container that ships "
            f"TensorRT-LLM {_RECORDED_TENSORRT_LLM} (scripts/trtllm_container.sh)"
        )
    elif not _is_release(version, SUPPORTED_TENSORRT_LLM):
        findings.problems.append(
            f"tensorrt_llm: {version} is installed, {SUPPORTED_TENSORRT_LLM}.x is needed: "
            f"{_ALTERNATIVE}"
        )
    elif version != _RECORDED_TENSORRT_LLM:
        findings.warnings.append(
            f"tensorrt_llm: {version} is installed; what is known of its interface was recorded "
            f"for {_RECORDED_TENSORRT_LLM}"
        )
    tensorrt = installed_version("tensorrt", "tensorrt-cu13")
    if tensorrt is None:
        findings.not_checked.append("tensorrt: no package metadata found")
    elif not _is_release(tensorrt, _SUPPORTED_TENSORRT):
        findings.problems.append(
            f"tensorrt: {tensorrt} is installed, {_SUPPORTED_TENSORRT}.x is needed by TensorRT-LLM "
            f"{_RECORDED_TENSORRT_LLM}; use the container that ships both"
        )
    if not options.script.is_file():
        absent.append(
            f"--examples-dir: no {options.script}; give TensorRT-LLM's examples directory "
            "(/app/examples in the Triton container, /app/tensorrt_llm/examples in NVIDIA's other)"
        )
    if shutil.which(BUILD_COMMAND) is None:
        absent.append(f"{BUILD_COMMAND}: not on PATH; run in the TensorRT-LLM container")


def check_disk(
    options: BuildOptions, shape: ModelShape, findings: Findings, *, dry_run: bool
) -> None:
    """Free space for the converted checkpoint, the engine, and weights not downloaded yet.

    What an earlier attempt has left there is replaced, so it counts as free.
    """
    needed = 2 * options.tp_size * weight_bytes(shape, options.dtype, options.tp_size)
    reusable = sum(
        path.stat().st_size
        for directory in (options.output_dir, options.checkpoint_dir)
        for path in directory.glob("rank*")
    )
    what = "converted checkpoint and engine"
    if dry_run and missing_files(options.model_dir):
        needed += 2 * shape.num_params
        what = "weights to download, " + what
    free = free_disk_bytes(options.output_dir) + reusable
    if free < needed:
        (findings.warnings if dry_run else findings.problems).append(
            f"--output-dir: {what} take {needed / 1e9:.1f} GB, and the disk of "
            f"{options.output_dir} has {free / 1e9:.1f} GB; free some or choose another one"
        )


def check_gpus(
    options: BuildOptions,
    shape: ModelShape,
    plan: MemoryPlan,
    gpus: tuple[Gpu, ...],
    findings: Findings,
    *,
    dry_run: bool,
) -> None:
    """The GPUs of this machine, and the memory plan against them."""
    findings.problems.extend(plan.problems)
    if plan.gpu_bytes is None:
        absent = findings.not_checked if dry_run else findings.problems
        absent.append(
            "GPU memory: nvidia-smi lists no GPU; start the container with --gpus all, or plan for "
            "a GPU with --gpu-memory-gib"
        )
    if not gpus:
        findings.not_checked.append("GPUs: none here to check")
        return
    if len({gpu.name for gpu in gpus}) > 1:
        findings.warnings.append(
            "GPUs: of several kinds; an engine runs on the kind it is built on"
        )
    if len(gpus) < options.tp_size:
        findings.warnings.append(
            f"--tp-size: {options.tp_size} GPUs are needed to serve, {len(gpus)} visible here"
        )
    lowest = min(gpu.compute_capability for gpu in gpus)
    if options.dtype == "fp8" and lowest < _FP8_CAPABILITY:
        findings.problems.append(
            f"--dtype: fp8 needs compute capability 8.9, {gpus[0].name} has "
            f"{lowest[0]}.{lowest[1]}; use bfloat16"
        )
    unquantised = 2 * shape.num_params
    if options.dtype == "fp8" and sum(gpu.memory_bytes for gpu in gpus) < unquantised:
        findings.warnings.append(
            f"--dtype: fp8 is calibrated with the bfloat16 model ({unquantised / 1e9:.1f} GB) on "
            "the visible GPUs, which have less"
        )


def _is_release(version: str, release: str) -> bool:
    """Whether `version` is `release` or one of its patches or pre-releases."""
    return re.match(rf"{re.escape(release)}(\D|$)", version) is not None


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
