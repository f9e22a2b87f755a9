r"""Evaluates branch admission on simulated deployments: ``python -m perf.evaluate``.

TAPER against every static policy over named cells (`evaluation_cells.py`): SLO capacity, peak token
goodput, and paired ratios of both with their error. Each (cell, levers, policy) is one file; run
again, the command goes on where it stopped; it writes the tables and plots of all that its output
directory holds anew.

  python -m perf.evaluate --quick                    # named cells, 3 seeds, at most an hour
  python -m perf.evaluate --cells A,P --levers shipped,bare --policies taper,irp-off
  python -m perf.evaluate --quick --cells random-0,random-1 --output-dir random
  python -m perf.evaluate --output-dir full          # everything: about 680 tasks, see the README
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from perf.argument_types import positive, positive_int
from perf.evaluation_cells import CELLS, FREE_EXTRAS, LEVERS
from perf.evaluation_plots import plot_cell, plot_ratios
from perf.evaluation_runs import (
    EvaluationError,
    Scale,
    Task,
    TaskRunner,
    TaskRuns,
    bound_of,
    is_complete,
    load_all,
)
from perf.evaluation_summary import Outcome, cells_of, outcome_of, with_costs
from perf.evaluation_tables import TextTable, all_tables
from perf.random_cells import cell_named
from perf.rate_search import FULL, QUICK
from perf.simulated_cell import worker_pool
from perf.sweep_cells import check_policies
from taper_trtllm.config import ConfigError

MARKERS = ("<!-- perf.evaluate: begin -->", "<!-- perf.evaluate: end -->")

_MAIN = ("taper", "irp-off", "irp-eager", "step-ceiling:0.8", "fixed-cap:4")  # the best ceiling
_OTHERS = (
    "step-ceiling:0.7", "step-ceiling:0.9", "step-ceiling:1.0", "fixed-cap:2", "fixed-cap:5",
    "fixed-cap:8", "taper:widest", "taper:no-slack", "taper:no-replan",
    "taper:constant-predictor", "taper:uncorrected",
)  # fmt: skip
_QUICK_CELLS = (
    "A", "E", "P", "C", "public", "B", "F", "G", "lists", "reasoning", "plain",
)  # fmt: skip
_LEVER_CELLS = ("P", "A", "E", "C", "public", "B", "F", "G")


def plan(
    is_quick: bool,
    cells: Sequence[str] | None,
    policies: Sequence[str] | None,
    levers: Sequence[str] | None,
) -> list[Task]:
    """Tasks in order of importance; all that are not given follow from the size of the run."""
    chosen = cells or (_QUICK_CELLS if is_quick else tuple(CELLS))
    shipped = policies or (_MAIN if is_quick else (*_MAIN, *_OTHERS))
    if levers:
        return [Task(c, lever, p) for c in chosen for lever in levers for p in shipped]
    tasks = []
    for cell in chosen:
        tasks += [Task(cell, "shipped", policy) for policy in shipped]
        if cell == "P":
            tasks += [Task(cell, "bare", policy) for policy in policies or _MAIN]
    if not policies:
        costly = [cell for cell in chosen if not cell.endswith(FREE_EXTRAS)]
        tasks += [Task(f"{cell}{FREE_EXTRAS}", "shipped", "irp-eager") for cell in costly]
    if not is_quick:
        tasks += [
            Task(cell, lever, policy)
            for cell in _LEVER_CELLS
            if cell in chosen
            for lever in LEVERS
            for policy in policies or _MAIN
        ]
    return list(dict.fromkeys(tasks))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m perf.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--quick", action="store_true",
        help="named cells and main policies, 3 seeds, short windows, coarse rates",
    )  # fmt: skip
    parser.add_argument(
        "--cells",
        type=_names,
        help=f"of {','.join(CELLS)}, or random-N; with {FREE_EXTRAS} behind: the same with "
        "branches that cost nothing, shown beside the cell",
    )
    parser.add_argument("--policies", type=_names, help=f"({','.join(_MAIN)}; full: more)")
    parser.add_argument(
        "--levers", type=_names,
        help=f"of {','.join(LEVERS)} (shipped; P also bare; full: all in the anchors)",
    )  # fmt: skip
    parser.add_argument("--seeds", type=positive_int, help="(quick 3, full 6)")
    parser.add_argument(
        "--duration-s", type=positive, help="scored window (quick: by cell; full 300)"
    )
    parser.add_argument(
        "--budget-min", type=positive, help="stop after so long; run again to go on"
    )
    parser.add_argument("--processes", type=positive_int, default=os.cpu_count() or 1)
    parser.add_argument("--output-dir", type=Path, default=Path("perf/results/simulated"))
    parser.add_argument(
        "--readme", type=Path, metavar="MD",
        help=f"also replace what stands between '{MARKERS[0]}' and '{MARKERS[1]}' in it",
    )  # fmt: skip
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    return parser


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(text.split(",")))


def _check(arguments: argparse.Namespace) -> None:
    """Refuses unknown names before anything runs.

    Raises:
        EvaluationError, ConfigError: With the name.
    """
    for name in arguments.cells or ():
        try:
            cell_named(name)
        except KeyError:
            known = f"{', '.join(CELLS)}, random-N, or one of them with {FREE_EXTRAS} behind"
            raise EvaluationError(f"--cells: {name!r} is not one of {known}") from None
    for name in arguments.levers or ():
        if name not in LEVERS:
            raise EvaluationError(f"--levers: {name!r} is not one of {', '.join(LEVERS)}")
    check_policies(arguments.policies or ())
    readme = arguments.readme
    if readme and MARKERS[1] not in readme.read_text().partition(MARKERS[0])[2]:
        raise EvaluationError(
            f"--readme: {readme} lacks the lines {MARKERS[0]} and, below it, {MARKERS[1]}"
        )


def scale_of(arguments: argparse.Namespace) -> Scale:
    """How much the command line asks to measure."""
    if arguments.quick:
        return Scale(arguments.seeds or 3, QUICK, arguments.duration_s)
    return Scale(arguments.seeds or 6, FULL, arguments.duration_s or 300.0)


def measure(
    arguments: argparse.Namespace, tasks: Sequence[Task], scale: Scale, console: Console
) -> None:
    """Runs what is missing of the tasks, as long as there is time."""
    start_s = time.monotonic()
    deadline_s = start_s + 60 * arguments.budget_min if arguments.budget_min else math.inf
    progress = Progress(
        TextColumn("evaluating"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("about"), TimeRemainingColumn(), TextColumn("left; {task.description}"),
        console=console, disable=arguments.no_progress, transient=True,
    )  # fmt: skip
    with progress, worker_pool(arguments.processes) as pool:
        runner = TaskRunner(
            pool, arguments.processes, arguments.output_dir, scale, deadline_s, progress
        )
        runner.run(tasks)
    minutes = (time.monotonic() - start_s) / 60
    console.print(f"{runner.num_runs} runs in {minutes:.1f} min on {arguments.processes} processes")


def report(
    arguments: argparse.Namespace, tasks: Sequence[Task], scale: Scale, console: Console
) -> None:
    """Prints and writes the tables and plots of all that the directory holds, the tasks first."""
    held = load_all(arguments.output_dir, scale)
    measured = {task: held[task] for task in dict.fromkeys([*tasks, *held]) if task in held}
    missing = [task for task in tasks if not is_complete(measured.get(task), scale)]
    found = {
        task: outcome_of(m, scale.num_seeds, scale.target)
        for task, m in measured.items()
        if is_complete(m, scale)
    }
    bounds = {task.cell: bound_of(task.cell) for task in measured}
    tables = all_tables(found, bounds, scale)
    for table in tables:
        console.print(table.rich())
    gaps = f"{_missing_text(missing)} {_commits_text(measured.values())}"
    console.print(gaps, soft_wrap=True, highlight=False)
    path = arguments.output_dir / f"tables-{scale.num_seeds}-seeds.md"
    _write(path, arguments.readme, tables, gaps)
    _plot(measured, found, scale, arguments.output_dir)
    console.print(f"tables: {path}", soft_wrap=True, highlight=False)


def _missing_text(missing: Sequence[Task]) -> str:
    """What is not, or not wholly, measured."""
    if not missing:
        return "Everything that was asked for is measured."
    names = ", ".join(f"{task.cell} {task.levers} {task.policy}" for task in missing)
    return f"Not or not wholly measured ({len(missing)}): {names}."


def _commits_text(measured: Iterable[TaskRuns]) -> str:
    """Whose code the runs are of: figures of different code are compared with care."""
    found = (run.get("git_sha") for task in measured for run in task.runs.values())
    commits = Counter(str(commit)[:7] for commit in found)
    runs = ", ".join(f"{num} runs with {commit}" for commit, num in commits.most_common())
    return f"Commits: {runs}." if runs else ""


def _write(path: Path, readme: Path | None, tables: Sequence[TextTable], gaps: str) -> None:
    text = "\n".join([*(table.markdown() for table in tables), gaps + "\n"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    if readme:
        before, rest = readme.read_text().split(MARKERS[0], 1)
        after = rest.split(MARKERS[1], 1)[1]
        readme.write_text(f"{before}{MARKERS[0]}\n\n{text}\n{MARKERS[1]}{after}")


def _plot(
    measured: dict[Task, TaskRuns], found: dict[Task, Outcome], scale: Scale, directory: Path
) -> None:
    for cell in cells_of(with_costs(found)):
        runs = {task: m for task, m in measured.items() if task.cell == cell}
        title = f"{cell}: {cell_named(cell).title}"
        plot_cell(runs, found, title, scale.target, directory / f"{cell}.png")
    if found:
        plot_ratios(found, directory / "ratios.png")


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; the exit status is 1 if the evaluation could not run."""
    arguments = _parser().parse_args(argv)
    console = Console()
    try:
        _check(arguments)
        tasks = plan(arguments.quick, arguments.cells, arguments.policies, arguments.levers)
        scale = scale_of(arguments)
        measure(arguments, tasks, scale, console)
        report(arguments, tasks, scale, console)
    except (ConfigError, EvaluationError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
