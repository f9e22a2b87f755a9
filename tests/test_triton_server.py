"""The model behind a real Triton server, over gRPC."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from client import Answer, generate, infer, tensor, tensors, with_client
from serving import ended, is_idle, run_in_process, wait_until
from tritonclient.grpc import InferInput, InferRequestedOutput
from tritonclient.grpc.aio import InferenceServerClient

from perf.prove_prefix_reuse import Workload, prove
from perf.server_metrics import MetricsPage
from taper_trtllm import metrics as names
from taper_trtllm.config import ServingConfig
from taper_trtllm.tokenizer import ByteTokenizer
from taper_trtllm.triton_server import TritonServer, TritonServerError

pytestmark = pytest.mark.triton

PROMPT = list(range(1, 41))
NESTED: list[dict[str, Any]] = [
    {"type": "serial", "max_tokens": 9},
    {
        "type": "parallel",
        "branches": [
            {"header_ids": [1, 2], "max_tokens": 12},
            {
                "header_ids": [3],
                "stages": [
                    {"type": "serial", "max_tokens": 4},
                    {"type": "parallel", "branches": [{"max_tokens": 1}, {"max_tokens": 9}]},
                    {"type": "serial", "max_tokens": 3},
                ],
            },
            {"header_ids": [4], "max_tokens": 1},
        ],
        "join_ids": [5, 6],
    },
    {"type": "serial", "max_tokens": 8},
]


def parallel(*branches: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"type": "parallel", "branches": list(branches), **fields}


def wide(num_branches: int, max_tokens: int) -> list[dict[str, Any]]:
    return [parallel(*({"header_ids": [b], "max_tokens": max_tokens} for b in range(num_branches)))]


def nested(depth: int) -> list[dict[str, Any]]:
    if depth == 0:
        return [{"type": "serial", "max_tokens": 1}]
    return [parallel({"stages": nested(depth - 1)})]


# ----------------------------------------------------------------------------------- answers


def test_served_programs_equal_the_executor_in_process(
    server: TritonServer, serving_config: ServingConfig
) -> None:
    """Streaming and not, greedy and sampled, one stage or nested: token for token."""
    (greedy, sampled, plain) = run_in_process(
        serving_config,
        [
            {"input_ids": PROMPT, "stages": NESTED},
            {"input_ids": PROMPT, "stages": NESTED, "sampling": {"temperature": 0.8, "seed": 7}},
            {"input_ids": PROMPT, "max_tokens": 30},
        ],
    )
    assert greedy != sampled

    async def run(client: InferenceServerClient) -> None:
        streamed, whole, warm, short = await asyncio.gather(
            generate(client, input_ids=PROMPT, stages=NESTED),
            generate(client, input_ids=PROMPT, stages=NESTED, streaming=False),
            generate(client, input_ids=PROMPT, stages=NESTED, temperature=0.8, seed=7),
            generate(client, input_ids=PROMPT, max_tokens=30),
        )
        assert streamed.tokens == whole.tokens == greedy
        assert warm.tokens == sampled
        assert short.tokens == plain
        assert streamed.num_responses > 1
        assert whole.num_responses == 1
        for answer in (streamed, whole, warm, short):
            assert answer.finish_reason == "completed"
            assert answer.branch_finish_reasons.keys() == answer.tokens.keys()
            num_tokens = sum(map(len, answer.tokens.values()))
            assert answer.metrics["num_output_tokens"] == num_tokens

    with_client(server.grpc_url, run)


def test_text_goes_in_and_comes_out(server: TritonServer) -> None:
    def stages(header: dict[str, Any], join: dict[str, Any]) -> list[dict[str, Any]]:
        branches = ({"max_tokens": 40, **header}, {"max_tokens": 6})
        return [parallel(*branches, **join), {"type": "serial", "max_tokens": 20}]

    async def run(client: InferenceServerClient) -> None:
        text, ids = await asyncio.gather(
            generate(
                client,
                text_input="naïve",
                stages=stages({"header_text": "é:"}, {"join_text": "\n"}),
            ),
            generate(
                client,
                input_ids=list("naïve".encode()),
                stages=stages({"header_ids": list("é:".encode())}, {"join_ids": [10]}),
            ),
        )
        assert text.tokens == ids.tokens
        assert not ids.texts
        assert text.texts == {key: ByteTokenizer().decode(ids) for key, ids in text.tokens.items()}

    with_client(server.grpc_url, run)


def test_three_hundred_concurrent_streams(
    server: TritonServer, serving_config: ServingConfig
) -> None:
    prompts = [[i, *PROMPT] for i in range(10)]
    expected = run_in_process(
        serving_config, [{"input_ids": ids, "stages": NESTED} for ids in prompts]
    )

    async def run(client: InferenceServerClient) -> None:
        answers = await asyncio.gather(
            *(generate(client, input_ids=prompts[i % 10], stages=NESTED) for i in range(300))
        )
        assert [answer.tokens for answer in answers] == expected * 30

    with_client(server.grpc_url, run)
    wait_until(server, lambda page: is_idle(page, serving_config))


# --------------------------------------------------------------------------------- bad input

VALID = {"input_ids": PROMPT, "max_tokens": 4}
NAN = float("nan")

BAD_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": 4}, "input_ids: give exactly one of input_ids and text_input"),
    ({**VALID, "text_input": "a"}, "input_ids: give exactly one of"),
    ({"text_input": np.array([b"\xff"], np.object_), "max_tokens": 1}, "text_input: not valid UTF"),
    ({"input_ids": PROMPT}, "max_tokens: required when stages is not given"),
    ({**VALID, "max_tokens": -1}, "max_tokens: .*greater than or equal to 1"),
    ({**VALID, "max_tokens": 0}, "max_tokens: .*greater than or equal to 1"),
    ({**VALID, "max_tokens": 2**31 - 1}, "max_tokens: .* total tokens exceed the limit of 4096"),
    ({**VALID, "input_ids": [1, 512]}, "input_ids: token id 512 is outside the vocabulary of 512"),
    ({**VALID, "input_ids": [-1]}, r"input_ids\[0\]: .*greater than or equal to 0"),
    ({**VALID, "input_ids": [1] * 2049}, "input_ids: 2049 prompt tokens exceed the limit of 2048"),
    ({**VALID, "stages": "[{"}, "stages: not valid JSON"),
    ({**VALID, "stages": "{}"}, "stages: must be a non-empty JSON list"),
    ({**VALID, "stages": "[" * 100_000}, "stages: not valid JSON"),
    ({**VALID, "stages": " " * (2 << 20)}, "stages: .* bytes exceed the limit of 1048576"),
    ({**VALID, "stages": [{"type": "loop"}]}, r"stages\[0\]"),
    ({**VALID, "stages": [{"type": "serial"}]}, r"stages\[0\]\.max_tokens: Field required"),
    ({**VALID, "stages": [parallel()]}, r"stages\[0\]\.branches: .* at least 1"),
    ({"input_ids": [1], "stages": wide(257, 1)}, r"stages\[0\]\.branches: .* at most 256"),
    ({"input_ids": [1], "stages": nested(4)}, "stages: 4 nested parallel stages exceed .* of 3"),
    ({"input_ids": [1], "stages": nested(200)}, "stages: "),
    (
        {"input_ids": [1], "stages": [parallel({})]},
        r"branches\[0\]: give exactly one of max_tokens",
    ),
    (
        {"input_ids": [1], "stages": [parallel({"max_tokens": -3})]},
        r"stages\[0\]\.branches\[0\]\.max_tokens: .*\(got -3\)",
    ),
    (
        {"input_ids": [1], "stages": [parallel({"max_tokens": 1.5})]},
        r"stages\[0\]\.branches\[0\]\.max_tokens: .*integer",
    ),
    (
        {"input_ids": [1], "stages": [parallel({"max_tokens": 1, "header_ids": [99999]})]},
        r"stages\[0\]\.branches\[0\]\.header_ids: token id 99999",
    ),
    (
        {"input_ids": [1], "stages": [parallel({"max_tokens": 1}, join_ids=[-5])]},
        r"stages\[0\]\.join_ids\[0\]",
    ),
    (
        {
            "input_ids": [1],
            "stages": [parallel({"max_tokens": 1, "header_ids": [1], "header_text": "a"})],
        },
        r"stages\[0\]\.branches\[0\]\.header_text: .*not both",
    ),
    ({**VALID, "max_tokens": 1, "stages": wide(2, 4)}, "max_tokens: 1 does not cover the 8 tokens"),
    ({**VALID, "slo_ttft_ms": NAN}, "slo_ttft_ms: .*finite"),
    ({**VALID, "slo_tpot_ms": -1.0}, "slo_tpot_ms: .*greater than 0"),
    ({**VALID, "slo_stretch": float("inf")}, "slo_stretch: .*finite"),
    ({**VALID, "temperature": NAN}, "temperature: .*finite"),
    ({**VALID, "runtime_top_p": 0.0}, "runtime_top_p: .*greater than 0"),
    ({**VALID, "runtime_top_k": -1}, "runtime_top_k: "),
    ({**VALID, "seed": 2**64 - 1}, "seed: "),
    ({**VALID, "stop_token_ids": [512]}, "stop_token_ids: token id 512"),
    ({**VALID, "stop_token_ids": [3, -1]}, r"stop_token_ids\[1\]: .*greater than or equal to 0"),
    (
        {**VALID, "stop_token_ids": [1] * 1000},
        "stop_token_ids: 1000 stop token ids exceed the limit",
    ),
    ({**VALID, "end_id": 512}, "end_id: token id 512"),
    ({**VALID, "cache_salt_id": -1}, "cache_salt_id: .*greater than or equal to 0"),
]

BAD_TENSORS: list[tuple[list[InferInput], str]] = [
    (
        [tensor("input_ids", np.array([1, 2]), "INT64"), tensor("max_tokens", 4)],
        "data-type is 'INT64', but model 'taper' expects 'INT32'",
    ),
    (
        [tensor("input_ids", np.array([[1, 2]], np.int32)), tensor("max_tokens", 4)],
        "unexpected shape for input 'input_ids'",
    ),
    ([*tensors(input_ids=[1]), tensor("max_tokens", [1, 2])], "unexpected shape for input"),
    ([*tensors(**VALID), tensor("nope", 1)], "unexpected inference input 'nope'"),
]


def test_bad_requests_are_answered_and_harm_nobody(
    server: TritonServer, serving_config: ServingConfig
) -> None:
    stages = wide(4, 60)
    (expected,) = run_in_process(serving_config, [{"input_ids": PROMPT, "stages": stages}])

    async def run(client: InferenceServerClient) -> None:
        good = [
            asyncio.create_task(
                generate(client, input_ids=PROMPT, stages=stages, request_id=f"good-{i}")
            )
            for i in range(16)
        ]
        bad = [infer(client, tensors(**fields)) for fields, _ in BAD_FIELDS]
        bad += [infer(client, inputs) for inputs, _ in BAD_TENSORS]
        answers: list[Answer] = await asyncio.gather(*bad)
        patterns = [pattern for _, pattern in (*BAD_FIELDS, *BAD_TENSORS)]
        for answer, pattern in zip(answers, patterns, strict=True):
            with pytest.raises(ValueError, match=pattern):
                raise ValueError(answer.error)
            assert not answer.tokens
        for answer in await asyncio.gather(*good):
            assert answer.error is None
            assert answer.tokens == expected
        unknown = await infer(
            client, tensors(**VALID), outputs=[InferRequestedOutput("nothing_like_that")]
        )
        assert unknown.error is not None
        assert "unexpected inference output" in unknown.error

    with_client(server.grpc_url, run)


def test_an_id_in_use_is_refused_and_free_again_afterwards(server: TritonServer) -> None:
    async def run(client: InferenceServerClient) -> None:
        first, second = await asyncio.gather(
            *(
                generate(client, input_ids=PROMPT, max_tokens=300, request_id="twice")
                for _ in range(2)
            )
        )
        (refused,) = [answer for answer in (first, second) if answer.error is not None]
        assert refused.error == "request_id: 'twice' is already in use"
        again = await generate(client, input_ids=PROMPT, max_tokens=2, request_id="twice")
        assert again.error is None

    with_client(server.grpc_url, run)


# ----------------------------------------------------------------------- cancel and disconnect


def test_cancel_ends_the_family_and_returns_its_blocks(
    server: TritonServer, serving_config: ServingConfig
) -> None:
    num_requests, num_branches, max_tokens = 12, 8, 400
    before = wait_until(server, lambda page: is_idle(page, serving_config))

    async def run(client: InferenceServerClient) -> None:
        stages = wide(num_branches, max_tokens)
        answers = await asyncio.gather(
            *(
                generate(client, input_ids=PROMPT, stages=stages, cancel_after=5 + i)
                for i in range(num_requests)
            )
        )
        assert all(answer.finish_reason is None for answer in answers)

    with_client(server.grpc_url, run)
    after = wait_until(
        server,
        lambda page: (
            is_idle(page, serving_config)
            and ended(page, "cancelled") == ended(before, "cancelled") + num_requests
        ),
    )

    def increase(name: str) -> float:
        return (after.total(name) or 0) - (before.total(name) or 0)

    assert increase(names.OUTPUT_TOKENS) < num_requests * num_branches * max_tokens / 2
    assert increase(f"{names.CANCEL_LATENCY}_count") == num_requests

    def num_fast(page: MetricsPage) -> float:
        """Cancels that the server has carried out within 100 ms of seeing them."""
        bucket = f"{names.CANCEL_LATENCY}_bucket"
        return sum(v for n, labels, v in page.samples if n == bucket and labels["le"] == "0.1")

    # Most, so that a machine that stalls for a moment does not fail the test.
    assert num_fast(after) - num_fast(before) > num_requests / 2


def test_a_killed_client_leaves_nothing_behind(
    server: TritonServer, serving_config: ServingConfig
) -> None:
    before = wait_until(server, lambda page: is_idle(page, serving_config))
    script = (
        "import asyncio\n"
        "from client import generate, with_client\n"
        f"stages = {wide(8, 400)!r}\n"
        "async def run(client):\n"
        "    await asyncio.gather(*(generate(client, input_ids=[1, 2], stages=stages)"
        " for _ in range(8)))\n"
        f"with_client({server.grpc_url!r}, run)\n"
    )
    client = subprocess.Popen([sys.executable, "-c", script], cwd=Path(__file__).parent)
    try:
        wait_until(server, lambda page: page.total(names.ACTIVE_FAMILIES) == 8)
    finally:
        client.kill()
        client.wait()
    wait_until(
        server,
        lambda page: (
            is_idle(page, serving_config)
            and ended(page, "cancelled") == ended(before, "cancelled") + 8
        ),
    )
    assert server.generate(VALID)["finish_reason"] == "completed"


# ---------------------------------------------------------------------- metrics and the process


def test_every_metric_family_is_on_the_page(server: TritonServer) -> None:
    server.generate({"input_ids": PROMPT, "stages": json.dumps(wide(4, 8))})
    page = wait_until(server, lambda page: (page.total(names.BRANCHED_STEPS) or 0) > 0)
    samples = {name for name, _, _ in page.samples}
    for family in names.FAMILIES:
        suffix = "_count" if family.kind == "histogram" else ""
        assert family.name + suffix in samples
    for _, labels, _ in page.samples:
        assert (labels["model"], labels["version"], labels["policy"]) == ("taper", "1", "taper")


def test_forks_are_proved_to_reuse_their_prefix(serving_config_path: Path) -> None:
    """On a server of its own: the proof reads the high-water mark of the KV pool."""
    headers = [[1 + b, 2, 3, 4] for b in range(6)]
    # Long enough that independent branches overlap on a busy machine too.
    workload = Workload(prompt=PROMPT * 3, headers=headers, max_tokens=100)
    assert prove(workload, serving_config_path)


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("scheduler: {max_num_requests: 0}")
    with (
        pytest.raises(TritonServerError, match=r"scheduler\.max_num_requests: .* equal to 1"),
        TritonServer(config),
    ):
        pass
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(TritonServerError, match=rf"--grpc-port: .*127\.0\.0\.1:{port}"):
            TritonServer(config, grpc_port=port)


def test_serving_from_the_command_line_ends_clean(serving_config_path: Path) -> None:
    ports = ("--grpc-port", "0", "--http-port", "0", "--metrics-port", "0")
    command = (sys.executable, "-m", "taper_trtllm.triton_server", "--config", serving_config_path)
    with subprocess.Popen((*command, *ports), stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("serving `taper` on 127.0.0.1: gRPC ")
            log = Path(line.partition("(log: ")[2].partition(")")[0])
            assert log.exists()
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0
        finally:
            process.kill()
    assert not log.parent.exists()
