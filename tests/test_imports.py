"""What the layers may import."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import taper_trtllm

PACKAGE = Path(taper_trtllm.__file__).parent
PURE = {
    "slo",
    "fork_join",
    "fork_format",
    "tag_scanner",
    "written_forks",
    "token_spans",
    "predictor",
    "prefill_cost",
    "step_correction",
    "admission",
    "prefill_gate",
}
LAZY = {"engines.torch_engine", "engines.trtllm"}  # imported by the function that creates it
FLOORS = [  # imports run downward only
    {"request", "output", "profile", "batch", "token_spans"},
    {
        "config",
        "slo",
        "tokenizer",
        "tag_scanner",
        "fork_format",
        "fork_format_file",
        "written_forks",
        "fork_join",
        "predictor",
        "prefill_cost",
        "step_correction",
        "kv_budget",
        "sequence_table",
        "engines.base",
        "engines.kv_cache",
        "engines.paged_engine",
        "engines.paged_sequences",
        "engines.trtllm_engine_dir",
        "engines.trtllm_session",
        "engines.trtllm_audit",
        "engines.prefix_groups",
        "engines.prefix_tiles",
        "engines.step_buffer",
        "engines.triton_decode",
        "engines.triton_kernels",
    },
    {
        "engines",
        "engines.simulated",
        "engines.trtllm",
        "engines.qwen3",
        "engines.sampling",
        "engines.checkpoint",
        "engines.fingerprint",
        "engines.kv_tensors",
        "engines.step_batch",
        "engines.paged_attention",
        "engines.cascade_attention",
        "engines.bucket_batch",
        "engines.bucket_runner",
        "engines.triton_attention",
        "admission",
        "live_request",
        "request_account",
        "prefill_gate",
        "metrics",
        "request_gate",
        "step_trace",
    },
    {"lease_terms", "start_gate", "tensors", "waiting_queue"},
    {"planner"},
    {"executor"},
    {"executor_thread"},
    {"executor_process"},
    {"response_stream"},
]
CLIENT_FLOORS = [  # the client knows nothing of the server but requests and outputs
    {"request", "output"},
    {"client.results", "client.program", "client.wire"},
    {"client.errors", "client.events"},
    {"client.connection"},
    {"client.stream"},
    {"client.aio"},
    {"client.sync"},
    {"client", "client.helpers", "client.viewer"},
    {"client.__main__"},
]


def test_the_core_needs_numpy_and_pydantic_alone():
    code = (
        "import sys, taper_trtllm.executor, taper_trtllm.executor_process;"
        "heavy = {'torch', 'transformers', 'tritonclient', 'yaml', 'rich', 'matplotlib'};"
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_client_needs_no_server_and_no_viewer():
    code = (
        "import sys, taper_trtllm.client, taper_trtllm.client.helpers;"
        "heavy = {'torch', 'rich', 'taper_trtllm.executor', 'taper_trtllm.config'};"
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("floors", [FLOORS, CLIENT_FLOORS], ids=["server", "client"])
def test_imports_run_downward_and_the_decision_is_pure(floors: list[set[str]]):
    below: set[str] = set()
    for floor in floors:
        for module in floor:
            path = PACKAGE / module.replace(".", "/")
            path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
            imported = {
                node.module or ""
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.ImportFrom)
            }
            own = {m.removeprefix("taper_trtllm.") for m in imported if "taper_trtllm." in m}
            own -= LAZY
            assert own <= below | floor, f"{module} imports upward: {own - below - floor}"
            if module in PURE:
                assert not imported & {"time", "torch", "threading", "os", "pathlib"}, module
        below |= floor
