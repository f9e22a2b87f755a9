"""The clients on a real server, and the programs that they build."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from client import Transcript as Tokens_
from serving import ended, is_idle, run_in_process, wait_until

from taper_trtllm.client import (
    AsyncTaperClient,
    BranchFinished,
    BranchResult,
    BranchStarted,
    ConnectionLostError,
    DeadlineExceededError,
    Finished,
    Joined,
    ModelNotFoundError,
    RequestCancelledError,
    RequestError,
    ServerUnavailableError,
    StageStarted,
    TaperClient,
    Tokens,
    Transcript,
    branch,
)
from taper_trtllm.client.__main__ import main
from taper_trtllm.client.helpers import (
    best_of_n,
    map_reduce,
    numbered_points,
    skeleton_then_expand,
    tree_search,
)
from taper_trtllm.client.program import Program
from taper_trtllm.client.wire import INPUT_TYPES
from taper_trtllm.config import ServingConfig
from taper_trtllm.request import build_request
from taper_trtllm.tensors import INPUT_NAMES
from taper_trtllm.tokenizer import ByteTokenizer
from taper_trtllm.triton_server import TritonServer

PROMPT = list(range(1, 41))
NESTED = (
    Program()
    .serial(9)
    .parallel(
        [
            branch([1, 2], 12),
            branch([3]).serial(4).parallel([branch(max_tokens=1), branch(max_tokens=9)]).serial(3),
            branch([4], 1),
        ],
        join=[5, 6],
    )
    .serial(8)
)


# -------------------------------------------------------------------------- without a server


def test_every_input_of_the_server_has_a_type_here():
    assert INPUT_TYPES.keys() == set(INPUT_NAMES)


def test_a_program_is_built_step_by_step_and_never_changes():
    plan = Program().serial(4)
    narrow, wide = (plan.parallel([branch("é:", 3)] * n, join="\n") for n in (2, 3))
    assert json.loads(plan.stages_json()) == [{"type": "serial", "max_tokens": 4}]
    for n, program in ((2, narrow), (3, wide)):
        request = build_request(
            request_id="r", input_ids=[1], stages=json.loads(program.stages_json())
        )
        _, fork = request.stages
        assert [b.header_text for b in fork.branches] == ["é:"] * n and fork.join_text == "\n"
        assert request.stages == program.stages
    nested = branch([7]).parallel([branch().serial(1).serial(2), branch([8], 5)])
    (stage,) = Program().parallel([nested]).stages
    assert stage.branches[0].header_ids == (7,)
    assert [len(b.program) for b in stage.branches[0].stages[0].branches] == [2, 1]


@pytest.mark.parametrize(
    ("build", "field"),
    [
        (lambda: Program().serial(0), "max_tokens"),
        (lambda: Program().parallel([]), "branches"),
        (lambda: Program().parallel([branch("without a stage")]), "branches[0]"),
        (lambda: Program().parallel([branch([-1], 3)]), "branches[0].header_ids[0]"),
        (lambda: Program().parallel([branch(max_tokens=1)] * 257), "branches"),
    ],
)
def test_a_program_that_cannot_be_is_refused_where_it_is_written(build, field: str):
    with pytest.raises(RequestError) as refused:
        build()
    assert refused.value.field == field


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("request_id", 5), ("request_id", "\ud800"), ("deadline_s", "5"),
        ("deadline_s", float("nan")), ("fork_format", "\ud800"), ("text_input", "\udcff"),
    ],
)  # fmt: skip
def test_a_value_that_cannot_be_sent_is_named(field: str, value):
    prompt, options = ("a", {field: value}) if field != "text_input" else (value, {})
    with TaperClient() as client, pytest.raises(RequestError) as refused:
        client.generate(prompt, 3, **options)
    assert refused.value.field == field


def test_a_client_is_closed_once_and_says_so():
    client = TaperClient()
    client.close()
    client.close()
    with pytest.raises(RuntimeError, match="the client is closed"):
        client.generate("a", 3)
    with socket.create_server(("127.0.0.1", 0)) as silent, ThreadPoolExecutor(1) as pool:
        client = TaperClient(f"127.0.0.1:{silent.getsockname()[1]}", connect_timeout_s=60)
        waiting = pool.submit(client.generate, "a", 3)
        silent.accept()
        client.close()
        with pytest.raises(RuntimeError, match="the client was closed"):
            waiting.result()


def test_an_option_that_there_is_none_of_is_refused():
    with TaperClient() as client, pytest.raises(TypeError, match="no such option: heat"):
        client.generate("a", 3, heat=2)


def test_nobody_listening_is_said_with_what_to_start():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"127.0.0.1:{taken.getsockname()[1]}"
    with TaperClient(url, connect_timeout_s=0.2) as client:
        for _ in range(2):
            with pytest.raises(ServerUnavailableError, match=rf"{url} .*scripts/serve\.sh"):
                client.generate("a", 3)


# ------------------------------------------------------------------------------------ answers


def tokens_of(transcript: Transcript) -> Tokens_:
    return {
        (path, stage.stage_index): list(stage.token_ids)
        for path, branch in transcript.branches.items()
        for stage in branch.stages
    }


@pytest.fixture
def client(server: TritonServer) -> Iterator[TaperClient]:
    with TaperClient(server.grpc_url) as connected:
        yield connected


@pytest.mark.triton
def test_both_clients_return_what_the_executor_returns(
    server: TritonServer, client: TaperClient, serving_config: ServingConfig
):
    stages = json.loads(NESTED.stages_json())
    warm = {"temperature": 0.8, "seed": 7, "top_k": 50, "top_p": 0.9}
    (greedy, sampled, plain) = run_in_process(
        serving_config,
        [
            {"input_ids": PROMPT, "stages": stages},
            {"input_ids": PROMPT, "stages": stages, "sampling": warm},
            {"input_ids": PROMPT, "max_tokens": 30},
        ],
    )
    program = client.fork_join(PROMPT)
    program = type(program)(client=client, prompt=PROMPT, stages=NESTED.stages)
    assert tokens_of(program.run()) == greedy
    assert tokens_of(program.run(**warm)) == sampled != greedy
    short = client.generate(PROMPT, 30, slo_ttft_ms=60_000, slo_tpot_ms=60_000)
    assert tokens_of(short) == plain
    assert short.finish_reason == "completed" and short.metrics.slo_met
    assert short.branches[""].finish_reason == "length"
    stop = short.token_ids[3]
    stopped = client.generate(PROMPT, 30, stop_token_ids=[stop])
    assert stopped.branches[""].finish_reason == "stop"
    assert stopped.token_ids == short.token_ids[: short.token_ids.index(stop) + 1]

    async def run() -> None:
        async with AsyncTaperClient(server.grpc_url) as async_client:
            many = (async_client.generate([i, *PROMPT[1:]], 30) for i in (1, 2, 3) * 20)
            answers = await asyncio.gather(*many)
            for i, answer in enumerate(answers):
                assert answer.token_ids == answers[i % 3].token_ids
            assert answers[0].token_ids == short.token_ids
            async with async_client.stream(PROMPT, 30) as stream:
                events = [event async for event in stream]
            assert events[-1] == Finished(await stream.result())
            *tokens, _ = events
            assert all(isinstance(event, Tokens) for event in tokens) and len(tokens) > 1
            assert sum((event.token_ids for event in tokens), ()) == short.token_ids

    asyncio.run(run())


@pytest.mark.triton
def test_text_by_branch_equals_the_text_of_its_tokens(client: TaperClient):
    program = client.fork_join("naïve").parallel([branch("é:", 40), branch("", 6)], join="\n")
    generation = program.serial(20).run(request_id="text")
    assert generation.request_id == "text" and generation.branches.keys() == {"", "0.0", "0.1"}
    for result in generation.branches.values():
        for stage in result.stages:
            assert stage.text == ByteTokenizer().decode(stage.token_ids)
    assert generation.text == generation.branches[""].stages[0].text
    assert client.generate(list(b"abc"), 20).text == ""


@pytest.mark.triton
def test_one_blocking_client_serves_many_threads(client: TaperClient):
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda i: client.generate([i, 2, 3], 20).token_ids, [5, 6] * 32))
    assert answers == answers[:2] * 32


# ----------------------------------------------------------------------------------- refusals


@pytest.mark.triton
@pytest.mark.parametrize(
    ("prompt", "options", "field"),
    [
        ([1, 512], {}, "input_ids"),
        ("", {}, "text_input"),
        (PROMPT, {"top_p": 0.0}, "top_p"),
        (PROMPT, {"slo_tpot_ms": -1.0}, "slo_tpot_ms"),
        (PROMPT, {"stop_token_ids": [3, -1]}, "stop_token_ids[1]"),
        (PROMPT, {"request_id": "a" * 300}, "request_id"),
        (PROMPT, {"seed": -1}, "seed"),
        (PROMPT, {"top_k": 1.5}, "top_k"),
        ([1, 2**40], {}, "input_ids"),
    ],
)
def test_a_refused_request_names_its_field(
    client: TaperClient, prompt: Any, options: Any, field: str
):
    with pytest.raises(RequestError) as refused:
        client.generate(prompt, 4, **options)
    assert refused.value.field == field
    with pytest.raises(RequestError) as refused, client.stream(prompt, 4, **options) as stream:
        list(stream)
    assert refused.value.field == field


@pytest.mark.triton
def test_a_field_inside_a_program_is_named(client: TaperClient):
    program = client.fork_join([1]).serial(2).parallel([branch([], 2), branch([512], 2)])
    with pytest.raises(RequestError, match="token id 512") as refused:
        program.run()
    assert refused.value.field == "stages[1].branches[1].header_ids"


@pytest.mark.triton
def test_a_model_that_is_not_served_is_named(server: TritonServer):
    with (
        TaperClient(server.grpc_url, model="other") as client,
        pytest.raises(ModelNotFoundError, match="other"),
    ):
        client.generate("a", 3)


# ------------------------------------------------------------------------------------- events


@pytest.mark.triton
def test_events_tell_the_whole_story_in_order(client: TaperClient):
    """Replayed, they give the transcript; and no branch does anything before it starts."""
    program = client.fork_join("naïve").serial(5)
    nested = branch("B").serial(8).parallel([branch("x", 3), branch(max_tokens=4)])
    program = program.parallel([branch("é:", 24), nested], join="\n").serial(6)
    with program.stream() as stream:
        *events, end = stream
    assert end == Finished(stream.result())
    assert end.generation.branches.keys() == {"", "1.0", "1.1", "1.1.1.0", "1.1.1.1"}
    started, ended, forks = {""}, [], []
    for event in events:
        assert (event.branch_path in started) != isinstance(event, BranchStarted)
        assert event.branch_path not in ended
        match event:
            case StageStarted(branch_path=path, stage_index=stage):
                forks.append((path, stage))
            case BranchStarted(branch_path=path, text=text):
                started.add(path)
                assert text == {"1.0": "é:", "1.1": "B", "1.1.1.0": "x", "1.1.1.1": ""}[path]
            case BranchFinished(branch_path=path):
                ended.append(path)
            case Joined(branch_path=path, stage_index=stage, text=text):
                assert (path, stage) in forks
                assert text == {"": "\n", "1.1": ""}[path]
    assert forks == [("", 1), ("1.1", 1)]
    assert set(ended) == started - {""} and len(ended) == 4
    for path, result in end.generation.branches.items():
        own = [e for e in events if isinstance(e, Tokens) and e.branch_path == path]
        assert sum((event.token_ids for event in own), ()) == result.token_ids
        assert "".join(event.text for event in own) == result.text
    for step in filter(None, (event.progress for event in events)):
        assert 0 <= step.width <= 3 and step.step_ms > 0
    assert program.run().branches == end.generation.branches


@pytest.mark.triton
def test_a_cancelled_branch_leaves_the_join_and_nothing_else(client: TaperClient):
    branches = [branch([b], 20 if b == 2 else 1300) for b in range(3)]
    program = client.fork_join(PROMPT)
    with program.parallel(branches, allow_branch_cancel=True).serial(9).stream() as stream:
        reasons = {}
        for event in stream:
            match event:
                case BranchFinished(branch_path="0.2"):
                    stream.cancel_branch("0.0", "0.1")
                case Tokens(branch_path=path, finish_reason=reason) if reason is not None:
                    reasons[path] = reason
                case BranchFinished(branch_path=path, finish_reason=reason):
                    reasons[path] = reason
        stream.cancel_branch("0.0")  # has ended: nothing happens
        with pytest.raises(RequestError, match="257 branches exceed"):
            stream.cancel_branch(*["0.0"] * 257)
        with pytest.raises(RuntimeError, match="sent once"):
            stream.__enter__()
    result = stream.result()
    assert reasons == {"0.0": "cancelled", "0.1": "cancelled", "0.2": "length", "": "length"}
    assert all(0 < len(result.branches[path].token_ids) < 1300 for path in ("0.0", "0.1"))
    alone = program.parallel(branches[2:]).serial(9).run()
    assert alone.token_ids == result.token_ids


@pytest.mark.triton
def test_a_branch_of_a_request_that_has_not_begun_cannot_be_cancelled(client: TaperClient):
    with client.stream("", 3) as stream, pytest.raises(RequestError, match="is not open"):
        stream.cancel_branch("0.0")


@pytest.mark.triton
def test_an_unknown_fork_format_is_refused(client: TaperClient):
    with pytest.raises(RequestError) as refused:
        client.generate("a", 3, fork_format="nobody's")
    assert refused.value.field == "fork_format"


# --------------------------------------------------------------------- cancels, deadlines, losses


def leave_early(client: TaperClient, url: str) -> None:
    with client.stream(PROMPT, 1900) as stream:
        assert isinstance(next(stream), Tokens)
    with pytest.raises(RequestCancelledError) as cancelled:
        stream.result()
    assert 0 < len(cancelled.value.partial.token_ids) < 1900


def cancel(client: TaperClient, url: str) -> None:
    with client.stream(PROMPT, 1900) as stream:
        next(stream)
        stream.cancel()
        with pytest.raises(RequestCancelledError):
            list(stream)


def raise_inside(client: TaperClient, url: str) -> None:
    with pytest.raises(ZeroDivisionError), client.stream(PROMPT, 1900) as stream:
        next(stream)
        raise ZeroDivisionError


def exceed_the_deadline(client: TaperClient, url: str) -> None:
    with pytest.raises(DeadlineExceededError, match=r"deadline_s=0\.5") as late:
        client.generate(PROMPT, 1900, deadline_s=0.5)
    assert len(late.value.partial.token_ids) < 1900


def interrupt(client: TaperClient, url: str) -> None:
    # A shell that starts the tests in the background has it ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        interrupt_with_a_signal(client)
    finally:
        signal.signal(signal.SIGINT, before)


def interrupt_with_a_signal(client: TaperClient) -> None:
    with pytest.raises(KeyboardInterrupt), client.stream(PROMPT, 1900) as stream:
        next(stream)
        threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGINT)).start()
        stream.result()


def cancel_the_task(client: TaperClient, url: str) -> None:
    async def run() -> None:
        async with AsyncTaperClient(url) as async_client:
            stream = async_client.stream(PROMPT, 1900)

            async def consume() -> None:
                async with stream:
                    await stream.result()

            task = asyncio.create_task(consume())
            while not stream.transcript.token_ids:
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(run())


def cancel_the_task_on_its_way_out(client: TaperClient, url: str) -> None:
    async def run() -> None:
        async with AsyncTaperClient(url) as async_client:
            with pytest.raises(asyncio.CancelledError):
                async with async_client.stream(PROMPT, 1900) as stream:
                    await anext(stream)
                    asyncio.current_task().cancel()

    asyncio.run(run())


def close_the_client(client: TaperClient, url: str) -> None:
    other = TaperClient(url)
    stream = other.stream(PROMPT, 1900).__enter__()
    next(stream)
    other.close()


@pytest.mark.triton
@pytest.mark.parametrize(
    "end_early",
    [
        leave_early, cancel, raise_inside, exceed_the_deadline, interrupt, cancel_the_task,
        cancel_the_task_on_its_way_out, close_the_client,
    ],
)  # fmt: skip
def test_whatever_ends_a_request_early_returns_its_blocks(
    server: TritonServer,
    client: TaperClient,
    serving_config: ServingConfig,
    end_early: Callable[[TaperClient, str], None],
):
    before = wait_until(server, lambda page: is_idle(page, serving_config))
    end_early(client, server.grpc_url)
    after = wait_until(
        server,
        lambda page: (
            is_idle(page, serving_config)
            and ended(page, "cancelled") == ended(before, "cancelled") + 1
        ),
    )
    assert ended(after, "completed") == ended(before, "completed")


@pytest.mark.triton
def test_a_deadline_that_passes_while_the_request_is_sent_is_a_deadline(client: TaperClient):
    client.generate(PROMPT, 1)
    for _ in range(200):
        with pytest.raises(DeadlineExceededError):
            client.generate(PROMPT, 1, deadline_s=1e-5)


@pytest.mark.triton
def test_leaving_a_stream_that_has_ended_cancels_nothing(
    server: TritonServer, client: TaperClient, serving_config: ServingConfig
):
    before = wait_until(server, lambda page: is_idle(page, serving_config))
    for _ in range(10):
        with client.stream(PROMPT, 3) as stream:
            while not isinstance(next(stream), Finished):
                pass
    after = wait_until(
        server, lambda page: ended(page, "completed") == ended(before, "completed") + 10
    )
    assert ended(after, "cancelled") == ended(before, "cancelled")
    assert stream.result().finish_reason == "completed"
    assert list(stream) == []


def test_a_stream_is_sent_by_its_context_alone():
    with TaperClient() as client, pytest.raises(RuntimeError, match="with client"):
        next(client.stream("a", 3))
    with TaperClient() as client, pytest.raises(RuntimeError, match="with client"):
        client.stream("a", 3).cancel_branch("0.0")


@pytest.mark.triton
def test_a_server_that_comes_late_is_waited_for_and_one_that_dies_is_reported(
    serving_config_path: Path,
):
    """Connecting is tried again; what was sent is not."""
    server = TritonServer(serving_config_path)
    with (
        TaperClient(server.grpc_url, connect_timeout_s=120) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        early = pool.submit(client.generate, PROMPT, 5)
        time.sleep(0.3)
        assert not early.done()
        with server:
            assert len(early.result().token_ids) == 5
            with client.stream(PROMPT, 1900) as stream:
                next(stream)
                os.killpg(server._process.pid, signal.SIGKILL)
                with pytest.raises(ConnectionLostError) as lost:
                    list(stream)
    assert 0 < len(lost.value.partial.token_ids) < 1900


# ------------------------------------------------------------------------------------- helpers


@pytest.mark.triton
def test_best_of_n_ranks_what_was_drawn(client: TaperClient):
    def score(result: BranchResult) -> float:
        return sum(result.token_ids)

    ranked = best_of_n(client, PROMPT, 5, 12, score=score, temperature=1.0, seed=3)
    assert len({candidate.result.token_ids for candidate in ranked}) == 5
    assert [c.score for c in ranked] == sorted((score(c.result) for c in ranked), reverse=True)


@pytest.mark.triton
def test_a_skeleton_is_read_and_each_of_its_points_expanded(client: TaperClient):
    assert numbered_points("Plan:\n1. a b\n 2) c\n3.\n- d\n10. e ") == ["a b", "c", "e"]
    nothing = skeleton_then_expand(client, "Plan:", plan_tokens=4, point_tokens=5)
    assert nothing.points == () and nothing.expanded is None
    some = skeleton_then_expand(
        client, "Plan:", plan_tokens=4, point_tokens=5, parse_points=lambda _: ["one", "two"]
    )
    expected = client.fork_join("Plan:" + some.plan.text).parallel(
        [branch("\n\none\n", 5), branch("\n\ntwo\n", 5)]
    )
    assert some.expanded is not None
    assert some.expanded.branches == expected.run().branches


@pytest.mark.triton
def test_map_reduce_has_every_chunk_before_it(client: TaperClient):
    chunks = ["first", "second", "third"]
    reduced = map_reduce(client, "p", chunks, map_tokens=4, reduce_prompt=" all:", reduce_tokens=7)
    context = list(b"p")
    for i, chunk in enumerate(chunks):
        context += [*chunk.encode(), *reduced.branches[f"0.{i}"].token_ids]
    assert reduced.token_ids == client.generate([*context, *b" all:"], 7).token_ids


@pytest.mark.triton
@pytest.mark.parametrize("beam", [1, 2])
def test_a_tree_search_prunes_to_its_beam_and_returns_its_best(client: TaperClient, beam: int):
    def score(text: str, token_ids: Sequence[int]) -> float:
        return sum(token_ids) / len(token_ids)

    found = tree_search(
        client, PROMPT, width=3, depth=2, step_tokens=30, beam=beam, score=score,
        temperature=1.0, seed=5,
    )  # fmt: skip
    assert len(found.token_ids) == 60
    assert found.scores[found.best] == score("", found.token_ids)
    with pytest.raises(RequestError, match="beam: "):
        tree_search(client, PROMPT, width=1, depth=1, step_tokens=1, beam=0, score=score)
    first = {path for path in found.scores if path.count(".") == 1}
    assert len(first - found.pruned) == min(beam, 3)
    second = {p for p in found.scores if p.count(".") == 3 and p[:3] not in found.pruned}
    assert 1 <= len(second - found.pruned) <= beam
    assert found.best in second - found.pruned


# -------------------------------------------------------------------------------- command line


@pytest.mark.triton
def test_the_demo_draws_every_branch_and_saves_the_picture(
    server: TritonServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    picture = tmp_path / "demo.svg"
    arguments = ["demo", "--url", server.grpc_url, "--branches", "3", "--max-tokens", "9"]
    arguments += ["--slo-ttft-ms", "60000", "--slo-tpot-ms", "60000"]
    assert main([*arguments, "--prompt", "Hot?", "--show-ids", "--record", str(picture)]) == 0
    drawn = " ".join(capsys.readouterr().out.split())
    for part in ("Hot?", "1.0 · 9 · length", "1.2 · 9 · length", "91 tokens", "SLO met"):
        assert part in drawn
    assert "\x1b" not in drawn
    assert "1.2" in picture.read_text() and "<svg" in picture.read_text()


@pytest.mark.triton
def test_generate_prints_text_or_everything(
    server: TritonServer, client: TaperClient, capsys: pytest.CaptureFixture[str]
):
    expected = client.generate("Hot?", 30)
    arguments = ["generate", "Hot?", "--url", server.grpc_url, "--max-tokens", "30"]
    assert main(arguments) == 0
    assert capsys.readouterr().out == expected.text + "\n"
    assert main([*arguments, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["branches"][""]["stages"][0]["token_ids"] == list(expected.token_ids)
    assert main([*arguments, "--top-p", "0"]) == 1
    assert capsys.readouterr().err.startswith("error: top_p: ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--branches", "0"], "branches: "),
        (["--branches", "300"], "branches: "),
        (["--max-tokens", "0"], "max_tokens: "),
        (["--prompt", "\udcff"], "text_input: "),
    ],
)
def test_a_demo_that_cannot_be_is_an_error_and_no_traceback(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
):
    assert main(["demo", *arguments]) == 1
    assert capsys.readouterr().err.startswith(f"error: {said}")
