"""What a device does, in one command and about ten minutes: ``python -m perf.gpu``.

Parts, each written as it finishes:

* correctness: teacher-forced logits against Hugging Face; the same tokens under every policy;
* calibration: decode steps over 20 widths x 25 contexts, prefill, and the predictor's errors;
* roofline: the steps beside the time that reading weights and KV takes at the measured bandwidth;
* live: policies on the live engine, interleaved and repeated, at a load where eager is late;
* agreement: the same requests on a simulated engine with the measured profile.

Models are presets with random weights (latencies do not depend on their values) or a local
checkpoint. A part that fails costs no other; run it again with ``--parts``, and the rest is kept.
Without a GPU, ``--device cpu`` runs all of it on a small model.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from rich.console import Console

from perf.argument_types import positive, positive_int
from perf.gpu_model import PRESETS, GpuError, check_device, device_name, engine_config
from perf.gpu_parts import PARTS, SHARES, Run, provenance
from perf.gpu_report import write_report
from perf.result import save_json
from perf.sweep_cells import check_policies
from perf.workload import DEFAULT_TRACE
from taper_trtllm.config import ConfigError
from taper_trtllm.profile import ProfileError

RESULTS = Path(__file__).parent / "results"
_MODEL = {"cpu": "small", "cuda": "qwen3-8b"}
_DTYPE = {"cpu": "float32", "cuda": "bfloat16"}
_BUDGET_MIN = {"cpu": 3.0, "cuda": 10.0}
_GRACE = 0.25  # of the time, by which a part may begin too late


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m perf.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, cpu (%(default)s)")
    model = parser.add_mutually_exclusive_group()
    model.add_argument(
        "--model", choices=PRESETS, help="shape with random weights (qwen3-8b; small on a CPU)"
    )
    model.add_argument("--model-dir", type=Path, help="local Hugging Face directory of a Qwen3")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="bfloat16 (float32 on a CPU)"
    )
    parser.add_argument("--output-dir", type=Path, help="perf/results/DEVICE by default")
    parser.add_argument("--parts", type=_names, default=tuple(PARTS), help=",".join(PARTS))
    parser.add_argument("--policies", type=_names, default=("irp-off", "irp-eager", "taper"))
    parser.add_argument("--repetitions", type=positive_int, default=3, help="%(default)s")
    parser.add_argument(
        "--loads",
        type=lambda text: tuple(positive(part) for part in text.split(",")),
        help="multiples of R0; by default one at which irp-eager is late, found in simulation",
    )
    parser.add_argument("--dataset-path", type=Path, default=DEFAULT_TRACE, help="trace (CSV)")
    parser.add_argument("--budget-min", type=positive, help="time, about (10; 3 on a CPU)")
    return parser


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def prepare(arguments: argparse.Namespace, console: Console) -> Run:
    """Checks the options and sizes the engine.

    Raises:
        GpuError: An option cannot be used.
        ConfigError: A policy or the checkpoint cannot.
    """
    if not re.fullmatch(r"cpu|cuda(:\d+)?", arguments.device):
        raise GpuError(f"--device {arguments.device}: cuda, cuda:N or cpu")
    if unknown := set(arguments.parts) - set(PARTS):
        raise GpuError(f"--parts: no {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    check_policies(arguments.policies)
    check_device(arguments.device)
    if not arguments.dataset_path.is_file():
        raise GpuError(f"--dataset-path: no such file: {arguments.dataset_path}")
    kind = arguments.device.split(":")[0]
    config = engine_config(
        arguments.model or _MODEL[kind],
        arguments.model_dir,
        arguments.device,
        arguments.dtype or _DTYPE[kind],
    )
    slug = re.sub(r"[^a-z0-9]+", "-", device_name(arguments.device).lower()).strip("-")
    return Run(
        config=config,
        output=arguments.output_dir or RESULTS / slug,
        policies=arguments.policies,
        repetitions=arguments.repetitions,
        loads=arguments.loads,
        dataset_path=arguments.dataset_path,
        console=console,
        provenance=provenance(config),
    )


def run_parts(run: Run, names: tuple[str, ...], budget_s: float) -> dict[str, dict[str, Any]]:
    """Runs parts in their order; each gets its share of the time that is left.

    Returns:
        What became of each: ``status`` (done, failed, skipped), and seconds or the reason.
    """
    end_s = time.monotonic() + budget_s
    chosen = [name for name in PARTS if name in names]
    outcome: dict[str, dict[str, Any]] = {}
    for index, name in enumerate(chosen):
        start_s = time.monotonic()
        left_s = end_s - start_s
        if left_s < -_GRACE * budget_s:
            outcome[name] = {"status": "skipped", "error": "the time is over"}
        else:
            share = SHARES[name] / sum(SHARES[other] for other in chosen[index:])
            run.budget_s = share * max(left_s, 0.0)
            outcome[name] = _run_part(run, name)
        outcome[name]["seconds"] = round(time.monotonic() - start_s, 1)
        reason = outcome[name].get("error", "")
        run.console.print(
            f"{name}: {outcome[name]['status']} in {outcome[name]['seconds']:.0f} s {reason}",
            highlight=False,
            soft_wrap=True,
        )
        save_json({"parts": outcome, **run.provenance}, run.output / "run.json")
    return outcome


def _run_part(run: Run, name: str) -> dict[str, Any]:
    try:
        result = PARTS[name](run)
    except Exception as error:  # whatever it is, it must not cost the other parts
        run.drop_engine()
        known = isinstance(error, (ConfigError, GpuError, ProfileError))
        message = str(error) if known else f"{type(error).__name__}: {error}"
        outcome = {"status": "failed", "error": message.splitlines()[0] if message else ""}
        return outcome if known else {**outcome, "traceback": traceback.format_exc()}
    save_json({"provenance": run.provenance, **result}, run.output / f"{name}.json")
    return {"status": "done"}


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; the exit status is 1 if a part failed or was not reached."""
    arguments = _parser().parse_args(argv)
    console = Console()
    try:
        run = prepare(arguments, console)
    except (ConfigError, GpuError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    budget_min = arguments.budget_min or _BUDGET_MIN[run.kind]
    outcome = run_parts(run, arguments.parts, 60 * budget_min)
    run.drop_engine()
    report = write_report(run.output)
    console.print(f"results: {report}", soft_wrap=True, highlight=False)
    return int(any(part["status"] != "done" for part in outcome.values()))


if __name__ == "__main__":
    sys.exit(main())
