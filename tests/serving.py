"""A real server under test: what it should answer, and when it has nothing left to do."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from client import Transcript, transcript

from perf.server_metrics import MetricsPage, scrape
from taper_trtllm import metrics as names
from taper_trtllm.config import ServingConfig
from taper_trtllm.executor import TaperExecutor
from taper_trtllm.output import BranchOutput
from taper_trtllm.request import build_request
from taper_trtllm.triton_server import TritonServer


def run_in_process(config: ServingConfig, requests: list[dict[str, Any]]) -> list[Transcript]:
    """The same requests on an executor of this process."""
    executor = TaperExecutor.from_config(config)
    outputs: list[list[BranchOutput]] = [[] for _ in requests]
    for i, fields in enumerate(requests):
        request = build_request(request_id=str(i), **fields)
        executor.submit(request, lambda output, i=i: outputs[i].extend(output.branches))
    executor.drain()
    executor.shutdown()
    return [transcript(branches) for branches in outputs]


def wait_until(server: TritonServer, holds: Callable[[MetricsPage], bool]) -> MetricsPage:
    """Polls the metrics page; the generous limit only ends a test that would hang."""
    deadline_s = time.monotonic() + 60
    while not holds(page := scrape(server.metrics_url)):
        server.check_alive()
        assert time.monotonic() < deadline_s, page
        time.sleep(0.05)
    return page


def is_idle(page: MetricsPage, config: ServingConfig) -> bool:
    return (
        page.total(names.ACTIVE_FAMILIES) == 0
        and page.total(names.QUEUED_REQUESTS) == 0
        and page.total(names.KV_FREE_BLOCKS) == config.engine.num_kv_blocks
    )


def ended(page: MetricsPage, finish_reason: str) -> float:
    return sum(
        value
        for name, labels, value in page.samples
        if name == names.REQUESTS and labels["finish_reason"] == finish_reason
    )
