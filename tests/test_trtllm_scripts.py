from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from fake_trtllm import REPLAY, write_serving
from trtllm_stand_ins import QWEN3_32B, add_packages

from taper_trtllm.triton_install import find_installation, libpython_dir

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "scripts"

# Starts every context of an MPMD command line with its rank, as Open MPI does on one node, and
# signals their whole process groups.
_MPIRUN = """#!/usr/bin/env bash
shift  # --allow-run-as-root
set -m
pids=()
trap 'kill -- "${pids[@]/#/-}"' TERM
size=1
for word in "$@"; do
    [[ "$word" != : ]] || size=$((size + 1))
done
export OMPI_COMM_WORLD_SIZE=$size
rank=0
words=()
for word in "$@" :; do
    if [[ "$word" == : ]]; then
        OMPI_COMM_WORLD_RANK=$rank "${words[@]:2}" &  # without -n 1
        pids+=($!)
        words=()
        rank=$((rank + 1))
    else
        words+=("$word")
    fi
done
wait  # until the signal
wait
"""


def run(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(SCRIPTS / script), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=60,
    )


@pytest.mark.parametrize("script", sorted(path.name for path in SCRIPTS.glob("*.sh")))
def test_every_script_is_valid_bash_and_executable(script):
    assert os.access(SCRIPTS / script, os.X_OK)
    checked = subprocess.run(["bash", "-n", str(SCRIPTS / script)], capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, "")


def test_one_server_per_gpu_of_which_the_first_serves(tmp_path):
    config = tmp_path / "a config.yaml"
    config.write_text("")
    result = run(
        "serve_trtllm.sh", f"--config={config}", "--tp-size", "2", "--grpc-port=9001", "--dry-run"
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("\n") == 1
    environment, *words = shlex.split(result.stdout)
    assert environment == f"TAPER_CONFIG={config}"
    assert words[:2] == ["mpirun", "--allow-run-as-root"]
    split = words.index(":")
    first, second = words[2:split], words[split + 1 :]
    server = "/opt/tritonserver/bin/tritonserver"
    for rank, one in enumerate((first, second)):
        assert one[:3] == ["-n", "1", server]
        assert f"--model-repository={ROOT / 'triton_repo'}" in one
        assert "--disable-auto-complete-config" in one
        assert f"--backend-config=python,shm-region-prefix-name=taper_rank{rank}_" in one
    assert "--grpc-port=9001" in first
    assert not [word for word in first if "model-control-mode" in word]
    assert {"--model-control-mode=explicit", "--load-model=taper"} <= set(second)
    assert {f"--allow-{name}=false" for name in ("grpc", "http", "metrics")} <= set(second)
    assert not [word for word in second if "port" in word]


def test_a_single_gpu_needs_one_server(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("")
    result = run("serve_trtllm.sh", "--config", str(config), "--dry-run", TRITONSERVER="/ts")
    words = shlex.split(result.stdout)
    assert words.count("/ts") == 1
    assert ":" not in words


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--config", "nowhere.yaml"), "--config: no file 'nowhere.yaml'"),
        (("--config", __file__, "--tp-size", "0"), "--tp-size: must be at least 1"),
        (("--config", __file__, "--model-repository", "/"), "no model `taper` in /"),
        (("--port", "3"), "unknown option --port"),
        (("--config",), "without a value"),
    ],
)
def test_bad_options_of_serving_are_one_line(arguments, message):
    result = run("serve_trtllm.sh", *arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("version", ["1.1.0", "1.3.0rc22", None])
def test_another_tensorrt_llm_is_not_served(tmp_path, version):
    add_packages(tmp_path / "site", {"tensorrt_llm": version} if version else {})
    result = run(
        "serve_trtllm.sh",
        *("--config", __file__),
        PYTHON=sys.executable,
        PYTHONPATH=str(tmp_path / "site"),
    )
    assert result.returncode == 2
    assert "1.2.x is needed" in result.stderr
    assert (version or "is not installed") in result.stderr


def test_the_container_gets_gpus_mounts_and_the_command(tmp_path):
    (tmp_path / "my models").mkdir()
    result = run(
        "trtllm_container.sh",
        *("--models", str(tmp_path / "my models"), "--engines", str(tmp_path), "--gpus", "0,1"),
        *("--dry-run", "scripts/build_engine.sh", "/models/a b", "/engines/x", "--dry-run"),
        TRTLLM_IMAGE="an/image:tag",
    )
    assert result.returncode == 0, result.stderr
    words = shlex.split(result.stdout)
    assert words[:3] == ["docker", "run", "--rm"]
    assert words[words.index("--gpus") + 1] == '"device=0,1"'
    assert f"{tmp_path / 'my models'}:/models:ro" in words
    assert f"{tmp_path}:/engines" in words
    assert f"{ROOT}:/workspace/taper_trtllm" in words
    command = ["scripts/build_engine.sh", "/models/a b", "/engines/x", "--dry-run"]
    assert words[words.index("an/image:tag") + 1 :] == command


@pytest.mark.parametrize(
    "arguments", [(), ("--models",), ("--oops", "x"), ("--models", "/nowhere/at/all", "ls")]
)
def test_bad_options_of_the_container_start_nothing(arguments):
    result = run("trtllm_container.sh", *arguments)
    assert result.returncode != 0
    assert result.stderr


def test_the_build_script_plans_on_any_machine(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_32B))
    result = run(
        "build_engine.sh",
        *(str(tmp_path), "/engines/qwen3-32b", "--kv-cache-dtype", "fp8", "--dry-run"),
        PYTHON=sys.executable,
        DTYPE="fp8",
    )
    assert result.returncode == 0, result.stderr
    quantize, build = result.stdout.splitlines()[-2:]
    assert "quantize.py" in quantize
    assert "--tp_size 1" in quantize
    assert "trtllm-build --checkpoint_dir /engines/qwen3-32b/build/checkpoint" in build
    assert run("build_engine.sh", "--dry-run").returncode == 2


def _free_ports(count: int) -> list[int]:
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


def _wait_until(condition, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/v2/health/ready", timeout=5) as response:
            return response.status == 200
    except OSError:
        return False


def _kill_session(session: int) -> None:
    for pid in [int(path.name) for path in Path("/proc").glob("[0-9]*")]:
        with contextlib.suppress(ProcessLookupError):
            if os.getsid(pid) == session:
                os.kill(pid, signal.SIGKILL)


@pytest.fixture
def container(tmp_path):
    """Environment of a container: the wheel's Triton, an mpirun, a version of TensorRT-LLM."""
    triton, stub = find_installation()
    backend = tmp_path / "backends/python"
    backend.mkdir(parents=True)
    for name in ("libtriton_python.so", "triton_python_backend_utils.py"):
        (backend / name).symlink_to(triton / "backends/python" / name)
    (backend / stub.name).symlink_to(stub)
    server = tmp_path / "tritonserver"
    server.write_text(
        f"#!/bin/sh\nexec {triton / 'bin/tritonserver'} --backend-directory={backend.parent} "
        '--allow-gpu-metrics=false --exit-timeout-secs=6 "$@"\n'
    )
    mpirun = tmp_path / "mpirun"
    mpirun.write_text(_MPIRUN)
    for path in (server, mpirun):
        path.chmod(0o755)
    add_packages(tmp_path / "site", {"tensorrt_llm": "1.2.1"})
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {
        **os.environ,
        "PATH": path,
        "PYTHON": sys.executable,
        "PYTHONPATH": str(tmp_path / "site"),
        "LD_LIBRARY_PATH": str(libpython_dir()),
        "TRITONSERVER": str(server),
    }


@pytest.mark.triton
def test_real_servers_take_the_command_and_only_rank_0_listens(tmp_path, container):
    """Rank 1 is loaded, works for the leader, and ends with it."""
    config = write_serving(tmp_path / "serving", decoder=REPLAY, tp_size=2)
    http_port, grpc_port, metrics_port = _free_ports(3)
    ports = ("--http-port", http_port, "--grpc-port", grpc_port, "--metrics-port", metrics_port)
    log = tmp_path / "log.txt"
    with log.open("w") as output:
        process = subprocess.Popen(
            [SCRIPTS / "serve_trtllm.sh", "--config", config, "--tp-size", "2", *map(str, ports)],
            env=container,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{http_port}"
        _wait_until(lambda: _is_ready(url) or process.poll() is not None, 120)
        assert process.poll() is None, log.read_text()
        _wait_until(lambda: log.read_text().count("successfully loaded 'taper'") == 2, 60)
        request = {"input_ids": [1, 2, 3], "max_tokens": 4, "ignore_eos": True, "streaming": False}
        answer = urllib.request.urlopen(
            urllib.request.Request(
                f"{url}/v2/models/taper/generate",
                data=json.dumps(request).encode(),
                headers={"Content-Type": "application/json"},
            ),
            timeout=60,
        )
        assert len(json.load(answer)["output_ids"]) == 4
        assert log.read_text().count("Started HTTPService") == 1
        process.send_signal(signal.SIGTERM)
        process.wait(30)
        assert log.read_text().count("successfully unloaded 'taper'") == 2
    finally:
        _kill_session(process.pid)
        process.wait()
