"""The recorded TensorRT-LLM API, and the strict classes that are built from it."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine_build.contract import DEFAULT_PATH, ContractError, load_contract
from perf.trtllm_fake.strict import build_module, create


@pytest.fixture(scope="module")
def api() -> SimpleNamespace:
    return build_module(load_contract())


def written(tmp_path: Path, **changes: Any) -> Path:
    path = tmp_path / "contract.json"
    path.write_text(json.dumps({**json.loads(DEFAULT_PATH.read_text()), **changes}))
    return path


# ---- the record


def test_contract_names_source_of_everything() -> None:
    contract = load_contract()
    assert contract.status == "unconfirmed"
    assert {r.source for r in contract.classes.values()} == set(contract.sources)
    assert all(len(source.commit) == 40 for source in contract.sources.values())


def test_contract_survives_saving(tmp_path: Path) -> None:
    path = tmp_path / "contract.json"
    load_contract().save(path)
    assert path.read_text() == DEFAULT_PATH.read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"status": "sure"}, "status"),
        ({"status": "confirmed"}, "status: must be 'confirmed' exactly where"),
        ({"unknown_field": 1}, "unknown_field"),
        ({"sources": {}}, "is not in sources"),
        ({"enums": {}}, "no recorded"),
    ],
)
def test_wrong_contract_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ContractError, match=message):
        load_contract(written(tmp_path, **changes))


def test_missing_contract_is_named(tmp_path: Path) -> None:
    with pytest.raises(ContractError, match=r"nowhere\.json: No such file"):
        load_contract(tmp_path / "nowhere.json")


# ---- constructors


def test_defaults_are_as_recorded(api: SimpleNamespace) -> None:
    config = api.ExecutorConfig()
    assert config.enable_chunked_context is False
    assert config.request_stats_max_iterations == 0
    assert config.batching_type is api.BatchingType.INFLIGHT
    policy = api.CapacitySchedulerPolicy.GUARANTEED_NO_EVICT
    assert config.scheduler_config.capacity_scheduler_policy is policy
    assert config.extended_runtime_perf_knob_config.cuda_graph_mode is False
    assert api.OutputConfig().return_perf_metrics is False
    request = api.Request([1, 2], 3)
    assert request.request_type is api.RequestType.REQUEST_TYPE_CONTEXT_AND_GENERATION
    assert request.sampling_config.beam_width == 1
    assert api.Request.BATCHED_POST_PROCESSOR_NAME == "batched"


def test_default_objects_are_fresh(api: SimpleNamespace) -> None:
    first, second = api.ExecutorConfig(), api.ExecutorConfig()
    first.kv_cache_config.max_tokens = 7
    assert second.kv_cache_config.max_tokens is None


def test_arguments_are_copied_in(api: SimpleNamespace) -> None:
    cache, ids = api.KvCacheConfig(), [1, 2]
    config, request = api.ExecutorConfig(kv_cache_config=cache), api.Request(ids, 3)
    cache.max_tokens = 7
    ids.append(9)
    assert config.kv_cache_config.max_tokens is None
    assert request.input_token_ids == [1, 2]


@pytest.mark.parametrize(
    ("name", "args", "kwargs", "message"),
    [
        ("Request", ([1], 2), {"cache_salt": 1}, "unknown argument 'cache_salt'"),
        ("Request", ([1],), {}, "missing argument 'max_tokens'"),
        ("Request", ([1], 2, True), {}, "2 positional arguments at most"),
        ("Request", ([1], 2), {"max_tokens": 3}, "'max_tokens' given twice"),
        ("Request", ([1.5], 2), {}, r"'input_token_ids' is list\[int\]"),
        ("Request", ([1], 2), {"allotted_time_ms": 30}, "'allotted_time_ms' is timedelta"),
        ("Request", ([1], 2), {"sampling_config": None}, "'sampling_config' is SamplingConfig"),
        ("SamplingConfig", (1, 40), {}, "1 positional arguments at most"),
        ("KvCacheConfig", (), {"enable_block_reuse": 1}, "'enable_block_reuse' is bool"),
        ("KvCacheRetentionConfig", ([],), {}, "'directory' is str, and not its default None"),
        ("Executor", ("/engine", "DECODER_ONLY", None), {}, "'model_type' is ModelType"),
        ("Response", (1,), {"result": "text"}, "'result' is Result"),
    ],
)
def test_constructor_refuses(
    api: SimpleNamespace, name: str, args: Any, kwargs: Any, message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        getattr(api, name)(*args, **kwargs)


def test_nested_class_and_submodule(api: SimpleNamespace) -> None:
    lasts = datetime.timedelta(seconds=3)
    kept = api.KvCacheRetentionConfig.TokenRangeRetentionConfig(0, 64, 90, lasts)
    config = api.KvCacheRetentionConfig([kept], 80, directory="")
    assert config.token_range_retention_configs[0].duration_ms == lasts
    with pytest.raises(TypeError, match="'token_end' is int, got None"):
        api.KvCacheRetentionConfig.TokenRangeRetentionConfig(0, None, 90)
    with pytest.raises(TypeError, match="no constructor"):
        api.kv_cache.KVCacheEvent()
    assert create(api.kv_cache.KVCacheEvent, event_id=3).event_id == 3


# ---- properties


def test_read_only_property_is_not_written(api: SimpleNamespace) -> None:
    scheduler = api.SchedulerConfig()
    for target, name in (
        (scheduler, "capacity_scheduler_policy"),
        (scheduler, "context_chunking_policy"),
        (scheduler, "dynamic_batch_config"),
        (api.Request([1], 2), "max_tokens"),
    ):
        with pytest.raises(AttributeError, match="no setter"):
            setattr(target, name, None)


def test_priority_is_constructor_only(api: SimpleNamespace) -> None:
    request = api.Request([1], 2, priority=0.9)
    with pytest.raises(AttributeError):
        _ = request.priority
    with pytest.raises(AttributeError, match="only be given to the constructor"):
        request.priority = 1.0


def test_only_dynamic_classes_take_unknown_attributes(api: SimpleNamespace) -> None:
    dynamic = {n for n, r in load_contract().classes.items() if r.dynamic_attributes}
    assert dynamic == {"ExecutorConfig", "Request"}
    api.ExecutorConfig().my_note = 1
    with pytest.raises(AttributeError):
        api.KvCacheConfig().max_blocks = 1


def test_setters_check_type_and_refuse_none(api: SimpleNamespace) -> None:
    config = api.SamplingConfig(top_k=3)
    config.top_k = 5
    with pytest.raises(TypeError, match=r"SamplingConfig.top_k cannot be set to None"):
        config.top_k = None
    with pytest.raises(TypeError, match=r"SamplingConfig.top_k is int"):
        config.top_k = "5"
    result = api.Result()
    result.cum_log_probs = None  # marked so in the bindings


def test_create_makes_what_the_runtime_makes(api: SimpleNamespace) -> None:
    result = create(api.Result, is_final=True, finish_reasons=[api.FinishReason.LENGTH])
    response = create(api.Response, request_id=1, result=result)
    assert response.result.finish_reasons == [api.FinishReason.LENGTH]
    with pytest.raises(AttributeError, match=r"Response.error_msg was given no value"):
        _ = response.error_msg
    with pytest.raises(TypeError, match="no property 'final'"):
        create(api.Result, final=True)
    with pytest.raises(TypeError, match="is_final is bool"):
        create(api.Result, is_final=1)


def test_enums_have_recorded_members_in_order(api: SimpleNamespace) -> None:
    assert [m.name for m in api.FinishReason][-2:] == ["TIMED_OUT", "CANCELLED"]
    assert len(api.FinishReason) == 6


# ---- methods


def test_methods_bind_overloads_and_call_behaviour(api: SimpleNamespace) -> None:
    class Executor(api.Executor):
        def _init(self, model_path: str, **_: Any) -> None:
            self.path = model_path

        def _await_responses(self, **arguments: Any) -> dict[str, Any]:
            return arguments

        def _enter(self) -> Any:
            return self

    executor = Executor("/engine", api.ModelType.DECODER_ONLY, api.ExecutorConfig())
    second = datetime.timedelta(seconds=1)
    assert executor.path == "/engine" and executor.__enter__() is executor
    assert executor.await_responses() == {"timeout": None}
    assert executor.await_responses(second) == {"timeout": second}
    assert executor.await_responses(5, timeout=second) == {"id": 5, "timeout": second}
    assert executor.await_responses([5, 6]) == {"ids": [5, 6], "timeout": None}
    with pytest.raises(TypeError, match="'timeout' is timedelta"):
        executor.await_responses(timeout=0.5)
    with pytest.raises(TypeError, match="'id' is int, and not its default None"):
        executor.cancel_request()
    with pytest.raises(NotImplementedError, match="shutdown has no behaviour"):
        executor.shutdown()
