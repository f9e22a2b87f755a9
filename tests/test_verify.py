"""`engine_build verify`, against packages made from the contract, right and wrong ones."""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from engine_build.__main__ import main
from engine_build.contract import DEFAULT_PATH, Contract, Signature, load_contract
from engine_build.surface import read_module, read_stub, short_type
from perf.trtllm_fake.strict import build_module

MODULE = """
from pathlib import Path
from engine_build.contract import load_contract
from perf.trtllm_fake.strict import build_module, create
api = build_module(load_contract(Path(__file__).with_name("contract.json")))
globals().update(vars(api))
"""

# Generates 1, 2, ... with a cache of whole blocks; a request is cancelled by its second response.
RUNTIME = """
class Response(api.Response):
    __slots__ = ()

    def _has_error(self):
        return False


class Executor(api.Executor):
    __slots__ = ("requests", "seen", "cancelled", "down")

    def _init(self, **_):
        self.requests, self.seen, self.cancelled, self.down = {}, [], set(), False

    def _enqueue_request(self, request):
        self.requests[len(self.requests)] = request
        return len(self.requests) - 1

    def _cancel_request(self, id):
        self.cancelled.add(id)

    def _await_responses(self, id, timeout):
        request = self.requests[id]
        if id in self.cancelled:
            return [self.respond(id, [7], api.FinishReason.CANCELLED)]
        if request.max_tokens > 8:
            return [self.respond(id, [7], api.FinishReason.NOT_FINISHED)]
        tokens = list(range(1, request.max_tokens + 1))
        return [self.respond(id, tokens, api.FinishReason.LENGTH)]

    def respond(self, id, tokens, reason):
        prompt = self.requests[id].input_token_ids
        shared = max((common(prompt, other) for other in self.seen), default=0)
        blocks = api.KvCacheMetrics()
        blocks.num_reused_blocks, blocks.num_missed_blocks = BLOCKS(shared), 1
        metrics = create(api.RequestPerfMetrics, kv_cache_metrics=blocks)
        final = reason is not api.FinishReason.NOT_FINISHED
        if final:
            self.seen.append(prompt + tokens)
        return create(Response, request_id=id, result=create(
            api.Result, is_final=final, output_token_ids=[tokens], finish_reasons=[reason],
            request_perf_metrics=metrics))

    def _get_latest_iteration_stats(self):
        stats = create(api.KvCacheStats, tokens_per_block=32)
        return [create(api.IterationStats, iter_latency_ms=2.5, kv_cache_stats=stats)]

    def _get_latest_request_stats(self):
        scheduled = create(api.RequestStats, id=0, scheduled=True)
        return [create(api.RequestStatsPerIteration, iter=0, request_stats=[scheduled])]

    def _shutdown(self):
        self.down = True

    def _can_enqueue_requests(self):
        return not self.down


def common(one, other):
    pairs = enumerate(zip(one, other))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
"""


class Package:
    """A tensorrt_llm that offers what a (changed) contract says."""

    def __init__(self, root: Path) -> None:
        self.root = root / "tensorrt_llm"
        (self.root / "bindings").mkdir(parents=True)
        (self.root / "bindings" / "__init__.py").touch()
        (self.root / "__init__.py").touch()
        self.content: dict[str, Any] = json.loads(DEFAULT_PATH.read_text())

    def write(self, version: str = "1.2.1", stubs: bool = True, code: str = "") -> None:
        (self.root / "version.py").write_text(f'__version__ = "{version}"\n')
        bindings = self.root / "bindings"
        (bindings / "contract.json").write_text(json.dumps(self.content))
        (bindings / "executor.py").write_text(MODULE + code)
        if stubs:  # where nanobind's generator puts them
            contract = Contract.model_validate(self.content)
            write_stubs(contract, self.root / "executor")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Package]:
    def forget() -> None:
        for name in [n for n in sys.modules if n.partition(".")[0] == "tensorrt_llm"]:
            monkeypatch.delitem(sys.modules, name)

    forget()
    monkeypatch.syspath_prepend(tmp_path / "site")
    yield Package(tmp_path / "site")
    forget()


def write_stubs(contract: Contract, root: Path) -> None:
    """Stubs in the form of nanobind's stubgen."""
    files: dict[str, list[str]] = {"": [], "kv_cache": []}
    for name, enum in contract.enums.items():
        members = "\n".join(f"    {m} = {i}" for i, m in enumerate(enum.members))
        files[""].append(f"class {name}(enum.Enum):\n{members}")
    nested = [n for n in contract.classes if "." in n and not n.startswith("kv_cache.")]
    for name in contract.classes.keys() - nested:
        inner = [stub_of_class(contract, n) for n in nested if n.startswith(f"{name}.")]
        text = stub_of_class(contract, name) + indented(inner)
        files["kv_cache" if name.startswith("kv_cache.") else ""].append(text)
    for folder, parts in files.items():
        (root / folder).mkdir(exist_ok=True)
        (root / folder / "__init__.pyi").write_text("\n\n".join(parts) + "\n")


def stub_of_class(contract: Contract, name: str) -> str:
    record, lines = contract.classes[name], ["pass"]
    for method, overloads in {"__init__": record.constructors, **record.methods}.items():
        mark = "@overload\n" if len(overloads) > 1 else ""
        lines += [f"{mark}def {method}({stub_of(o)}) -> {o.returns}: ..." for o in overloads]
    for prop, recorded in record.properties.items():
        lines.append(f"@property\ndef {prop}(self) -> {recorded.type}: ...")
        if recorded.writable:
            lines.append(f"@{prop}.setter\ndef {prop}(self, arg: object, /) -> None: ...")
    lines += [f"{a}: {type(v).__name__} = {v!r}" for a, v in record.attributes.items()]
    return f"class {name.rpartition('.')[2]}:\n" + indented(lines)


def stub_of(signature: Signature) -> str:
    parts, starred = ["self"], False
    for p in signature.parameters:
        if p.kind == "keyword_only" and not starred:
            parts, starred = [*parts, "*"], True
        default = p.model_dump(mode="json", by_alias=True)["default"]
        text = repr(default)
        if isinstance(default, dict):  # objects show as "...", enum members by name
            text = f"{default['enum']}.{default['member']}" if "enum" in default else "..."
        parts.append(f"{p.name}: {p.type}" + ("" if p.required else f" = {text}"))
        parts += ["/"] * (p.kind == "positional_only")
    return ", ".join(parts)


def indented(parts: list[str]) -> str:
    return "".join(f"    {line}\n" for part in parts for line in part.splitlines())


def run(tmp_path: Path, *arguments: str) -> tuple[int, dict[str, dict[str, Any]]]:
    """Exit status and checks by name."""
    report = tmp_path / "report.json"
    status = main(["verify", "--report", str(report), *arguments])
    content = json.loads(report.read_text())
    assert content["exit_status"] == status
    return status, {check["name"]: check for check in content["checks"]}


# ---- packages


def test_package_as_recorded_passes(package: Package, tmp_path: Path) -> None:
    package.write()
    status, checks = run(tmp_path)
    outcomes = {name: check["outcome"] for name, check in checks.items()}
    assert outcomes == {
        "version": "passed",
        "type stubs": "passed",
        "bindings": "passed",
        "engine": "not checked",
    }
    assert status == 0


def parameters(content: dict[str, Any], name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = content["classes"][name]["constructors"][0]["parameters"]
    return found


def edit(content: dict[str, Any], name: str, argument: str, **changes: Any) -> None:
    next(p for p in parameters(content, name) if p["name"] == argument).update(changes)


def drop_argument(content: dict[str, Any]) -> None:
    parameters(content, "Request").pop()


def add_argument(content: dict[str, Any]) -> None:
    new = {"name": "rank", "kind": "keyword_only", "required": True, "type": "int"}
    parameters(content, "Request").append(new)


def swap_arguments(content: dict[str, Any]) -> None:
    found = parameters(content, "LoraConfig")
    found[1], found[2] = found[2], found[1]


def change_default(content: dict[str, Any]) -> None:
    edit(content, "ExecutorConfig", "enable_chunked_context", default=True)


def change_enum_default(content: dict[str, Any]) -> None:
    default = {"enum": "BatchingType", "member": "STATIC"}
    edit(content, "ExecutorConfig", "batching_type", default=default)


def drop_default(content: dict[str, Any]) -> None:
    name = "dynamic_batch_moving_average_window"
    edit(content, "DynamicBatchConfig", name, required=False, default=128)


def change_kind(content: dict[str, Any]) -> None:
    edit(content, "KvCacheConfig", "event_buffer_max_size", kind="keyword_only")


def change_type(content: dict[str, Any]) -> None:
    edit(content, "Request", "client_id", type="str | None")


def make_read_only(content: dict[str, Any]) -> None:
    content["classes"]["SamplingConfig"]["properties"]["top_k"]["writable"] = False


def drop_property(content: dict[str, Any]) -> None:
    del content["classes"]["RequestStats"]["properties"]["scheduled"]


def drop_overload(content: dict[str, Any]) -> None:
    content["classes"]["Executor"]["methods"]["await_responses"].pop()


def drop_method(content: dict[str, Any]) -> None:
    del content["classes"]["Response"]["methods"]["has_error"]


def drop_class(content: dict[str, Any]) -> None:
    del content["classes"]["kv_cache.KVCacheEvent"]


def drop_constructor(content: dict[str, Any]) -> None:
    content["classes"]["OrchestratorConfig"].update(constructors=[], constructible=False)


def drop_member(content: dict[str, Any]) -> None:
    content["enums"]["FinishReason"]["members"].remove("CANCELLED")


def add_member(content: dict[str, Any]) -> None:
    content["enums"]["RequestStage"]["members"].append("PAUSED")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (drop_argument, "Request() argument cache_salt_id is missing"),
        (add_argument, "Request() argument rank is unrecorded"),
        (swap_arguments, "LoraConfig() takes task_id, config, weights in this order"),
        (
            change_default,
            "ExecutorConfig() argument enable_chunked_context has default True, recorded False",
        ),
        (
            change_enum_default,
            "ExecutorConfig() argument batching_type has default BatchingType.STATIC, recorded "
            "BatchingType.INFLIGHT",
        ),
        (
            drop_default,
            "DynamicBatchConfig() argument dynamic_batch_moving_average_window has a default",
        ),
        (
            change_kind,
            "KvCacheConfig() argument event_buffer_max_size is keyword_only, recorded "
            "positional_or_keyword",
        ),
        (change_type, "Request() argument client_id is str | None, recorded int | None"),
        (make_read_only, "SamplingConfig.top_k is read-only"),
        (drop_property, "RequestStats.scheduled is missing"),
        (drop_overload, "Executor.await_responses() has 2 overloads, recorded 3"),
        (drop_method, "Response.has_error is missing"),
        (drop_class, "kv_cache.KVCacheEvent is missing"),
        (drop_constructor, "OrchestratorConfig cannot be constructed"),
        (drop_member, "FinishReason.CANCELLED is missing"),
        (add_member, "RequestStage.PAUSED is unrecorded"),
    ],
)
def test_each_mismatch_is_named_once(
    package: Package, tmp_path: Path, change: Callable[[dict[str, Any]], None], line: str
) -> None:
    change(package.content)
    package.write()
    status, checks = run(tmp_path)
    assert status == 1
    assert checks["type stubs"]["details"] == [line]
    assert checks["bindings"]["details"] == [line]


def test_new_attributes_show_only_on_import(package: Package, tmp_path: Path) -> None:
    package.content["classes"]["Request"]["dynamic_attributes"] = False
    package.write()
    status, checks = run(tmp_path)
    assert status == 1
    assert checks["type stubs"]["outcome"] == "passed"
    assert checks["bindings"]["details"] == ["Request refuses new attributes"]


def test_unrecorded_properties_do_not_matter(package: Package, tmp_path: Path) -> None:
    new = {"writable": True, "type": "int"}
    package.content["classes"]["RequestStats"]["properties"]["num_drafts"] = new
    package.write()
    assert run(tmp_path)[0] == 0


@pytest.mark.parametrize("version", ["1.3.0rc23", "1.1.0", "2.0"])
def test_other_lines_are_refused_with_alternative(
    package: Package, tmp_path: Path, version: str
) -> None:
    package.write(version)
    status, checks = run(tmp_path)
    assert status == 1
    assert list(checks) == ["version"]
    assert "PyTorch flow" in checks["version"]["details"][0]


def test_without_stubs_the_bindings_suffice(package: Package, tmp_path: Path) -> None:
    package.write(stubs=False)
    status, checks = run(tmp_path)
    assert (status, checks["type stubs"]["outcome"]) == (0, "not checked")


def test_failed_import_is_no_pass(
    package: Package, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    package.write(code="raise ImportError('libnvinfer.so.10: cannot open')")
    status, checks = run(tmp_path)
    assert (status, checks["bindings"]["outcome"]) == (3, "not checked")
    assert "libnvinfer" in checks["bindings"]["details"][0]
    assert "could not be imported" in capsys.readouterr().out


def test_absent_package_says_what_stays_open(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    contract = tmp_path / "contract.json"
    content = {**json.loads(DEFAULT_PATH.read_text()), "package": "tensorrt_llm_absent"}
    contract.write_text(json.dumps(content))
    status, checks = run(tmp_path, "--contract", str(contract))
    assert status == 3
    assert {check["outcome"] for check in checks.values()} == {"not checked"}
    assert "is not installed here: the recorded API of 1.2.1" in capsys.readouterr().out


# ---- engine


def write_engine_config(engine_dir: Path, num_ranks: int = 1) -> None:
    config = {"pretrained_config": {"mapping": {"world_size": num_ranks}}}
    (engine_dir / "config.json").write_text(json.dumps(config))


def test_engine_of_several_ranks_is_not_run(package: Package, tmp_path: Path) -> None:
    package.write()
    write_engine_config(tmp_path, num_ranks=2)
    status, checks = run(tmp_path, "--engine-dir", str(tmp_path))
    assert (status, checks["engine"]["outcome"]) == (0, "not checked")
    assert "2 ranks" in checks["engine"]["details"][0]


def test_engine_run_proves_reuse_and_cancel(package: Package, tmp_path: Path) -> None:
    package.write(code=RUNTIME + "BLOCKS = lambda shared: shared // 32\n")
    write_engine_config(tmp_path)
    status, checks = run(tmp_path, "--engine-dir", str(tmp_path))
    assert status == 0, checks
    assert checks["engine: generation"]["details"] == ["8 tokens on 300"]
    assert checks["engine: KV reuse"]["details"] == ["9 blocks reused, 1 missed"]
    assert checks["engine: cancellation"]["details"] == ["after 2 tokens of 128"]
    assert "blocks of 32 tokens" in checks["engine: statistics"]["details"][0]
    assert checks["engine: shutdown"]["outcome"] == "passed"


@pytest.mark.parametrize(
    ("code", "failed", "reason"),
    [
        ("BLOCKS = lambda shared: 0\n", "engine: KV reuse", "num_reused_blocks is 0"),
        (
            "BLOCKS = lambda s: 1\nExecutor._get_latest_request_stats = lambda self: []\n",
            "engine: statistics",
            "0 scheduled requests",
        ),
        (
            "BLOCKS = lambda s: 1\nExecutor._shutdown = lambda self: None\n",
            "engine: shutdown",
            "can_enqueue_requests() is True",
        ),
        (
            "def no_gpu(self, **_): raise RuntimeError('no CUDA-capable device')\n"
            "Executor._init = no_gpu\n",
            "engine",
            "no CUDA-capable device",
        ),
    ],
)
def test_engine_failures_are_named(
    package: Package, tmp_path: Path, code: str, failed: str, reason: str
) -> None:
    package.write(code=RUNTIME + code)
    write_engine_config(tmp_path)
    status, checks = run(tmp_path, "--engine-dir", str(tmp_path))
    assert status == 1
    assert [n for n, c in checks.items() if c["outcome"] == "FAILED"] == [failed]
    assert reason in checks[failed]["details"][0]


# ---- confirmation and command line


def test_write_confirmed_marks_the_contract(package: Package, tmp_path: Path) -> None:
    package.write()
    contract = tmp_path / "contract.json"
    contract.write_text(DEFAULT_PATH.read_text())
    assert run(tmp_path, "--contract", str(contract), "--write-confirmed")[0] == 0
    marked = load_contract(contract)
    assert marked.status == "confirmed" and marked.confirmed is not None
    assert marked.confirmed.how == ("version", "type stubs", "bindings")
    assert marked.classes == load_contract().classes


def test_failure_or_other_version_confirms_nothing(
    package: Package, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    contract = tmp_path / "contract.json"
    contract.write_text(DEFAULT_PATH.read_text())
    drop_argument(package.content)
    package.write()
    assert run(tmp_path, "--contract", str(contract), "--write-confirmed")[0] == 1
    assert "The contract stays as it was." in capsys.readouterr().out
    assert contract.read_text() == DEFAULT_PATH.read_text()


def test_patch_version_passes_but_confirms_nothing(
    package: Package, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    package.write("1.2.0")
    contract = tmp_path / "contract.json"
    contract.write_text(DEFAULT_PATH.read_text())
    arguments = ["verify", "--contract", str(contract)]
    assert main(arguments) == 0
    assert main([*arguments, "--write-confirmed"]) == 2
    assert "1.2.0 is installed; the contract is of 1.2.1" in capsys.readouterr().err
    assert contract.read_text() == DEFAULT_PATH.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--contract", "nowhere.json"], "contract: nowhere.json: No such file"),
        (["--engine-dir", "nowhere"], "engine-dir: nowhere holds no config.json"),
        (["--report", "nowhere/report.json"], "nowhere/report.json: No such file"),
    ],
)
def test_bad_arguments_give_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["verify", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


# ---- reading what nanobind writes (forms as given by nanobind 2.8)


@pytest.mark.parametrize(
    ("text", "short"),
    [
        (
            "collections.abc.Sequence[collections.abc.Sequence[int]] | None",
            "list[list[int]] | None",
        ),
        ("datetime.timedelta | float | None", "timedelta | None"),
        ("str | os.PathLike", "Path"),
        ("tensorrt_llm.bindings.executor.SamplingConfig", "SamplingConfig"),
        ("Optional[List[int]]", "list[int] | None"),
        ("torch.Tensor | None", "object | None"),
        ("list[int | None] | None", "list[int | None] | None"),
    ],
)
def test_types_come_in_short_form(text: str, short: str) -> None:
    assert short_type(ast.parse(text, mode="eval").body) == short


def test_nanobind_signature_is_read() -> None:
    api = build_module(load_contract())
    text = (
        "def __init__(self, t: collections.abc.Sequence[int], *, p: float = \\0, "
        "i: mini.Inner = \\1, w: std::vector<std::pair<int, int>> | None = \\2) -> None"
    )

    def nanobind(*signature: Any) -> Any:
        def function(self: Any) -> None: ...

        function.__nb_signature__ = (signature,)  # type: ignore[attr-defined]
        return function

    module = ModuleType("mini")
    constructor = nanobind(text, None, (0.5, api.SchedulerConfig(), None))
    getter = nanobind("def (self) -> datetime.timedelta | None", None, None)
    module.R = type("R", (), {"__init__": constructor, "d": property(getter)})  # type: ignore[attr-defined]
    seen = read_module(module, ["R", "Absent"]).classes["R"]
    ids, chance, inner, pairs = seen.constructors[0].parameters
    assert (ids.kind, ids.type, ids.required) == ("positional_or_keyword", "list[int]", True)
    assert (chance.kind, chance.default) == ("keyword_only", 0.5)
    assert inner.default.class_name == "SchedulerConfig"  # type: ignore[union-attr]
    assert (pairs.type, pairs.default) == ("object | None", None)
    assert (seen.properties["d"].type, seen.properties["d"].writable) == ("timedelta | None", False)


def test_stub_is_read_with_submodule_beside(tmp_path: Path) -> None:
    (tmp_path / "executor").mkdir()
    (tmp_path / "executor.pyi").write_text(
        "class Mode(enum.Enum):\n    DRAM = 0\n\n    GDS = 1\n\n"
        "class S:\n    def __init__(self, a: Sequence[int], mode: Mode = Mode.DRAM, s: S = ...)"
        " -> None: ...\n"
    )
    (tmp_path / "executor" / "kv_cache.pyi").write_text("class Ev:\n    pass\n")
    surface = read_stub(tmp_path / "executor.pyi")
    assert surface.enums["Mode"].members == ("DRAM", "GDS")
    assert [p.type for p in surface.classes["S"].constructors[0].parameters] == [
        "list[int]",
        "Mode",
        "S",
    ]
    assert not surface.classes["kv_cache.Ev"].constructible
