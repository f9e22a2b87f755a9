"""What a step takes in the running server beside the engine: ``python -m perf.host_time PROFILE``.

`engine_build calibrate` measures the engine alone. In the server a step also pays for the loop
around it, for the streams, and for sharing its cores with Triton and the clients. Plain requests
are served, a fixed number at a time, and the mean of what their decode steps take beyond the
profile is added to every point of it: objectives and loads derived from the profile are then those
of the server, and so is virtual time. No request branches, so that no policy has a say.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from perf.bench_serving import BenchConfig, run_benchmark
from perf.grpc_client import ClientConfig, ServerUnavailableError
from perf.host_gap import HostTimeError, host_ms
from perf.metrics import SloScore
from perf.regime import write_config
from perf.workload import WorkloadConfig, WorkloadError, build_workload, vocab_size_of
from taper_trtllm.config import ConfigError, ServingConfig, load_config
from taper_trtllm.profile import LatencyProfile, ProfileError, load_profile
from taper_trtllm.triton_install import TritonServerError
from taper_trtllm.triton_server import TritonServer

_POLICY = "taper:uncorrected"  # predicts by the profile alone
_CONCURRENCY = 8  # half of the slots of the default configuration
_NUM_PROMPTS = 120
_INPUT_LEN, _OUTPUT_LEN = 64, 128
_NUM_WARMUPS = 8
_STATUS = "measuring the host time of a step in the running server"


def measure_host_ms(profile: Path, base: ServingConfig) -> float:
    """Serves plain requests and reads the host time off the step log.

    Args:
        profile: Latency profile without host time.
        base: Configuration of the engine and the scheduler.

    Returns:
        Milliseconds per step, at least 0.

    Raises:
        HostTimeError: Too few steps decoded without prefill.
        TritonServerError: The server does not start.
        ServerUnavailableError: It cannot be benchmarked.
    """
    with tempfile.TemporaryDirectory(prefix="taper_host_time_") as directory:
        step_log, config_path = Path(directory) / "steps.jsonl", Path(directory) / "serving.yaml"
        scheduler = base.scheduler.model_copy(update={"policy": _POLICY})
        config = base.model_copy(
            update={"scheduler": scheduler, "profile": profile.resolve(), "step_log": step_log}
        )
        write_config(config, config_path)
        with TritonServer(config_path) as server:
            asyncio.run(
                run_benchmark(bench := _bench(server, base), build_workload(bench.workload))
            )
        return host_ms(json.loads(line) for line in step_log.read_text().splitlines())


def _bench(server: TritonServer, base: ServingConfig) -> BenchConfig:
    workload = WorkloadConfig(
        dataset_name="random",
        num_prompts=_NUM_PROMPTS,
        input_len=_INPUT_LEN,
        output_len=_OUTPUT_LEN,
        vocab_size=vocab_size_of(base.engine),
        limits=base.limits,
    )
    return BenchConfig(
        client=ClientConfig(url=server.grpc_url, max_concurrency=_CONCURRENCY),
        workload=workload,
        score=SloScore(),
        metrics_url=server.metrics_url,
        num_warmups=_NUM_WARMUPS,
        show_progress=False,
    )


def add_host_time(path: Path, base: ServingConfig) -> LatencyProfile:
    """Measures the host time of a profile's engine and writes it into the profile file.

    Raises:
        ProfileError: The profile cannot be read, or has its host time already.
        HostTimeError, TritonServerError, ServerUnavailableError: See `measure_host_ms`.
    """
    profile = load_profile(path)
    if "host_ms" in profile.provenance:
        raise ProfileError(f"{path} has its host time already; calibrate the engine again first")
    completed = profile.with_host_time(measure_host_ms(path, base))
    completed.save(path)
    return completed


def calibrate(path: Path, config: Path | None) -> None:
    """Measures the engine of a configuration, the default one if None, in a process of its own.

    Raises:
        HostTimeError: The calibration failed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "engine_build", "calibrate", "--output", str(path)]
    if config is not None:
        command += ["--config", str(config)]
    if subprocess.run(command).returncode:
        raise HostTimeError("the calibration failed")


def measure_profile(path: Path, base: ServingConfig, config: Path | None, console: Console) -> None:
    """Measures a profile anew: the engine in a process of its own, then in the running server.

    Args:
        path: Profile to write.
        base: Serving configuration.
        config: The file that it was read from; None for the defaults.
        console: Shows what is going on.

    Raises:
        HostTimeError: The calibration failed.
        TritonServerError, ServerUnavailableError: See `measure_host_ms`.
    """
    calibrate(path, config)
    with console.status(_STATUS):
        profile = add_host_time(path, base)
    console.print(f"host time: {profile.provenance['host_ms']} ms per step, in {path}")


def main() -> int:
    """Runs the command line; the exit status is 1 if nothing could be measured."""
    parser = argparse.ArgumentParser(
        prog="python -m perf.host_time",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("profile", type=Path, help="latency profile, changed in place")
    parser.add_argument("--config", type=Path, help="serving configuration (YAML)")
    arguments = parser.parse_args()
    console = Console()
    try:
        base = load_config(arguments.config) if arguments.config else ServingConfig()
        with console.status(_STATUS):
            profile = add_host_time(arguments.profile, base)
    except (
        ConfigError, HostTimeError, ProfileError, ServerUnavailableError, TritonServerError,
        WorkloadError,
    ) as error:  # fmt: skip
        print(f"error: {error}", file=sys.stderr)
        return 1
    console.print(f"host time: {profile.provenance['host_ms']} ms per step, in {arguments.profile}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
