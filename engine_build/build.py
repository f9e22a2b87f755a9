"""Builds a TensorRT-LLM engine of a dense Qwen3 for branch execution.

Checks everything first, then converts the checkpoint (FP8: quantises it), runs `trtllm-build`,
holds the result against what was asked for, and writes `manifest.json` beside the engine. A build
that failed goes on where it stopped when the same command is run again. With --dry-run the plan and
the commands are printed, on any machine and with no more of the model than its config.json.
"""

from __future__ import annotations

import argparse
import functools
import math
import shlex
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from engine_build import preflight
from engine_build.checkpoint_files import input_files
from engine_build.commands import DEFAULT_EXAMPLES_DIR, BuildOptions, build_steps
from engine_build.engine_dir import (
    checkpoint_faults,
    clear_checkpoint,
    clear_engine,
    engine_faults,
    engine_files,
)
from engine_build.machine import Gpu, query_gpus, software_versions
from engine_build.manifest import MANIFEST_FILE, FileHasher, make_manifest, write_manifest
from engine_build.memory_plan import GIB, BranchLoad, MemoryPlan, most_num_tokens, plan_memory
from engine_build.model_shape import ModelError, ModelShape, read_model_shape
from engine_build.plan_table import plan_table
from engine_build.preflight import Findings
from engine_build.step_runner import CheckedStep, StepError, StepRunner

_DONE, _FAILED, _REFUSED = 0, 1, 2
# The default of --max-num-tokens: so many, or room for so many starts beside a full decode batch.
_NUM_TOKENS, _NUM_STARTS = 4096, 16


def add_parser(commands: Any) -> None:
    """Adds the `build` sub-command."""
    parser = commands.add_parser(
        "build",
        help="build a TensorRT-LLM engine, with the flags that branch execution needs",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model-dir", type=Path, required=True, help="Hugging Face directory of a dense Qwen3")
    add("--output-dir", type=Path, required=True, help="engine directory, created if needed")
    add("--dtype", choices=("bfloat16", "fp8"), required=True, help="of weights and activations")
    add(
        "--kv-cache-dtype",
        choices=("auto", "fp8"),
        default="auto",
        help="auto: bfloat16; fp8 needs --dtype fp8, and makes prefill attention FP8 too",
    )
    add("--tp-size", type=int, required=True, help="GPUs of one engine (tensor parallel)")
    add("--max-batch-size", type=int, default=64, help="live branches of all requests together")
    add(
        "--max-num-tokens",
        type=int,
        help="tokens in one iteration: one of each branch that decodes, and of the rest a block or "
        "more for each that starts; also its longest prefill, which all others wait for "
        f"({_NUM_TOKENS}, or if more --max-batch-size + {_NUM_STARTS} x --tokens-per-block)",
    )
    add("--max-seq-len", type=int, default=16384, help="tokens of one sequence, prompt included")
    add("--tokens-per-block", type=int, default=32, help="unit of prefix sharing")
    add("--calib-size", type=int, default=512, help="samples of the FP8 calibration")
    add(
        "--calib-dataset",
        default="cnn_dailymail",
        help="of the FP8 calibration: a name on the Hugging Face hub, or a local directory",
    )
    add("--workers", type=int, help="ranks converted or built at a time (--tp-size)")
    add(
        "--examples-dir",
        type=Path,
        default=DEFAULT_EXAMPLES_DIR,
        help="TensorRT-LLM's examples: convert_checkpoint.py and quantize.py",
    )
    add("--gpu-memory-gib", type=float, help="plan for such a GPU, not the one that is here")
    add("--branches", type=int, help="plan: branches of a fan-out (--max-batch-size)")
    add("--branch-prefix", type=int, default=2048, help="plan: tokens that they share")
    add("--branch-length", type=int, default=512, help="plan: tokens of each branch")
    add("--dry-run", action="store_true", help="print plan and commands, run nothing")
    add("--force", action="store_true", help="redo steps that are done")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    console = Console()
    findings = Findings()
    try:
        shape: ModelShape | None = read_model_shape(arguments.model_dir)
    except ModelError as error:
        shape = None
        findings.problems.extend(error.problems)
    options = _options(arguments, shape)
    load = _load(arguments, options, findings)
    gpus = query_gpus()
    plan = _check(options, shape, load, gpus, arguments, findings)
    _report(findings)
    if plan is not None:
        console.print(plan_table(plan, options))
    if findings.problems or shape is None or plan is None:
        return _REFUSED
    if arguments.dry_run:
        for step in build_steps(options):
            print(f"{step.name}: {shlex.join(step.argv)}")
        return _DONE
    return _build(options, shape, plan, gpus, force=arguments.force)


def _options(arguments: argparse.Namespace, shape: ModelShape | None) -> BuildOptions:
    values = {name: getattr(arguments, name) for name in BuildOptions.__dataclass_fields__}
    if values["workers"] is None:
        values["workers"] = arguments.tp_size
    if values["max_num_tokens"] is None:
        values["max_num_tokens"] = _default_num_tokens(arguments, shape)
    return BuildOptions(**values)


def _default_num_tokens(arguments: argparse.Namespace, shape: ModelShape | None) -> int:
    """The rule that --help states, cut to what the batch can have and the model allows."""
    batch = arguments.max_batch_size
    wanted = max(_NUM_TOKENS, batch + _NUM_STARTS * arguments.tokens_per_block)
    most = batch * arguments.max_seq_len
    if shape is not None and arguments.tp_size > 0:
        most = min(most, most_num_tokens(shape, arguments.tp_size))
    return min(wanted, most)


def _load(arguments: argparse.Namespace, options: BuildOptions, findings: Findings) -> BranchLoad:
    branches = options.max_batch_size if arguments.branches is None else arguments.branches
    load = BranchLoad(branches, arguments.branch_prefix, arguments.branch_length)
    for name, value in (("branches", branches), ("branch-length", load.branch_tokens)):
        if value < 1:
            findings.problems.append(f"--{name}: must be at least 1 (got {value})")
    if load.prefix_tokens < 0:
        findings.problems.append(f"--branch-prefix: must not be negative ({load.prefix_tokens})")
    return load


def _check(
    options: BuildOptions,
    shape: ModelShape | None,
    load: BranchLoad,
    gpus: tuple[Gpu, ...],
    arguments: argparse.Namespace,
    findings: Findings,
) -> MemoryPlan | None:
    """Runs every check; returns the memory plan if the options allow one."""
    dry_run = arguments.dry_run
    gpu_bytes = min((gpu.memory_bytes for gpu in gpus), default=None)
    if arguments.gpu_memory_gib is not None:
        if 0 < arguments.gpu_memory_gib < math.inf:
            gpu_bytes = int(arguments.gpu_memory_gib * GIB)
        else:
            findings.problems.append(
                f"--gpu-memory-gib: must be positive (got {arguments.gpu_memory_gib})"
            )
    preflight.check_values(options, findings)
    if shape is not None:
        preflight.check_model(options, shape, findings)
    can_plan = shape is not None and not findings.problems
    preflight.check_software(options, findings, dry_run=dry_run)
    preflight.check_output_dir(options, findings)
    if shape is not None:
        preflight.check_checkpoint(options, findings, dry_run=dry_run)
    if shape is None or not can_plan:
        return None
    preflight.check_disk(options, shape, findings, dry_run=dry_run)
    plan = plan_memory(shape, options, gpu_bytes, load)
    preflight.check_gpus(options, shape, plan, gpus, findings, dry_run=dry_run)
    return plan


def _build(
    options: BuildOptions,
    shape: ModelShape,
    plan: MemoryPlan,
    gpus: tuple[Gpu, ...],
    *,
    force: bool,
) -> int:
    runner = StepRunner(options.work_dir, say=functools.partial(print, flush=True))
    convert, build = build_steps(options)
    steps = (
        CheckedStep(
            convert,
            functools.partial(clear_checkpoint, options),
            functools.partial(checkpoint_faults, options),
        ),
        CheckedStep(
            build,
            functools.partial(clear_engine, options),
            functools.partial(engine_faults, options),
        ),
    )
    versions = software_versions(gpus)
    gpu_name = gpus[0].name if gpus else None
    try:
        input_hashes = _hash(runner, input_files(options.model_dir), "hashing the model")
        builder = {name: versions.get(name) for name in ("tensorrt_llm", "tensorrt")}
        inputs = {"sha256": input_hashes, "versions": builder, "gpu": gpu_name}
        ran = runner.run(steps, inputs, force=force)
        if not ran and (options.output_dir / MANIFEST_FILE).exists():
            print(f"nothing to do: {options.output_dir} is up to date")
            return _DONE
        engine_hashes = _hash(runner, engine_files(options), "hashing the engine")
    except StepError as error:
        print(f"engine_build build: {error}", file=sys.stderr)
        return _FAILED
    except OSError as error:
        print(f"engine_build build: {error}; run it again to resume", file=sys.stderr)
        return _FAILED
    except KeyboardInterrupt:
        print("engine_build build: interrupted; run it again to resume", file=sys.stderr)
        return _FAILED
    manifest = make_manifest(
        options,
        shape,
        (convert, build),
        plan,
        versions=versions,
        gpu_name=gpu_name,
        input_hashes=input_hashes,
        engine_hashes=engine_hashes,
    )
    print(f"wrote {write_manifest(manifest, options.output_dir)}")
    print(f"{options.checkpoint_dir} is not needed to serve and can be deleted")
    return _DONE


def _hash(runner: StepRunner, paths: tuple[Path, ...], label: str) -> dict[str, str]:
    """Hashes with a progress bar; hashes of unchanged files come from the state file."""
    columns = (TextColumn(label), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=sum(path.stat().st_size for path in paths))
        known = runner.load_state().get("hashes", {})
        hasher = FileHasher(known, lambda num_bytes: progress.advance(task, num_bytes))
        hashes = hasher.hash_all(paths)
    runner.save_state(hashes=hasher.known)
    return hashes


def _report(findings: Findings) -> None:
    for text in findings.not_checked:
        print(f"not checked here: {text}")
    for text in findings.warnings:
        print(f"warning: {text}")
    if findings.problems:
        lines = "".join(f"\n  - {text}" for text in findings.problems)
        print(f"engine_build build: refused{lines}", file=sys.stderr)
