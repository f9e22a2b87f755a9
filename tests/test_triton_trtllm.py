"""Compiled engines behind a real Triton server: the same model, another configuration.

The engine is the fake (`perf/trtllm_fake`), which decodes with the embedded random Qwen3.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from client import Transcript, generate, with_client
from fake_trtllm import MODEL, NUM_KV_BLOCKS, write_serving
from programs import expected_outputs
from test_triton_server import NESTED, PROMPT, ended, wait_until, wide
from tritonclient.grpc.aio import InferenceServerClient

from perf.server_metrics import MetricsPage
from taper_trtllm import metrics as names
from taper_trtllm.config import TorchEngineConfig
from taper_trtllm.engines.base import PrefillChunk, SequenceParams, StepPlan
from taper_trtllm.engines.torch_engine import TorchEngine
from taper_trtllm.request import SamplingParams, build_request
from taper_trtllm.triton_server import TritonServer, TritonServerError

pytestmark = pytest.mark.triton


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    with TritonServer(write_serving(tmp_path_factory.mktemp("serving"))) as running:
        yield running
        running.check_alive()


class Alone:
    """Greedy text of the model, one sequence at a time on the embedded engine."""

    def __init__(self) -> None:
        self._engine = TorchEngine(TorchEngineConfig(random_model=MODEL, num_kv_blocks=256))
        self._num = 0

    def __call__(self, path: str, context: Sequence[int], max_tokens: int) -> list[int]:
        self._num += 1
        sequence, ids = self._num, list(context)
        params = SequenceParams(SamplingParams(), seed=0)
        self._engine.add_sequence(sequence, sequence, ids, params)
        plan = StepPlan(prefill=(PrefillChunk(sequence, len(ids), sample=True),))
        tokens: list[int] = []
        while len(tokens) < max_tokens:
            tokens += self._engine.step(plan).tokens[sequence]
            plan = StepPlan(decode=(sequence,), max_new_tokens=(1,))
        self._engine.release_sequence(sequence)
        return tokens

    def run(self, **fields: Any) -> Transcript:
        """What a request must answer."""
        return expected_outputs(build_request(request_id="alone", **fields), self)


@pytest.fixture(scope="module")
def alone() -> Alone:
    return Alone()


def is_idle(page: MetricsPage, num_blocks: int = NUM_KV_BLOCKS) -> bool:
    return page.total(names.ACTIVE_FAMILIES) == 0 and page.total(names.KV_FREE_BLOCKS) == num_blocks


# ----------------------------------------------------------------------------------- answers


def test_concurrent_programs_equal_independent_greedy_generation(
    server: TritonServer, alone: Alone
) -> None:
    prompts = [[i, *PROMPT] for i in range(3)]
    requests = [
        fields
        for prompt in prompts
        for fields in (
            {"input_ids": prompt, "stages": NESTED},
            {"input_ids": prompt, "stages": wide(10, 25)},
            {"input_ids": prompt * 8, "max_tokens": 60, "cache_salt_id": 2**63 - 1},
            {"input_ids": prompt, "max_tokens": 1},
        )
    ]
    expected = [alone.run(**fields) for fields in requests]

    async def run(client: InferenceServerClient) -> None:
        answers = await asyncio.gather(
            *(
                generate(client, **fields, streaming=i % 4 > 0 or i < 4)
                for i, fields in enumerate(requests)
            )
        )
        for i, (answer, tokens) in enumerate(zip(answers, expected, strict=True)):
            assert answer.error is None
            assert answer.finish_reason == "completed"
            assert answer.tokens == tokens
            assert set(answer.branch_finish_reasons.values()) == {"length"}
            assert answer.metrics["num_output_tokens"] == sum(map(len, tokens.values()))
            if i % 4 in (1, 2):
                assert answer.num_responses > 5
        assert [answers[i].num_responses for i in (4, 8)] == [1, 1]

    with_client(server.grpc_url, run)
    wait_until(server, is_idle)


def test_stop_tokens_end_a_stage_and_are_part_of_it(server: TritonServer, alone: Alone) -> None:
    ((key, tokens),) = alone.run(input_ids=PROMPT, max_tokens=30).items()
    first = tokens.index(tokens[12])
    assert first > 0

    async def run(client: InferenceServerClient) -> None:
        by_end, by_list = await asyncio.gather(
            generate(client, input_ids=PROMPT, max_tokens=30, end_id=tokens[12]),
            generate(client, input_ids=PROMPT, max_tokens=30, stop_token_ids=[tokens[12], 511]),
        )
        for answer in (by_end, by_list):
            assert answer.tokens == {key: tokens[: first + 1]}
            assert answer.branch_finish_reasons == {key: "stop"}

    with_client(server.grpc_url, run)


def test_a_cancel_ends_one_family_and_leaves_the_others_alone(
    server: TritonServer, alone: Alone
) -> None:
    before = wait_until(server, is_idle)
    prompts = [[100 + i, *PROMPT] for i in range(5)]
    stages = [*wide(6, 30), {"type": "serial", "max_tokens": 20}]
    expected = [alone.run(input_ids=prompt, stages=stages) for prompt in prompts]

    async def run(client: InferenceServerClient) -> None:
        cancelled, *others = await asyncio.gather(
            generate(client, input_ids=PROMPT, stages=wide(6, 300), cancel_after=5),
            *(generate(client, input_ids=prompt, stages=stages) for prompt in prompts),
        )
        assert cancelled.finish_reason is None
        assert [answer.tokens for answer in others] == expected

    with_client(server.grpc_url, run)
    after = wait_until(
        server,
        lambda page: is_idle(page) and ended(page, "cancelled") == ended(before, "cancelled") + 1,
    )
    produced = (after.total(names.OUTPUT_TOKENS) or 0) - (before.total(names.OUTPUT_TOKENS) or 0)
    assert produced < 5 * 200 + 6 * 150  # most of the cancelled 1,800 were not decoded


def test_families_that_do_not_fit_memory_lose_nothing(tmp_path: Path, alone: Alone) -> None:
    """Branches and requests are preempted, and cancelled ones are among them."""
    num_blocks = 40  # three of the larger requests
    prompts = [[i, *PROMPT] for i in range(4)]
    requests = [
        {"input_ids": prompt, "stages": stages}
        for prompt in prompts
        for stages in (NESTED, [*wide(10, 25), {"type": "serial", "max_tokens": 9}])
    ]
    expected = [alone.run(**fields) for fields in requests]

    async def run(client: InferenceServerClient) -> None:
        answers = await asyncio.gather(
            *(
                generate(client, **requests[i % 8], cancel_after=3 if i % 10 == 9 else None)
                for i in range(24)
            )
        )
        for i, answer in enumerate(answers):
            assert answer.error is None
            if answer.finish_reason is not None or i % 10 != 9:
                assert answer.tokens == expected[i % 8]

    path = write_serving(
        tmp_path,
        engine={"kv_cache_tokens": num_blocks * 16},
        scheduler={"kv_reserve_fraction": 0.4, "policy": "irp-eager"},
    )
    with TritonServer(path) as server:
        with_client(server.grpc_url, run)
        page = wait_until(server, lambda page: is_idle(page, num_blocks))
        assert (page.total(names.PREEMPTED_SEQUENCES) or 0) > 0
        assert (page.total(names.RECOMPUTED_TOKENS) or 0) > 0


# --------------------------------------------------------------------------------- bad input


def test_bad_requests_name_the_field_and_harm_nobody(server: TritonServer, alone: Alone) -> None:
    bad = [
        ({"input_ids": PROMPT, "max_tokens": 0}, "max_tokens: .*greater than or equal to 1"),
        ({"input_ids": [1, 512], "max_tokens": 4}, "input_ids: token id 512 is outside"),
        ({"input_ids": [1] * 1025, "max_tokens": 4}, "input_ids: 1025 prompt tokens exceed"),
        ({"input_ids": PROMPT, "max_tokens": 2048}, "max_tokens: .*exceed the limit of 2048"),
        ({"input_ids": PROMPT, "stages": "[{"}, "stages: not valid JSON"),
        ({"text_input": "a", "max_tokens": 4}, "text_input: the served model has no tokenizer"),
        ({"input_ids": PROMPT, "max_tokens": 4, "end_id": 512}, "end_id: token id 512"),
        (
            {"input_ids": PROMPT, "max_tokens": 4, "cache_salt_id": -1},
            "cache_salt_id: .*equal to 0",
        ),
    ]
    expected = alone.run(input_ids=PROMPT, max_tokens=60)

    async def run(client: InferenceServerClient) -> None:
        good, *answers = await asyncio.gather(
            generate(client, input_ids=PROMPT, max_tokens=60),
            *(generate(client, **fields) for fields, _ in bad),
        )
        for answer, (_, pattern) in zip(answers, bad, strict=True):
            with pytest.raises(ValueError, match=pattern):
                raise ValueError(answer.error)
            assert not answer.tokens
        assert good.tokens == expected

    with_client(server.grpc_url, run)


# ------------------------------------------------------------------- metrics, start and failure


def test_every_metric_family_is_on_the_page(server: TritonServer) -> None:
    server.generate({"input_ids": PROMPT, "stages": json.dumps(wide(4, 8))})
    page = wait_until(server, lambda page: (page.total(names.BRANCHED_STEPS) or 0) > 0)
    samples = {name for name, _, _ in page.samples}
    for family in names.FAMILIES:
        suffix = "_count" if family.kind == "histogram" else ""
        assert family.name + suffix in samples
    assert (page.total(names.REUSED_TOKENS) or 0) > 0


def _rename(directory: Path) -> None:
    (directory / "engine").rename(directory / "elsewhere")


def _age(directory: Path) -> None:
    path = directory / "engine/config.json"
    path.write_text(path.read_text().replace('"1.2.1"', '"0.20.0"'))


def _import_real(directory: Path) -> None:
    path = directory / "config.yaml"
    path.write_text(path.read_text().replace("perf.trtllm_fake.bindings", "no_trtllm.bindings"))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_rename, r"engine\.engine_dir: cannot read .*engine/config\.json.*engine_build build"),
        (_age, r"engine\.engine_dir: .* was built with TensorRT-LLM 0\.20\.0"),
        (_import_real, r"engine\.bindings: cannot import no_trtllm\.bindings .*tensorrt-llm 1\.2"),
    ],
)
def test_a_server_that_cannot_start_says_why(
    tmp_path: Path, spoil: Callable[[Path], None], message: str
) -> None:
    config = write_serving(tmp_path)
    spoil(tmp_path)
    with pytest.raises(TritonServerError, match=message), TritonServer(config):
        pass


def executor_pid(server: TritonServer) -> int:
    """The executor's process, in the session of its server."""
    assert server._process is not None
    (pid,) = [
        int(path.parent.name)
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if b"executor_process" in path.read_bytes()
        and os.getsid(int(path.parent.name)) == server._process.pid
    ]
    return pid


def test_a_failed_step_and_a_dead_executor_are_answered(tmp_path: Path, alone: Alone) -> None:
    """On a server of its own, whose engine fails in its 60th step."""
    prompts = [[i, *PROMPT] for i in range(12)]  # more than can run at a time
    stages = wide(3, 200)
    expected = alone.run(input_ids=PROMPT, max_tokens=20)

    async def fail(client: InferenceServerClient) -> None:
        # Each has a place in every step; what has none when a step fails would go on.
        answers = await asyncio.gather(
            *(generate(client, input_ids=prompt, max_tokens=200) for prompt in prompts[:4])
        )
        for answer in answers:
            assert answer.error is not None
            assert "failed: Encountered an error in forwardSync" in answer.error
            assert "illegal memory access" in answer.error
        after = await generate(client, input_ids=PROMPT, max_tokens=20)
        assert after.tokens == expected

    async def die(client: InferenceServerClient) -> None:
        tasks = [
            asyncio.create_task(generate(client, input_ids=prompt, stages=stages))
            for prompt in prompts
        ]
        await asyncio.to_thread(
            wait_until, server, lambda page: page.total(names.ACTIVE_FAMILIES) == 8
        )
        os.kill(executor_pid(server), signal.SIGKILL)
        for answer in await asyncio.gather(*tasks):
            assert answer.error == "the executor process ended"
        refused = await generate(client, input_ids=PROMPT, max_tokens=4)
        assert refused.error == "the executor process ended"

    with TritonServer(write_serving(tmp_path, fail_at_iteration=60)) as server:
        with_client(server.grpc_url, fail)
        with_client(server.grpc_url, die)
