"""Checks the recorded TensorRT-LLM API against an installed TensorRT-LLM.

Three depths, each where this machine allows it: the version and the shipped type stubs (nothing is
imported), the signatures of the imported bindings, and with --engine-dir a short generation on the
GPU that proves KV reuse, cancellation and the statistics. Exit status: 0 if the bindings were
compared and nothing failed, 1 if something failed, 3 if the bindings could not be compared.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import importlib
import importlib.metadata
import importlib.util
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from engine_build.contract import DEFAULT_PATH, Confirmation, Contract, load_contract
from engine_build.differences import find_differences
from engine_build.surface import read_module, read_stub
from taper_trtllm.config import ConfigError
from taper_trtllm.engines.trtllm_engine_dir import SUPPORTED_TENSORRT_LLM

_STYLES = {"passed": "green", "FAILED": "bold red", "not checked": "yellow"}


@dataclass(frozen=True)
class Check:
    """One row of the result: what was checked, how it came out, and what was found or why not."""

    name: str
    outcome: Literal["passed", "FAILED", "not checked"]
    details: tuple[str, ...]


@dataclass(frozen=True)
class Verification:
    """All checks of one run.

    Attributes:
        contract: What was checked.
        version: Of the installed package; None without one.
        checks: In order.
    """

    contract: Contract
    version: str | None
    checks: tuple[Check, ...]

    @property
    def exit_status(self) -> int:
        """See the module."""
        if any(check.outcome == "FAILED" for check in self.checks):
            return 1
        return 0 if "bindings" in self.passed else 3

    @property
    def passed(self) -> tuple[str, ...]:
        """Names of the checks that passed."""
        return tuple(check.name for check in self.checks if check.outcome == "passed")

    def confirmed_contract(self) -> Contract:
        """The contract, marked with today's confirmation; only where the exit status is 0.

        Raises:
            ConfigError: Another version than the recorded one is installed.
        """
        if self.version != self.contract.version:
            raise ConfigError(
                f"write-confirmed: {self.version} is installed; the contract is of "
                f"{self.contract.version}"
            )
        confirmation = Confirmation(on=datetime.date.today(), version=self.version, how=self.passed)
        return self.contract.model_copy(update={"status": "confirmed", "confirmed": confirmation})


def verify(contract: Contract, engine_dir: Path | None = None) -> Verification:
    """Runs every check that is possible here."""
    root = _find_package(contract.package)
    if root is None:
        absent = f"{contract.package} is not installed here"
        names = ("version", "type stubs", "bindings", "engine")
        return Verification(
            contract, None, tuple(Check(name, "not checked", (absent,)) for name in names)
        )
    version = _read_version(root)
    checks = [_check_version(version)]
    if checks[0].outcome == "passed":
        checks += [_check_stubs(contract, root), *_check_module(contract, engine_dir)]
    return Verification(contract, version, tuple(checks))


# ---- without importing


def _find_package(name: str) -> Path | None:
    spec = importlib.util.find_spec(name)
    locations = spec.submodule_search_locations if spec else None
    return Path(locations[0]) if locations else None


def _read_version(root: Path) -> str:
    """`__version__` of the package's version.py, else the one of its installed distribution."""
    file = root / "version.py"
    for node in ast.parse(file.read_text()).body if file.is_file() else ():
        match node:
            case ast.Assign(targets=[ast.Name(id="__version__")], value=ast.Constant(value=str(v))):
                return v
    try:
        return importlib.metadata.version(root.name)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _check_version(version: str) -> Check:
    if version.split(".")[:2] == SUPPORTED_TENSORRT_LLM.split("."):
        return Check("version", "passed", (version,))
    reason = (
        f"{version} is not of the {SUPPORTED_TENSORRT_LLM} line: compiled engines are removed from "
        "about 1.3.0rc22. Install tensorrt-llm==1.2.1, or serve through the PyTorch flow"
    )
    return Check("version", "FAILED", (reason,))


def _check_stubs(contract: Contract, root: Path) -> Check:
    stubs = (p for p in sorted(root.rglob("*.pyi")) if "class ExecutorConfig" in p.read_text())
    stub = next(stubs, None)
    if stub is None:
        return Check("type stubs", "not checked", ("none of the executor bindings are shipped",))
    try:
        differences = find_differences(contract, read_stub(stub))
    except SyntaxError as error:
        differences = [f"{stub.name} cannot be parsed: {error}"]
    return _compared("type stubs", contract, differences)


def _compared(name: str, contract: Contract, differences: list[str]) -> Check:
    if differences:
        return Check(name, "FAILED", tuple(differences))
    found = f"{len(contract.classes)} classes and {len(contract.enums)} enums as recorded"
    return Check(name, "passed", (found,))


# ---- imported


def _check_module(contract: Contract, engine_dir: Path | None) -> Iterator[Check]:
    try:
        module = importlib.import_module(contract.module)
    except Exception as error:  # a missing driver or library shows as almost anything
        reason = f"{contract.module} cannot be imported: {type(error).__name__}: {error}"
        yield Check("bindings", "not checked", (reason,))
        yield Check("engine", "not checked", ("the bindings cannot be imported",))
        return
    surface = read_module(module, [*contract.enums, *contract.classes])
    yield _compared("bindings", contract, find_differences(contract, surface))
    if engine_dir is None:
        yield Check("engine", "not checked", ("give --engine-dir, on a machine with a GPU",))
    else:
        yield from _check_engine(module, engine_dir)


# ---- on the GPU


def _check_engine(module: ModuleType, engine_dir: Path) -> Iterator[Check]:
    """Generation, KV reuse, cancellation and statistics on a compiled engine."""
    try:
        config = json.loads((engine_dir / "config.json").read_text())
        num_ranks = config["pretrained_config"].get("mapping", {}).get("world_size", 1)
        if num_ranks > 1:
            reason = f"{engine_dir} is for {num_ranks} ranks: give an engine for one GPU"
            yield Check("engine", "not checked", (reason,))
            return
        run = _EngineRun(module, engine_dir)
    except Exception as error:
        yield Check("engine", "FAILED", (f"{engine_dir}: {type(error).__name__}: {error}",))
        return
    steps: dict[str, Callable[[], str]] = {
        "engine: generation": run.generate,
        "engine: KV reuse": run.reuse,
        "engine: cancellation": run.cancel,
        "engine: statistics": run.read_statistics,
        "engine: shutdown": run.shut_down,
    }
    for name, step in steps.items():
        try:
            yield Check(name, "passed", (step(),))
        except Exception as error:
            yield Check(name, "FAILED", (f"{type(error).__name__}: {error}",))


class _EngineRun:
    """A short use of an engine, as the adapter uses it; steps raise where it is not as recorded."""

    _PROMPT = tuple(range(100, 400))  # more than two blocks, whatever their usual size
    _NUM_TOKENS = 8
    _MANY_TOKENS = 128
    _PATIENCE = datetime.timedelta(seconds=120)

    def __init__(self, api: Any, engine_dir: Path) -> None:
        self.api = api
        cache = api.KvCacheConfig(enable_block_reuse=True, free_gpu_memory_fraction=0.5)
        config = api.ExecutorConfig(
            kv_cache_config=cache, enable_chunked_context=True, request_stats_max_iterations=1000
        )
        self.executor = api.Executor(str(engine_dir), api.ModelType.DECODER_ONLY, config)
        self.output: list[int] = []

    def _enqueue(self, prompt: list[int], max_tokens: int) -> int:
        output = self.api.OutputConfig(exclude_input_from_output=True, return_perf_metrics=True)
        request = self.api.Request(prompt, max_tokens, streaming=True, output_config=output)
        request_id: int = self.executor.enqueue_request(request)
        return request_id

    def _results(self, request_id: int) -> Iterator[Any]:
        """Results up to the final one."""
        while True:
            responses = self.executor.await_responses(request_id, timeout=self._PATIENCE)
            if not responses:
                raise RuntimeError(f"no response in {self._PATIENCE.seconds} s")
            for response in responses:
                if response.has_error():
                    raise RuntimeError(response.error_msg)
                yield response.result
                if response.result.is_final:
                    return

    def _complete(self, prompt: list[int]) -> tuple[list[int], Any]:
        """The tokens of a completion, and its KV metrics."""
        results = list(self._results(self._enqueue(prompt, self._NUM_TOKENS)))
        tokens = [token for result in results for token in result.output_token_ids[0]]
        _expect("tokens", len(tokens), self._NUM_TOKENS)
        _expect("finish_reasons[0]", results[-1].finish_reasons[0], self.api.FinishReason.LENGTH)
        return tokens, results[-1].request_perf_metrics.kv_cache_metrics

    def generate(self) -> str:
        self.output, _ = self._complete(list(self._PROMPT))
        return f"{len(self.output)} tokens on {len(self._PROMPT)}"

    def reuse(self) -> str:
        """What was generated is a prefix whose blocks are found again."""
        _, metrics = self._complete([*self._PROMPT, *self.output])
        if metrics.num_reused_blocks == 0:
            raise RuntimeError("num_reused_blocks is 0: build with --use_paged_context_fmha enable")
        return f"{metrics.num_reused_blocks} blocks reused, {metrics.num_missed_blocks} missed"

    def cancel(self) -> str:
        request_id = self._enqueue(list(self._PROMPT), self._MANY_TOKENS)
        num_tokens = 0
        for result in self._results(request_id):
            if num_tokens == 0:
                self.executor.cancel_request(request_id)
            num_tokens += len(result.output_token_ids[0])
        _expect("finish_reasons[0]", result.finish_reasons[0], self.api.FinishReason.CANCELLED)
        return f"after {num_tokens} tokens of {self._MANY_TOKENS}"

    def read_statistics(self) -> str:
        iterations = self.executor.get_latest_iteration_stats()
        requests = self.executor.get_latest_request_stats()
        scheduled = sum(r.scheduled for stats in requests for r in stats.request_stats)
        if not iterations or not scheduled:
            raise RuntimeError(f"{len(iterations)} iterations, {scheduled} scheduled requests")
        size = iterations[-1].kv_cache_stats.tokens_per_block
        latency_ms = min(stats.iter_latency_ms for stats in iterations)
        return f"{len(iterations)} iterations from {latency_ms:.2f} ms, blocks of {size} tokens"

    def shut_down(self) -> str:
        self.executor.shutdown()
        _expect("can_enqueue_requests()", self.executor.can_enqueue_requests(), False)
        return "requests are refused afterwards"


def _expect(what: str, got: object, expected: object) -> None:
    if got != expected:
        raise RuntimeError(f"{what} is {got}, expected {expected}")


# ---- command line


def add_parser(commands: Any) -> None:
    """Adds the `verify` sub-command."""
    parser = commands.add_parser(
        "verify",
        help="check the recorded TensorRT-LLM API against the installed one",
        description=__doc__,
    )
    parser.add_argument("--contract", type=Path, help="instead of the repository's own")
    parser.add_argument("--engine-dir", type=Path, help="compiled engine for a short run")
    parser.add_argument("--report", type=Path, help="also write the result as JSON")
    parser.add_argument(
        "--write-confirmed", action="store_true", help="mark the contract, if this confirms it"
    )
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    if arguments.engine_dir and not (arguments.engine_dir / "config.json").is_file():
        raise ConfigError(f"engine-dir: {arguments.engine_dir} holds no config.json of an engine")
    contract = load_contract(arguments.contract)
    result = verify(contract, arguments.engine_dir)
    console = Console()
    console.print(_table(result))
    console.print(_conclusion(result))
    try:
        if arguments.report:
            arguments.report.write_text(json.dumps(_report(result), indent=1) + "\n")
        if arguments.write_confirmed and result.exit_status == 0:
            result.confirmed_contract().save(arguments.contract or DEFAULT_PATH)
        elif arguments.write_confirmed:
            console.print("The contract stays as it was.")
    except OSError as error:
        raise ConfigError(f"{error.filename}: {error.strerror}") from error
    return result.exit_status


def _table(result: Verification) -> Table:
    table = Table(title=f"{result.contract.module}, recorded {result.contract.version}")
    for heading in ("check", "outcome", "found"):
        table.add_column(heading)
    for check in result.checks:
        outcome = f"[{_STYLES[check.outcome]}]{check.outcome}[/]"
        table.add_row(check.name, outcome, escape("\n".join(check.details)))
    return table


def _conclusion(result: Verification) -> str:
    if result.exit_status == 1:
        return "The installed bindings are not as recorded: see FAILED."
    if result.exit_status == 0:
        return "The installed bindings are as recorded."
    installed = "is not installed here" if result.version is None else "could not be imported"
    num = len(result.contract.classes) + len(result.contract.enums)
    return (
        f"TensorRT-LLM {installed}: the recorded API of {result.contract.version} ({num} classes "
        f"and enums, {result.contract.status}) was not compared."
    )


def _report(result: Verification) -> dict[str, Any]:
    return {
        "contract": {"version": result.contract.version, "status": result.contract.status},
        "installed_version": result.version,
        "exit_status": result.exit_status,
        "checks": [asdict(check) for check in result.checks],
    }
