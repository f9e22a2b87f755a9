"""The clients on a real server, and the programs that they build."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from client import Transcript as Tokens_
from pydantic import ValidationError
from serving import ended, is_idle, run_in_process, wait_until

from taper_trtllm.client import (
    AsyncTaperClient,
    ConnectionLostError,
    DeadlineExceededError,
    Finished,
    ModelNotFoundError,
    RequestCancelledError,
    RequestError,
    ServerUnavailableError,
    TaperClient,
    Tokens,
    Transcript,
    branch,
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
    "build",
    [
        lambda: Program().serial(0),
        lambda: Program().parallel([]),
        lambda: Program().parallel([branch("without a stage")]),
        lambda: Program().parallel([branch([-1], 3)]),
    ],
)
def test_a_program_that_cannot_be_is_refused_where_it_is_written(build):
    with pytest.raises(ValidationError):
        build()


def test_an_option_that_is_none_is_refused():
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


# --------------------------------------------------------------------- cancels, deadlines, losses


@pytest.mark.triton
def test_whatever_ends_a_request_early_returns_its_blocks(
    server: TritonServer, client: TaperClient, serving_config: ServingConfig
):
    """Leaving the context, cancelling, an exception, a deadline, a cancelled task, closing."""
    before = wait_until(server, lambda page: is_idle(page, serving_config))
    wide = client.fork_join(PROMPT).parallel([branch([b], 400) for b in range(8)])

    with wide.stream() as stream:
        assert isinstance(next(stream), Tokens)
    with pytest.raises(RequestCancelledError) as cancelled:
        stream.result()
    assert sum(map(len, tokens_of(cancelled.value.partial).values())) > 0

    with wide.stream() as stream:
        next(stream)
        stream.cancel()
        with pytest.raises(RequestCancelledError):
            list(stream)

    with pytest.raises(ZeroDivisionError), wide.stream() as stream:
        next(stream)
        raise ZeroDivisionError

    with pytest.raises(DeadlineExceededError, match=r"deadline_s=0\.5") as late:
        wide.run(deadline_s=0.5)
    assert 0 < sum(map(len, tokens_of(late.value.partial).values())) < 8 * 400

    async def run() -> None:
        async with AsyncTaperClient(server.grpc_url) as async_client:
            stream = async_client.stream(PROMPT, 1500)

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

    other = TaperClient(server.grpc_url)
    stream = other.stream(PROMPT, 1500).__enter__()
    next(stream)
    other.close()

    after = wait_until(
        server,
        lambda page: (
            is_idle(page, serving_config)
            and ended(page, "cancelled") == ended(before, "cancelled") + 6
        ),
    )
    assert ended(after, "completed") == ended(before, "completed")


@pytest.mark.triton
def test_leaving_a_stream_that_has_ended_cancels_nothing(
    server: TritonServer, client: TaperClient, serving_config: ServingConfig
):
    before = wait_until(server, lambda page: is_idle(page, serving_config))
    for _ in range(10):
        with client.stream(PROMPT, 3) as stream:
            while not isinstance(next(stream), Finished):
                pass
    wait_until(server, lambda page: ended(page, "completed") == ended(before, "completed") + 10)
    assert stream.result().finish_reason == "completed"
    assert list(stream) == []


def test_a_stream_is_sent_by_its_context_alone():
    with TaperClient() as client, pytest.raises(RuntimeError, match="with client"):
        next(client.stream("a", 3))


@pytest.mark.triton
def test_a_server_that_comes_late_is_waited_for_and_one_that_dies_is_reported(
    serving_config_path: Path,
):
    """Connecting is tried again; what was sent is not."""
    server = TritonServer(serving_config_path)
    with TaperClient(server.grpc_url, connect_timeout_s=120) as client:
        with ThreadPoolExecutor(1) as pool:
            early = pool.submit(client.generate, PROMPT, 5)
            time.sleep(0.3)
            assert not early.done()
            with server:
                assert len(early.result().token_ids) == 5
                with client.stream(PROMPT, 2000) as stream:
                    next(stream)
                    kill(server)
                    with pytest.raises(ConnectionLostError) as lost:
                        list(stream)
        assert 0 < len(lost.value.partial.token_ids) < 2000
