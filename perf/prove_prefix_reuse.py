"""Proves that a fork reuses its prefix: no prefix block is allocated, nothing but headers computed.

The same prompts are served twice by a real server: as one request that forks, and as independent
requests. What the server computed and held is read from its metrics; both ways must give the same
tokens.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perf.server_metrics import MetricsPage, scrape
from perf.workload import embedded
from taper_trtllm import metrics as names
from taper_trtllm.config import ConfigError, ServingConfig, load_config
from taper_trtllm.triton_server import DEFAULT_MODEL_REPOSITORY, TritonServer, TritonServerError

_HEADER_LEN = 4
_LONG_MS = 1e6  # an objective that defers nothing


@dataclass(frozen=True, slots=True)
class Workload:
    """N branches of one prompt: `prompt`, then `headers[b]`, then `max_tokens` decoded tokens."""

    prompt: list[int]
    headers: list[list[int]]
    max_tokens: int

    def forked(self) -> list[dict[str, Any]]:
        """One request with a parallel stage."""
        branches = [
            {"header_ids": header, "max_tokens": self.max_tokens} for header in self.headers
        ]
        stages = [{"type": "parallel", "branches": branches}]
        return [{"input_ids": self.prompt, "stages": json.dumps(stages)}]

    def independent(self) -> list[dict[str, Any]]:
        """N requests with the whole prompt each."""
        return [
            {"input_ids": self.prompt + header, "max_tokens": self.max_tokens}
            for header in self.headers
        ]


@dataclass(frozen=True, slots=True)
class Run:
    """What serving one set of requests took.

    Attributes:
        answers: Output tensors, in order of the requests.
        num_prefill_tokens: Tokens that the engine prefilled.
        max_blocks: Most KV blocks held at a time since the server's start.
    """

    answers: list[dict[str, Any]]
    num_prefill_tokens: int
    max_blocks: int

    @property
    def texts(self) -> list[int]:
        """All output tokens, one branch after the other."""
        return [token for answer in self.answers for token in _branches_in_order(answer)]


def _branches_in_order(answer: dict[str, Any]) -> list[int]:
    """Tokens of an answer in the order of its branches."""
    paths, counts = answer["branch_path"], answer["branch_num_tokens"]
    if isinstance(paths, str):  # one branch: a scalar in Triton's JSON
        paths, counts = [paths], [counts]
    tokens = iter(answer["output_ids"])
    texts = {
        path: [next(tokens) for _ in range(count)]
        for path, count in zip(paths, counts, strict=True)
    }
    return [token for path in sorted(paths, key=_path_key) for token in texts[path]]


def _path_key(path: str) -> list[int]:
    return [int(part) for part in path.split(".") if part]


def serve(server: TritonServer, num_kv_blocks: int, requests: list[dict[str, Any]]) -> Run:
    """Serves requests at the same time and reads from the metrics what that took."""
    before = _idle_page(server, num_kv_blocks)
    with ThreadPoolExecutor(len(requests)) as pool:
        answers = list(pool.map(lambda fields: server.generate(_unhurried(fields)), requests))
    after = _idle_page(server, num_kv_blocks)
    return Run(
        answers,
        num_prefill_tokens=int(_value(after, names.PREFILL_TOKENS))
        - int(_value(before, names.PREFILL_TOKENS)),
        max_blocks=num_kv_blocks - int(_value(after, names.KV_MIN_FREE_BLOCKS)),
    )


def _unhurried(fields: dict[str, Any]) -> dict[str, Any]:
    return {**fields, "ignore_eos": True, "slo_ttft_ms": _LONG_MS, "slo_tpot_ms": _LONG_MS}


def _value(page: MetricsPage, name: str) -> float:
    value = page.total(name)
    assert value is not None, f"{name} is not on the metrics page"
    return value


def _idle_page(server: TritonServer, num_kv_blocks: int) -> MetricsPage:
    """The metrics once nothing runs and every block is free.

    Raises:
        TritonServerError: Blocks are still held after ten seconds.
    """
    deadline_s = time.monotonic() + 10
    while time.monotonic() < deadline_s:
        time.sleep(0.3)  # the server exports its state every 0.1 s
        page = scrape(server.metrics_url)
        if (
            _value(page, names.ACTIVE_FAMILIES) == 0
            and _value(page, names.KV_FREE_BLOCKS) == num_kv_blocks
        ):
            return page
    raise TritonServerError("KV blocks are still held although no request runs")


@dataclass(frozen=True, slots=True)
class Check:
    """One claim: what was measured, what must come out, and whether it does."""

    claim: str
    measured: int | bool
    expected: str
    holds: bool


def exactly(claim: str, measured: int | bool, expected: int | bool) -> Check:
    """The claim that two figures are equal."""
    return Check(claim, measured, str(expected), measured == expected)


def checks(workload: Workload, config: ServingConfig, forked: Run, independent: Run) -> list[Check]:
    """The claims about one workload."""
    block = config.engine.tokens_per_block
    num_prompt, num_branches = len(workload.prompt), len(workload.headers)
    own_len = (num_prompt - 1) % block + 1 + _HEADER_LEN + workload.max_tokens
    most_blocks = -(-num_prompt // block) + num_branches * -(-own_len // block)
    held, held_apart = forked.max_blocks, independent.max_blocks
    metrics = json.loads(forked.answers[0]["request_metrics"])
    num_shared = num_prompt - 1  # each branch computes the last token with its header
    return [
        exactly(
            "forked: tokens prefilled (prompt + headers)",
            forked.num_prefill_tokens,
            num_shared + num_branches * (1 + _HEADER_LEN),
        ),
        exactly(
            "independent: tokens prefilled",
            independent.num_prefill_tokens,
            num_branches * (num_prompt + _HEADER_LEN),
        ),
        Check("forked: most KV blocks held", held, f"<= {most_blocks}", held <= most_blocks),
        Check("independent: most KV blocks held", held_apart, f"> {held}", held_apart > held),
        exactly(
            "forked: prefix tokens reused, reported",
            metrics["num_reused_tokens"],
            num_branches * num_shared,
        ),
        exactly(
            "forked: prefix blocks reused, reported",
            forked.answers[0]["kv_cache_reused_block"],
            num_branches * (num_shared // block),
        ),
        exactly("forked: tokens recomputed", metrics["num_recomputed_tokens"], 0),
        exactly("same tokens both ways", forked.texts == independent.texts, True),
    ]


def prove(workload: Workload, config_path: Path) -> bool:
    """Serves the workload both ways, prints the comparison, and returns whether all of it holds.

    Raises:
        TritonServerError: The server does not start or refuses a request.
        ConfigError: It is not one of the embedded engine.
    """
    config = load_config(config_path)
    num_kv_blocks = embedded(config.engine).num_kv_blocks
    with TritonServer(config_path) as server:
        forked = serve(server, num_kv_blocks, workload.forked())
        independent = serve(server, num_kv_blocks, workload.independent())
    print(
        f"{len(workload.headers)} branches of a prompt of {len(workload.prompt)} tokens, "
        f"{_HEADER_LEN} header tokens and {workload.max_tokens} new tokens each"
    )
    found = checks(workload, config, forked, independent)
    print(f"{'':44}{'measured':>10}{'expected':>10}")
    for check in found:
        verdict = "ok" if check.holds else "FAILED"
        print(f"{check.claim:44}{check.measured!s:>10}{check.expected:>10}  {verdict}")
    return all(check.holds for check in found)


def main() -> int:
    """Runs the command line; the exit status is 1 if the prefix is not reused."""
    parser = argparse.ArgumentParser(prog="prove_prefix_reuse.sh", description=__doc__)
    parser.add_argument(
        "--config", type=Path, default=DEFAULT_MODEL_REPOSITORY / "taper" / "config.yaml"
    )
    parser.add_argument("--num-branches", type=int, default=8)
    parser.add_argument("--prompt-len", type=int, default=500)
    parser.add_argument("--branch-len", type=int, default=64, help="new tokens of a branch")
    arguments = parser.parse_args()
    workload = Workload(
        prompt=[1 + i % 97 for i in range(arguments.prompt_len)],
        headers=[[1 + b, 2, 3, 4] for b in range(arguments.num_branches)],
        max_tokens=arguments.branch_len,
    )
    try:
        return 0 if prove(workload, arguments.config) else 1
    except (ConfigError, TritonServerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
