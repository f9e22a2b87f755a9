"""The behavioural fake of TensorRT-LLM's executor: a test per rule that the adapter lives with."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_build.contract import load_contract
from engine_build.verify import verify
from perf.trtllm_fake import bindings as trt
from perf.trtllm_fake import engine_dir
from perf.trtllm_fake.block_tree import BlockTree, Retention, TokenBlocks, TokenRange
from perf.trtllm_fake.engine_dir import BuildConfig, FakeEngine, PluginConfig
from taper_trtllm.config import RandomModelConfig
from taper_trtllm.engines.checkpoint import random_checkpoint
from taper_trtllm.profile import DecodePoint, LatencyProfile, PrefillPoint

BLOCK = 4
TINY = RandomModelConfig(
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    intermediate_size=128,
    vocab_size=512,
)
NOW = timedelta(0)
SOON = timedelta(seconds=60)


# ---- engines and requests


def make_engine(
    path: Path,
    *,
    decoder: Any = None,
    drive: str = "virtual",
    paged: bool = True,
    num_kv_blocks: int = 1000,
    **build: int,
) -> Path:
    LatencyProfile(
        fingerprint={},
        decode=tuple(
            DecodePoint(width=w, context_tokens=c, step_ms=10) for w in (1, 64) for c in (1, 4096)
        ),
        prefill=tuple(
            PrefillPoint(
                width=0,
                context_tokens=0,
                num_chunks=1,
                num_tokens=n,
                token_context=n * n / 2,
                step_ms=10 + n / 100,
            )
            for n in (1, 100)
        ),
    ).save(path / "profile.json")
    plugins = PluginConfig(tokens_per_block=BLOCK, use_paged_context_fmha=paged)
    limits = {"max_seq_len": 256, "max_batch_size": 64, "max_num_tokens": 512, **build}
    decoder = decoder or engine_dir.ProfileDecoderConfig(path=Path("profile.json"), token=7)
    engine = FakeEngine(drive=drive, num_kv_blocks=num_kv_blocks, decoder=decoder)
    engine_dir.write_engine_dir(
        path, BuildConfig(plugin_config=plugins, **limits), engine, {"architecture": "Qwen3"}
    )
    return path


def executor(path: Path, *, kv_cache: Any = None, **config: Any) -> Any:
    defaults = {"enable_chunked_context": True, "request_stats_max_iterations": 1000}
    options = {**defaults, **config}
    made = trt.ExecutorConfig(kv_cache_config=kv_cache or trt.KvCacheConfig(), **options)
    return trt.Executor(path, trt.ModelType.DECODER_ONLY, made)


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    return make_engine(tmp_path)


@pytest.fixture(scope="module")
def torch_engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_engine(
        tmp_path_factory.mktemp("torch"),
        decoder=engine_dir.TorchDecoderConfig(random_model=TINY, step_ms=10),
    )


def request(prompt: Iterable[int], max_tokens: int = 8, **options: Any) -> Any:
    options = {"streaming": True, **options}
    return trt.Request(list(prompt), max_tokens, **options)


def prompt_of(length: int, first: int = 0) -> list[int]:
    """Tokens that no prompt with another `first` begins with."""
    return [1000 * first + i for i in range(length)]


class Client:
    """Collects what an executor answers."""

    def __init__(self, ex: Any) -> None:
        self.ex = ex
        self.tokens: dict[int, list[int]] = {}
        self.final: dict[int, Any] = {}
        self.errors: dict[int, str] = {}

    def send(self, *requests: Any) -> list[int]:
        return self.ex.enqueue_requests(list(requests))

    def step(self) -> None:
        """One turn, in virtual time, once something is running."""
        for response in self.ex.await_responses(NOW):
            i = response.request_id
            assert i not in self.final and i not in self.errors, "an answer after the last"
            if response.has_error():
                self.errors[i] = response.error_msg
                continue
            self.tokens.setdefault(i, []).extend(response.result.output_token_ids[0])
            if response.result.is_final:
                self.final[i] = response.result

    def finish(self, *ids: int) -> list[list[int]]:
        for _ in range(2000):
            if all(i in self.final or i in self.errors for i in ids):
                return [self.tokens.get(i, []) for i in ids]
            self.step()
        raise AssertionError("not answered")

    def run(self, *requests: Any) -> list[list[int]]:
        return self.finish(*self.send(*requests))

    def reason(self, request_id: int) -> str:
        return self.final[request_id].finish_reasons[0].name


def steps_of(ex: Any, request_id: int) -> list[int]:
    """Numbers of the steps that a request was in."""
    return [step.iter for step in ex.runtime.history if request_id in step.request_ids]


def recomputed(ex: Any, request_id: int) -> int:
    """Prompt tokens that were computed for a request."""
    return sum(
        num_tokens
        for step in ex.runtime.history
        for i, num_tokens in step.context
        if i == request_id
    )


# ---- the loop


def test_grants_and_revokes_act_two_steps_later_and_a_revoke_loses_a_token(engine: Path) -> None:
    ex = executor(engine)
    client = Client(ex)
    (parent,) = client.send(request(prompt_of(10), 100))
    client.step()  # launches step 0
    for _ in range(5):
        client.step()
    k = ex.runtime.num_iterations - 1  # the last step whose responses are known
    assert len(client.tokens[parent]) == k + 1
    (child,) = client.send(request(prompt_of(10, 1), 100))
    ex.cancel_request(parent)
    client.step()
    client.step()
    assert steps_of(ex, child)[0] == k + 2
    assert steps_of(ex, parent)[-1] == k + 1
    assert client.reason(parent) == "CANCELLED"
    assert client.final[parent].output_token_ids == [[]]
    assert len(client.tokens[parent]) == k + 1 == len(steps_of(ex, parent)) - 1
    ex.runtime.check_integrity()


@pytest.mark.parametrize("shortage", [{"max_batch_size": 1}, {"num_kv_blocks": 10}])
def test_a_request_that_is_cancelled_before_it_ran_still_runs_one_step(
    shortage: dict[str, int], tmp_path: Path
) -> None:
    ex = executor(make_engine(tmp_path, **shortage))
    client = Client(ex)
    first, second = client.send(request(prompt_of(5), 3), request(prompt_of(5, 1), 35))
    client.step()
    ex.cancel_request(second)
    client.finish(first, second)
    assert len(steps_of(ex, second)) == 1
    assert steps_of(ex, second)[0] == steps_of(ex, first)[-1] + 1
    assert client.reason(second) == "CANCELLED" and client.tokens[second] == []


def test_an_idle_loop_starts_at_once_and_counts_the_waiting_as_latency(engine: Path) -> None:
    ex = executor(engine)
    client = Client(ex)
    client.run(request(prompt_of(5), 1))
    assert client.ex.await_responses(SOON) == []  # nothing to do: no time passes
    ended_s = ex.runtime.now_s()
    ex.runtime.advance_to(ended_s + 5)
    ex.get_latest_iteration_stats()
    (late,) = client.send(request(prompt_of(5, 1), 2))
    client.finish(late)
    launched = ex.runtime.history[-2]
    assert launched.launched_s == ended_s + 5
    first, second, *_ = ex.get_latest_iteration_stats()
    assert first.iter_latency_ms < 20, "of the step before the idle time"
    assert second.iter_latency_ms == pytest.approx(5010, abs=1), "from the fetch that waited"


def test_statistics_are_of_the_launched_step_and_its_predecessors_time(engine: Path) -> None:
    ex = executor(engine)
    client = Client(ex)
    one, two = client.send(request(prompt_of(6), 2), request(prompt_of(6, 1), 4))
    client.finish(one, two)
    scheduled = {
        stats.iter: {r.id for r in stats.request_stats if r.scheduled}
        for stats in ex.get_latest_request_stats()
    }
    launched = {step.iter: step.request_ids for step in ex.runtime.history}
    assert scheduled == {**launched, 4: set()}  # one entry more, once all have ended
    stats = ex.get_latest_iteration_stats()
    assert [s.iter for s in stats] == [0, 1, 2, 3, 4]
    assert [s.iter_latency_ms for s in stats] == pytest.approx([0, 10.1, 10, 10, 0], abs=0.1)
    assert [s.inflight_batching_stats.num_gen_requests for s in stats] == [0, 2, 1, 1, 0]
    assert stats[0].inflight_batching_stats.num_ctx_tokens == 12
    assert [s.num_completed_requests for s in stats] == [0, 0, 1, 0, 1]
    assert stats[-1].kv_cache_stats.free_num_blocks == 1000
    metrics = client.final[two].request_perf_metrics
    assert metrics is None, "nobody asked for them"


def test_statistics_drop_the_oldest_silently_and_are_off_by_default(engine: Path) -> None:
    ex = executor(engine, iter_stats_max_iterations=3, request_stats_max_iterations=2)
    Client(ex).run(request(prompt_of(5), 10))
    assert [s.iter for s in ex.get_latest_iteration_stats()] == [8, 9, 10]
    assert [s.iter for s in ex.get_latest_request_stats()] == [9, 10]
    assert ex.get_latest_iteration_stats() == []
    made = trt.ExecutorConfig()
    plain = trt.Executor(engine, trt.ModelType.DECODER_ONLY, made)
    Client(plain).run(request(prompt_of(5), 3))
    assert plain.get_latest_request_stats() == []


def test_a_failed_step_ends_all_active_requests(engine: Path) -> None:
    ex = executor(engine)
    client = Client(ex)
    ids = client.send(*(request(prompt_of(9, i), 50) for i in range(3)))
    client.step()
    client.step()
    ex.runtime.fail_next_step("illegal memory access")
    client.finish(*ids)
    assert set(client.errors) == set(ids)
    expected = "Encountered an error in forwardSync function: illegal memory access"
    assert set(client.errors.values()) == {expected}
    ex.runtime.check_integrity()
    assert len(client.run(request(prompt_of(9, 9), 4))[0]) == 4, "and serves on"


# ---- scheduling


def test_contexts_pay_for_their_whole_prompt_and_the_first_that_does_not_fit_ends_the_scan(
    tmp_path: Path,
) -> None:
    ex = executor(make_engine(tmp_path, max_num_tokens=40), enable_chunked_context=False)
    client = Client(ex)
    client.run(request(prompt_of(30), 1))  # its prompt is cached from here on
    ids = client.send(
        request(prompt_of(30), 5), request(prompt_of(20, 2), 5), request(prompt_of(4, 3), 5)
    )
    client.finish(*ids)
    first, second, third = (steps_of(ex, i)[0] for i in ids)
    assert recomputed(ex, ids[0]) < BLOCK + 2, "reused, and paid for in full all the same"
    assert (second, third) == (first + 1, first + 1), "a prompt of 4 waits behind one of 20"


def test_without_chunking_a_prompt_beyond_the_token_limit_is_refused_on_its_own(
    tmp_path: Path,
) -> None:
    ex = executor(make_engine(tmp_path, max_num_tokens=40), enable_chunked_context=False)
    client = Client(ex)
    good, bad = client.send(request(prompt_of(40), 2), request(prompt_of(41, 1), 2))
    client.finish(good, bad)
    assert "Prompt length (41) exceeds maximum input length (40)" in client.errors[bad]
    assert client.reason(good) == "LENGTH"


def test_chunks_take_what_generation_leaves_in_whole_blocks(tmp_path: Path) -> None:
    ex = executor(make_engine(tmp_path, max_num_tokens=19))
    client = Client(ex)
    (running,) = client.send(request(prompt_of(3), 30))
    client.step()
    client.step()
    long, short = client.send(request(prompt_of(41, 1), 2), request(prompt_of(3, 2), 2))
    client.finish(running, long, short)
    chunks = [list(step.context) for step in ex.runtime.history if step.context]
    # 18 tokens beside the running one: 16 in whole blocks, and two are left, too few for `short`.
    assert chunks[1:] == [[(long, 16)], [(long, 16)], [(long, 9), (short, 3)]]
    assert len(client.tokens[long]) == 2


def test_a_chunk_behind_reused_tokens_ends_at_a_block(tmp_path: Path) -> None:
    ex = executor(make_engine(tmp_path, max_num_tokens=18))
    client = Client(ex)
    client.run(request(prompt_of(7), 1))
    (long,) = client.send(request(prompt_of(41), 2))
    client.finish(long)
    chunks = [n for step in ex.runtime.history for i, n in step.context if i == long]
    assert chunks == [13, 16, 5], "16 tokens behind 7 would end at 23"


def test_blocks_are_reserved_to_the_end_of_a_request(tmp_path: Path) -> None:
    ex = executor(make_engine(tmp_path, num_kv_blocks=11))
    client = Client(ex)
    # 5 + 15 tokens take 5 blocks; two of these leave one block free from the start.
    ids = client.send(
        *(request(prompt_of(5, i), 15) for i in range(3)), request(prompt_of(2, 3), 2)
    )
    client.finish(*ids)
    ends = [steps_of(ex, i)[-1] for i in ids]
    assert steps_of(ex, ids[1])[0] == 0
    assert steps_of(ex, ids[2])[0] == ends[0] + 1
    assert steps_of(ex, ids[3])[0] == ends[0] + 1, "fits before, but waits behind one that does not"
    ex.runtime.check_integrity()


def test_what_can_never_be_scheduled_is_an_error_not_a_hang(tmp_path: Path) -> None:
    ex = executor(make_engine(tmp_path, num_kv_blocks=4))
    ex.enqueue_request(request(prompt_of(10), 20))
    with pytest.raises(RuntimeError, match="none of which can be scheduled"):
        ex.await_responses()
    assert ex.await_responses(timedelta(milliseconds=1)) == []


def test_siblings_wait_one_step_for_the_prefix_that_the_first_computes(engine: Path) -> None:
    ex = executor(engine)
    client = Client(ex)
    prefix = prompt_of(16)
    ids = client.send(*(request([*prefix, 500 + i], 4) for i in range(3)))
    client.finish(*ids)
    assert [steps_of(ex, i)[0] for i in ids] == [0, 1, 1]
    assert [recomputed(ex, i) for i in ids] == [17, 1, 1]


def test_the_same_text_behind_different_prefixes_waits_for_nobody(engine: Path) -> None:
    ex = executor(engine)
    client = Client(ex)
    client.run(request(prompt_of(9, 1), 1), request(prompt_of(9, 2), 1))
    tail = prompt_of(8, 3)
    ids = client.send(*(request([*prompt_of(8, i), *tail], 1) for i in (1, 2)))
    client.finish(*ids)
    assert steps_of(ex, ids[0]) == steps_of(ex, ids[1])


def test_higher_priorities_are_fetched_past_a_full_house_and_wait_for_a_place(
    tmp_path: Path,
) -> None:
    ex = executor(make_engine(tmp_path, max_batch_size=2))
    client = Client(ex)
    low = client.send(*(request(prompt_of(4, i), 9, priority=0.1) for i in range(3)))
    client.step()
    (high,) = client.send(request(prompt_of(4, 7), 9, priority=0.9))
    client.step()
    assert (ex.runtime.num_active, ex.runtime.num_queued) == (3, 1)
    client.finish(*low, high)
    assert steps_of(ex, high)[0] == steps_of(ex, low[0])[-1] + 1
    assert steps_of(ex, low[2])[0] >= steps_of(ex, high)[0]


# ---- reuse


@settings(max_examples=25, deadline=None)
@given(length=st.integers(2, 40), lease=st.integers(1, 17), cancelled=st.booleans())
def test_a_resumed_slice_computes_exactly_one_token(
    length: int, lease: int, cancelled: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    ex = executor(make_engine(tmp_path_factory.mktemp("engine")))
    client = Client(ex)
    (first,) = client.send(request(prompt_of(length), 200 if cancelled else lease))
    while len(client.tokens.get(first, ())) < lease:
        client.step()
    if cancelled:
        ex.cancel_request(first)
    client.finish(first)
    assert len(client.tokens[first]) == lease
    (second,) = client.send(request([*prompt_of(length), *client.tokens[first]], 2))
    client.finish(second)
    assert recomputed(ex, second) == 1
    ex.runtime.check_integrity()


@pytest.mark.parametrize(
    ("parent_len", "expected"),
    [
        (18, [2, 3, 3, 3]),  # 17 tokens with KV: a tail of one
        (19, [2, 4, 4, 4]),
        # The tail and the parent's last token fill a block that is the same for all: the others
        # wait for the first to compute it.
        (20, [2, 1, 1, 1]),
        (21, [2, 2, 2, 2]),  # no tail
    ],
)
def test_of_the_children_of_an_ended_parent_one_gets_its_tail(
    parent_len: int, expected: list[int], engine: Path
) -> None:
    ex = executor(engine)
    client = Client(ex)
    parent = [*prompt_of(10), *client.run(request(prompt_of(10), parent_len - 10))[0]]
    assert len(parent) == parent_len
    ids = client.send(*(request([*parent, 600 + i], 3) for i in range(4)))
    client.finish(*ids)
    assert [recomputed(ex, i) for i in ids] == expected
    ex.runtime.check_integrity()


@pytest.mark.parametrize(("partial_reuse", "expected"), [(True, 2), (False, 1)])
def test_a_new_sibling_takes_the_tail_of_a_paused_one(
    partial_reuse: bool, expected: int, engine: Path
) -> None:
    """A leaf that nobody holds is claimed for the prefix in it; what its owner wrote is lost."""
    ex = executor(engine, kv_cache=trt.KvCacheConfig(enable_partial_reuse=partial_reuse))
    client = Client(ex)
    prefix = prompt_of(18)  # ends amid a block
    (tokens,) = client.run(request([*prefix, 600], 1))
    paused = [*prefix, 600, *tokens]
    client.run(request([*prefix, 700], 1))
    (resumed,) = client.send(request(paused, 2))
    client.finish(resumed)
    assert recomputed(ex, resumed) == expected


def test_a_running_parent_shares_its_full_blocks(engine: Path) -> None:
    ex = executor(engine)
    client = Client(ex)
    (parent,) = client.send(request(prompt_of(10), 100))
    while len(client.tokens.get(parent, ())) < 9:
        client.step()
    text = [*prompt_of(10), *client.tokens[parent]]  # 19 tokens, 18 with KV, 16 in full blocks
    (child,) = client.send(request([*text, 600], 3))
    client.finish(child)
    assert recomputed(ex, child) == 20 - 16


def test_the_salt_and_the_adapter_keep_requests_apart(engine: Path) -> None:
    ex = executor(engine)
    client = Client(ex)
    ids = client.send(request(prompt_of(21), 1, cache_salt_id=1))
    client.finish(*ids)
    others = client.send(
        request(prompt_of(21), 1, cache_salt_id=2),
        request(prompt_of(21), 1, cache_salt_id=1, lora_config=trt.LoraConfig(5)),
        request(prompt_of(21), 1, cache_salt_id=1),
    )
    client.finish(*others)
    assert [recomputed(ex, i) for i in others] == [21, 21, 1]


def test_partial_matches_are_claimed_copied_or_left_alone(tmp_path: Path) -> None:
    def reused(**kv_cache: bool) -> int:
        ex = executor(tmp_path, kv_cache=trt.KvCacheConfig(**kv_cache))
        client = Client(ex)
        (running,) = client.send(request(prompt_of(13), 100))
        client.step()
        client.step()  # its three full prompt blocks can be found, and are in use
        child = [*prompt_of(6), *prompt_of(9, 1)]
        (other,) = client.send(request(child, 2))
        client.finish(other)
        ex.cancel_request(running)
        client.finish(running)
        ex.runtime.check_integrity()
        return len(child) - recomputed(ex, other)

    make_engine(tmp_path)
    assert reused() == 6, "two tokens of the second block were copied"
    assert reused(copy_on_partial_reuse=False) == 4
    assert reused(enable_partial_reuse=False) == 4
    assert reused(enable_block_reuse=False) == 0


def test_a_cancel_amid_a_prompt_publishes_blocks_that_were_never_computed(tmp_path: Path) -> None:
    """As the original does: whoever cancels there must not reuse the prefix."""
    ex = executor(make_engine(tmp_path, max_num_tokens=8))
    client = Client(ex)
    (first,) = client.send(request(prompt_of(41), 2))
    client.step()
    ex.cancel_request(first)
    client.finish(first)
    assert recomputed(ex, first) == 8
    (second,) = client.send(request(prompt_of(41), 2))
    client.finish(second)
    assert recomputed(ex, second) == 1


def test_metrics_of_a_request_count_its_prompt_blocks(engine: Path) -> None:
    client = Client(executor(engine))
    output = trt.OutputConfig(return_perf_metrics=True)
    first, second = (
        client.run(request(prompt_of(18), 3, output_config=output)) and max(client.final)
        for _ in range(2)
    )
    new = client.final[first].request_perf_metrics.kv_cache_metrics
    assert (new.num_total_allocated_blocks, new.num_new_allocated_blocks) == (5, 5)
    assert (new.num_missed_blocks, new.num_reused_blocks, new.kv_cache_hit_rate) == (5, 0, 0)
    again = client.final[second].request_perf_metrics
    kv_cache = again.kv_cache_metrics
    assert (kv_cache.num_reused_blocks, kv_cache.kv_cache_hit_rate) == (5, 1)
    assert kv_cache.num_total_allocated_blocks == 0, "the tail was claimed, the rest shared"
    assert (again.first_iter, again.last_iter, again.iter) == (3, 5, 5)
    assert client.ex.runtime.tree.num_cached_blocks == 5  # 20 tokens with KV
    times = again.timing_metrics
    assert times.arrival_time == times.first_scheduled_time < times.first_token_time
    assert (times.last_token_time - times.first_token_time).total_seconds() == pytest.approx(0.02)


# ---- blocks


def tree_of(num_blocks: int, clock: list[float] | None = None) -> BlockTree:
    now = clock or [0.0]
    return BlockTree(num_blocks, BLOCK, lambda: now[0])


def store(tree: BlockTree, tokens: Sequence[int], retention: Retention | None = None) -> None:
    """A request that comes and goes."""
    text = TokenBlocks(tokens, (None, None), BLOCK)
    sequence = tree.add_sequence(text, retention or Retention())
    tree.store_context(sequence)
    tree.release(sequence)


def found(tree: BlockTree, tokens: Sequence[int]) -> int:
    """Full blocks of a prompt that can be found."""
    node, count = tree._roots.get((None, None)), 0
    for key in TokenBlocks(tokens, (None, None), BLOCK).full_keys(len(tokens)):
        node = node.children.get(key) if node else None
        if node is None:
            return count
        count += 1
    return count


def test_blocks_are_evicted_by_priority_then_age_from_the_tail() -> None:
    tree = tree_of(9)
    high = Retention((TokenRange(0, None, 80),))
    store(tree, prompt_of(9, 1), high)
    store(tree, prompt_of(9, 2))
    store(tree, prompt_of(9, 3))
    store(tree, prompt_of(5, 4))  # two blocks: the tail of 2 and its partial last block
    assert [found(tree, prompt_of(8, i)) for i in (1, 2, 3)] == [2, 1, 2]
    store(tree, prompt_of(5, 5))
    store(tree, prompt_of(9, 6))
    assert found(tree, prompt_of(8, 1)) == 2, "more worth keeping than all others"
    assert found(tree, prompt_of(8, 2)) == 0
    tree.check_integrity()


def test_retention_ends_with_its_duration() -> None:
    clock = [0.0]
    tree = tree_of(4, clock)
    store(tree, prompt_of(9, 1), Retention((TokenRange(0, None, 90, duration_s=10.0),)))
    clock[0] = 9.0
    tree.refresh()
    store(tree, prompt_of(9, 2))
    assert found(tree, prompt_of(8, 1)) == 1, "only its end went, for lack of others"
    clock[0] = 11.0
    tree.refresh()
    store(tree, prompt_of(9, 3))
    assert found(tree, prompt_of(8, 1)) == 1, "as old as any now, and released last"
    store(tree, prompt_of(13, 4))
    assert found(tree, prompt_of(8, 1)) == 0
    tree.check_integrity()


def test_blocks_that_are_worth_less_go_before_older_ones() -> None:
    tree = tree_of(6)
    store(tree, prompt_of(9, 1))
    store(tree, prompt_of(9, 2), Retention((TokenRange(0, None, 10),)))
    store(tree, prompt_of(9, 3))
    assert (found(tree, prompt_of(8, 1)), found(tree, prompt_of(8, 2))) == (2, 0)


def test_what_is_no_longer_worth_more_goes_in_its_turn() -> None:
    clock = [0.0]
    tree = tree_of(6, clock)
    store(tree, prompt_of(9, 1), Retention((TokenRange(0, None, 90, duration_s=10.0),)))
    clock[0] = 11.0
    tree.refresh()
    store(tree, prompt_of(9, 2))
    store(tree, prompt_of(9, 3))
    assert (found(tree, prompt_of(8, 1)), found(tree, prompt_of(8, 2))) == (0, 2)


def test_nothing_is_found_through_an_evicted_block() -> None:
    tree = tree_of(6)
    first = prompt_of(13, 1)
    store(tree, first, Retention((TokenRange(0, 4, 10), TokenRange(4, None, 80))))
    assert found(tree, first) == 3
    other = prompt_of(5, 2)
    store(tree, other)  # takes the first block of the other prompt
    assert found(tree, first) == 0
    assert found(tree, [*other[:4], *first[4:]]) == 1
    tree.check_integrity()


def test_retention_is_taken_from_the_range_of_a_blocks_first_token() -> None:
    ranges = (TokenRange(2, 9, 50), TokenRange(12, None, 60, 1.0))
    per_block = Retention(ranges).per_block(5, BLOCK)
    assert per_block == [(None, None), (50, None), (50, None), (60, 1.0), (60, 1.0)]


class Written:
    """What the blocks of a tree really hold, if every launched token is computed."""

    def __init__(self, tree: BlockTree) -> None:
        self.tree = tree
        self.content: dict[int, list[int]] = {}

    def write(self, sequence: Any, start: int) -> None:
        for position in range(start, len(sequence.text.tokens)):
            block = sequence.blocks[position // BLOCK]
            cells = self.content.setdefault(block.block_id, [-1] * BLOCK)
            cells[position % BLOCK] = sequence.text.tokens[position]

    def add(self, tokens: list[int]) -> Any:
        sequence = self.tree.add_sequence(TokenBlocks(tokens, (None, None), BLOCK), Retention())
        assert sequence.num_reused_tokens < len(tokens)
        for position in range(sequence.num_reused_tokens):
            block = sequence.blocks[position // BLOCK]
            assert self.content[block.block_id][position % BLOCK] == tokens[position]
        self.tree.store_context(sequence)
        self.write(sequence, sequence.num_reused_tokens)
        return sequence

    def generate(self, sequence: Any, token: int) -> None:
        sequence.text.tokens.append(token)
        self.tree.add_token(sequence)
        self.tree.store_new_block(sequence)
        self.write(sequence, len(sequence.text.tokens) - 1)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_reused_blocks_hold_what_is_expected_of_them(data: st.DataObject) -> None:
    num_blocks = data.draw(st.integers(8, 24))
    tree = BlockTree(num_blocks, BLOCK, lambda: 0.0, copy_on_partial_reuse=False)
    written, running = Written(tree), []
    words = st.lists(st.integers(0, 1), min_size=1, max_size=14)
    for _ in range(data.draw(st.integers(1, 40))):
        action = data.draw(st.sampled_from(["add", "generate", "generate", "release"]))
        if action == "add" and tree.num_free_blocks >= 4:
            running.append(written.add(data.draw(words)))
        elif action == "generate" and running and tree.num_free_blocks:
            written.generate(data.draw(st.sampled_from(running)), data.draw(st.integers(0, 1)))
        elif running:
            sequence = running.pop(data.draw(st.integers(0, len(running) - 1)))
            sequence.text.tokens.append(9)  # the last token has no KV
            tree.release(sequence)
        tree.check_integrity()


# ---- responses


def test_the_forms_of_a_response(engine: Path) -> None:
    ex = executor(engine)

    def responses(**options: Any) -> list[tuple[list[int], bool]]:
        i = ex.enqueue_request(trt.Request([1, 2, 3], 3, client_id=77, **options))
        got = []
        while not got or not got[-1].result.is_final:
            got += ex.await_responses(i, SOON)
        assert {r.client_id for r in got} == {77} and {r.request_id for r in got} == {i}
        return [(r.result.output_token_ids[0], r.result.is_final) for r in got]

    exclude = trt.OutputConfig(exclude_input_from_output=True)
    assert responses() == [([1, 2, 3, 7, 7, 7], True)]
    assert responses(output_config=exclude) == [([7, 7, 7], True)]
    assert responses(streaming=True) == [([7], False), ([7], False), ([7], True)]
    everything = responses(streaming=True, return_all_generated_tokens=True)
    assert everything == [([7], False), ([7, 7], False), ([7, 7, 7], True)]


def test_how_requests_end(engine: Path) -> None:
    client = Client(executor(engine))
    min_tokens = trt.SamplingConfig(min_tokens=2)
    ids = client.send(
        request(prompt_of(5, 1), 9, end_id=7),
        request(prompt_of(5, 2), 9, stop_words=[[7, 7, 7]]),
        request(prompt_of(5, 3), 9, end_id=8),
        request(prompt_of(5, 4), 9, end_id=7, sampling_config=min_tokens),
        request(prompt_of(250, 5), 9),
    )
    end, stop, length, later, cut = client.finish(*ids)
    assert (client.reason(ids[0]), end) == ("END_ID", []), "the end token is not part of it"
    assert (client.reason(ids[1]), stop) == ("STOP_WORDS", [7, 7, 7])
    assert (client.reason(ids[2]), length) == ("LENGTH", [7] * 9)
    assert (client.reason(ids[3]), later) == ("END_ID", [8, 8]), "not before two others"
    assert (client.reason(ids[4]), len(cut)) == ("LENGTH", 6), "max_seq_len is 256"


def test_a_request_ends_when_its_time_is_over(engine: Path) -> None:
    client = Client(executor(engine))
    allotted = timedelta(milliseconds=55)
    (late,) = client.send(request(prompt_of(5), 100, allotted_time_ms=allotted))
    client.finish(late)
    assert client.reason(late) == "TIMED_OUT"
    # Steps of 10 ms: the launch after the sixth finds it late, and the seventh token is lost.
    assert len(client.tokens[late]) == 6


def test_what_is_wrong_with_a_request_is_said_where_the_original_says_it(engine: Path) -> None:
    with pytest.raises(RuntimeError, match="mInputTokenIds"):
        trt.Request([], 1)
    with pytest.raises(RuntimeError, match="mMaxNewTokens > 0"):
        trt.Request([1], 0)
    ex = executor(engine, max_queue_size=2)
    client = Client(ex)
    (long,) = client.send(request(prompt_of(256), 1))
    client.finish(long)
    assert "Prompt length (256) exceeds maximum input length (255)" in client.errors[long]
    client.send(request([1]), request([2]))
    with pytest.raises(RuntimeError, match="Maximum queue size of 2 has been reached"):
        ex.enqueue_request(request([3]))
    with pytest.raises(NotImplementedError, match="bad_words"):
        ex.enqueue_request(request([3], bad_words=[[1]]))


def test_a_terminated_request_and_an_executor_that_was_shut_down(engine: Path) -> None:
    with executor(engine) as ex:
        done = ex.enqueue_request(trt.Request([1, 2], 2))
        ((response,),) = ex.await_responses([done], SOON)
        assert response.result.is_final and ex.get_num_responses_ready() == 0
        (again,) = ex.await_responses(done, SOON)
        expected = f"ReqId {done} has already been processed and was terminated."
        assert again.has_error() and again.error_msg == expected
        ex.cancel_request(done)  # ignored
        other = ex.enqueue_request(trt.Request([1, 2], 2))
        assert [r.request_id for r in ex.await_responses(SOON)] == [other]
        assert ex.await_responses(other)[0].has_error()
        with pytest.raises(TypeError):
            ex.await_responses(0.5)
        assert ex.can_enqueue_requests()
        ex.enqueue_request(trt.Request([1, 2], 2))
    assert ex.runtime.num_active == ex.runtime.num_queued == 0, "what was queued ran"
    assert not ex.can_enqueue_requests()
    ex.shutdown()
    for call in (ex.await_responses, ex.get_latest_iteration_stats, ex.get_num_responses_ready):
        with pytest.raises(RuntimeError, match="Shutdown called"):
            call()
    with pytest.raises(RuntimeError, match="Shutdown called, cannot enqueue requests"):
        ex.enqueue_request(trt.Request([1], 1))


# ---- the model behind it


def test_tokens_are_those_of_independent_generation_whatever_the_schedule(
    torch_engine: Path,
) -> None:
    rng = random.Random(1)
    base = [rng.randrange(512) for _ in range(60)]
    sampled = trt.SamplingConfig(top_k=40, temperature=0.9, seed=11)
    prompts = [[*base[: rng.randrange(3, 60)], rng.randrange(512)] for _ in range(12)]
    configs = [sampled if i % 3 == 0 else trt.SamplingConfig() for i in range(12)]
    alone = Client(executor(torch_engine))
    expected = [
        alone.run(request(p, 20, sampling_config=c))[0]
        for p, c in zip(prompts, configs, strict=True)
    ]
    assert len({tuple(tokens) for tokens in expected}) > 6, "the model has something to say"
    together = Client(executor(torch_engine, max_num_tokens=32))
    ids: list[int] = []
    for p, c in zip(prompts, configs, strict=True):
        ids += together.send(request(p, 20, sampling_config=c))
        for _ in range(rng.randrange(4)):
            together.step()
        if rng.random() < 0.4:
            together.ex.cancel_request(rng.choice(ids))
    for i, tokens in zip(ids, together.finish(*ids), strict=True):
        assert tokens == expected[i - 1][: len(tokens)]
        assert len(tokens) == 20 or together.reason(i) == "CANCELLED"
    assert {together.reason(i) for i in ids} == {"LENGTH", "CANCELLED"}
    together.ex.runtime.check_integrity()


def test_slices_of_greedy_generation_join_to_the_whole(torch_engine: Path) -> None:
    client = Client(executor(torch_engine))
    prompt = [5, 17, 300, 44, 21, 9]
    (whole,) = client.run(request(prompt, 24))
    text = list(prompt)
    for size in (1, 7, 3, 13):
        text += client.run(request(text, size))[0]
    assert text[len(prompt) :] == whole


def test_sampling_begins_anew_with_every_request(torch_engine: Path) -> None:
    client = Client(executor(torch_engine))
    sampling = trt.SamplingConfig(top_p=1.0, temperature=50.0, seed=3)  # noise decides, not logits
    (whole,) = client.run(request([5, 6, 7], 6, sampling_config=sampling))
    (rest,) = client.run(request([5, 6, 7, *whole[:3]], 3, sampling_config=sampling))
    assert rest == whole[:3] != whole[3:]


def test_the_end_token_is_not_drawn_before_min_tokens(torch_engine: Path) -> None:
    client = Client(executor(torch_engine))
    ((end, *_),) = client.run(request([5, 6, 7], 4))
    assert client.run(request([5, 6, 7], 4, end_id=end)) == [[]]
    config = trt.SamplingConfig(min_tokens=3)
    (tokens,) = client.run(request([5, 6, 7], 4, end_id=end, sampling_config=config))
    assert len(tokens) >= 3 and end not in tokens


# ---- any schedule


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_script_conserves_blocks_and_answers_everything(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = make_engine(
        tmp_path_factory.mktemp("engine"),
        num_kv_blocks=data.draw(st.sampled_from([16, 30, 200])),
        max_batch_size=data.draw(st.sampled_from([2, 5, 64])),
        max_num_tokens=data.draw(st.sampled_from([32, 64])),
        max_seq_len=60,
    )
    ex = executor(path, enable_chunked_context=data.draw(st.booleans()))
    client = Client(ex)
    asked: dict[int, int] = {}
    cancelled: set[int] = set()
    for _ in range(data.draw(st.integers(1, 12))):
        for _ in range(data.draw(st.integers(0, 3))):
            length = data.draw(st.integers(1, 32))
            stem = data.draw(st.integers(0, length))
            prompt = [*prompt_of(stem), *prompt_of(length - stem, data.draw(st.integers(1, 3)))]
            max_tokens = data.draw(st.integers(1, 28))
            asked[client.send(request(prompt, max_tokens))[0]] = max_tokens
        if asked and data.draw(st.booleans()):
            i = data.draw(st.sampled_from(sorted(asked)))
            ex.cancel_request(i)
            cancelled.add(i)
        for _ in range(data.draw(st.integers(0, 6))):
            client.step()
            ex.runtime.check_integrity()
    client.finish(*asked)
    for i, max_tokens in asked.items():
        reason = client.reason(i)
        assert reason == "LENGTH" or (reason == "CANCELLED" and i in cancelled)
        drawn = sum(i in step.drawing for step in ex.runtime.history)
        lost = min(drawn, 1)  # none if it was cancelled amid its prompt
        assert len(client.tokens[i]) == (drawn - lost if reason == "CANCELLED" else max_tokens)
    assert ex.runtime.tree.num_free_blocks == ex.runtime.tree.num_blocks


# ---- real time


def test_the_threaded_loop_answers_waiters_and_keeps_the_delay(tmp_path: Path) -> None:
    with executor(make_engine(tmp_path, drive="threaded")) as ex:
        assert ex.await_responses(timedelta(milliseconds=5)) == []
        parent = ex.enqueue_request(request(prompt_of(5), 30))
        tokens = sum(len(r.result.output_token_ids[0]) for r in ex.await_responses(SOON))
        k = ex.runtime.num_iterations - 1
        child = ex.enqueue_request(request(prompt_of(5, 1), 3))
        ex.cancel_request(parent)
        final = False
        while not final:
            for response in ex.await_responses(parent, SOON):
                final = response.result.is_final
                tokens += len(response.result.output_token_ids[0])
        reason = response.result.finish_reasons[0]
        assert reason == trt.FinishReason.CANCELLED
        assert steps_of(ex, child)[0] >= k + 2
        assert tokens == len(steps_of(ex, parent)) - 1
        assert len(ex.await_responses(child, SOON)) >= 1
        ex.runtime.check_integrity()


# ---- engine directories and the module


def test_an_engine_directory_that_cannot_be_served_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"cannot read .*config.json: No such file"):
        executor(tmp_path)
    make_engine(tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"1.2.1"', '"1.3.0"'))
    with pytest.raises(RuntimeError, match=r"version '1.3.0', this is 1.2.1"):
        executor(tmp_path)
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "rank0.engine").write_bytes(b"ftrt\x00\xff\xfe")
    with pytest.raises(RuntimeError, match="not a fake engine"):
        executor(tmp_path)


def test_what_the_engine_was_not_built_for_is_turned_off_with_a_warning(tmp_path: Path) -> None:
    make_engine(tmp_path, paged=False, max_num_tokens=40)
    with pytest.warns(UserWarning, match="disabled because model was not built") as caught:
        ex = executor(tmp_path, max_batch_size=1000)
    assert len(caught) == 2  # chunked context and reuse
    client = Client(ex)
    (bad,) = client.send(request(prompt_of(41), 1))
    client.finish(bad)
    assert "maximum input length (40)" in client.errors[bad]
    one, two = client.send(request(prompt_of(21), 1), request(prompt_of(21), 1))
    client.finish(one, two)
    assert recomputed(ex, one) == recomputed(ex, two) == 21


def test_the_command_line_writes_an_engine_that_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_engine(tmp_path)
    target = ["--output-dir", str(tmp_path / "made"), "--drive", "virtual"]
    arguments = [*target, "--profile", str(tmp_path / "profile.json"), "--host-ms", "5"]
    assert engine_dir.main(arguments) == 0
    ex = executor(tmp_path / "made")
    Client(ex).run(request(prompt_of(5), 3))
    assert ex.runtime.now_s() == pytest.approx(0.045, abs=1e-3)
    for bad, reason in (
        (["--profile", str(tmp_path / "none.json")], "cannot read the latency profile"),
        (["--max-batch-size", "0"], "max_batch_size: "),
        (["--hidden-size", "0"], "hidden_size: "),
        (["--checkpoint", str(tmp_path / "none")], "cannot read"),
        (["--output-dir", str(tmp_path / "profile.json")], "File exists"),
    ):
        assert engine_dir.main([*target, *bad]) == 2
        error = capsys.readouterr().err
        assert error.startswith("engine_dir: ") and error.count("\n") == 1 and reason in error


def test_a_checkpoint_is_served_as_the_embedded_engine_serves_it(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = random_checkpoint(TINY).config.to_hf()
    config = transformers.Qwen3Config(**shape, initializer_range=0.15)
    transformers.Qwen3ForCausalLM(config).save_pretrained(tmp_path / "model")
    target = ["--output-dir", str(tmp_path / "made"), "--checkpoint", str(tmp_path / "model")]
    assert engine_dir.main([*target, "--max-seq-len", "128", "--max-batch-size", "4"]) == 0
    with executor(tmp_path / "made") as ex:
        done = ex.enqueue_request(trt.Request([1, 2, 3], 8))
        ((response,),) = ex.await_responses([done], SOON)
        ids = torch.tensor([[1, 2, 3]])
        model = transformers.Qwen3ForCausalLM.from_pretrained(tmp_path / "model").eval()
        expected = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None)
        assert response.result.output_token_ids[0] == expected[0].tolist()


def test_the_fake_passes_the_check_of_the_real_bindings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "tensorrt_llm"
    package.mkdir()
    (package / "version.py").write_text('__version__ = "1.2.1"\n')
    monkeypatch.syspath_prepend(tmp_path)
    contract = load_contract().model_copy(update={"module": trt.__name__})
    make_engine(
        tmp_path,
        decoder=engine_dir.TorchDecoderConfig(random_model=TINY),
        drive="threaded",
        max_seq_len=1024,
    )
    checks = {check.name: check for check in verify(contract, tmp_path).checks}
    compared = ["bindings", *(name for name in checks if name.startswith("engine: "))]
    assert len(compared) == 6
    assert {checks[name].outcome for name in compared} == {"passed"}, checks


def test_the_module_has_every_recorded_name() -> None:
    contract = load_contract()
    names = {name.split(".")[0] for name in [*contract.enums, *contract.classes]}
    assert names == set(trt.__all__) and all(hasattr(trt, name) for name in names)
    assert trt.KvCacheRetentionConfig.TokenRangeRetentionConfig(0, 10, 50).priority == 50
