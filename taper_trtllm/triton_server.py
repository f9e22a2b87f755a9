"""Launches a real Triton Inference Server with the Python backend, on any machine.

`tritonserver`, its Python backend and the backend's stub come from the ``nvidia-pytriton`` wheel
(extra ``triton``); nothing of that package is imported. ``python -m taper_trtllm.triton_server``
serves until it is interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from taper_trtllm.config import ConfigError, load_config
from taper_trtllm.triton_install import TritonServerError, find_installation, libpython_dir

MODEL_NAME = "taper"
CONFIG_ENV = "TAPER_CONFIG"  # absolute path of the serving configuration, read by model.py
DEFAULT_MODEL_REPOSITORY = Path(__file__).resolve().parent.parent / "triton_repo"
_EXIT_TIMEOUT_S = 6
_LOG_TAIL_LINES = 40


class TritonServer:
    """One `tritonserver` process in a session of its own; a context manager.

    Attributes:
        http_port: Port of the HTTP endpoint; so for `grpc_port` and `metrics_port`.
        grpc_url: ``host:port`` for tritonclient.
        metrics_url: URL of the Prometheus page.
        log_path: Log of the server and of its Python stub; deleted by `stop`.
    """

    def __init__(
        self,
        config: str | Path | None = None,
        *,
        model_repository: str | Path = DEFAULT_MODEL_REPOSITORY,
        host: str = "127.0.0.1",
        http_port: int = 0,
        grpc_port: int = 0,
        metrics_port: int = 0,
    ) -> None:
        """Describes the server; `start` launches it.

        Args:
            config: Serving configuration; the repository's own by default.
            model_repository: Directory that holds the model `taper`.
            host: Address that all three endpoints listen on.
            http_port: 0 picks a free port; so for the other two.
            grpc_port: See `http_port`.
            metrics_port: See `http_port`.

        Raises:
            TritonServerError: A given port is taken.
        """
        self._config = None if config is None else Path(config).resolve()
        self._repository = Path(model_repository).resolve()
        self._host = host
        self.http_port, self.grpc_port, self.metrics_port = _reserve_ports(
            host, {"http": http_port, "grpc": grpc_port, "metrics": metrics_port}
        )
        reachable = "127.0.0.1" if host == "0.0.0.0" else host
        self.http_url = f"http://{reachable}:{self.http_port}"
        self.grpc_url = f"{reachable}:{self.grpc_port}"
        self.metrics_url = f"http://{reachable}:{self.metrics_port}/metrics"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, timeout_s: float = 180.0) -> None:
        """Launches the server and waits until the model has answered one request.

        Raises:
            TritonServerError: It is not installed, it died, or it was not ready in time.
        """
        self._work_dir = Path(tempfile.mkdtemp(prefix="taper_triton_"))
        self._shm_prefix = f"taper_{uuid.uuid4().hex[:12]}_"
        self.log_path = self._work_dir / "tritonserver.log"
        try:
            if not (self._repository / MODEL_NAME).is_dir():
                raise TritonServerError(f"no model `{MODEL_NAME}` in {self._repository}")
            self._launch()
            self._wait_until_ready(time.monotonic() + timeout_s)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> int | None:
        """Ends the server and everything it started, and removes what it left behind.

        Close every client first: an open gRPC stream keeps the server from exiting by itself.

        Returns:
            Exit status of the server; negative if it had to be killed; None if it never ran.
        """
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(signal.SIGTERM)
            try:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_EXIT_TIMEOUT_S + 4)
            finally:  # also when interrupted; orphaned stubs are in the same group
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        for region in Path("/dev/shm").glob(f"{self._shm_prefix}*"):
            region.unlink(missing_ok=True)
        shutil.rmtree(self._work_dir, ignore_errors=True)
        return None if process is None else process.returncode

    def __enter__(self) -> TritonServer:
        """Starts the server."""
        self.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stops the server."""
        self.stop()

    def check_alive(self) -> None:
        """Raises TritonServerError, with the tail of the log, if the process has ended."""
        if self._process is None:
            raise TritonServerError("tritonserver is not running")
        status = self._process.poll()
        if status is not None:
            raise TritonServerError(f"tritonserver ended with status {status}\n{self.log_tail()}")

    def log_tail(self, num_lines: int = _LOG_TAIL_LINES) -> str:
        """The last lines of the log, without the tables that Triton prints between messages."""
        lines = self.log_path.read_text(errors="replace").splitlines()
        return "\n".join([line for line in lines if line and line[0] not in "+|"][-num_lines:])

    def generate(self, fields: dict[str, Any], timeout_s: float = 60.0) -> dict[str, Any]:
        """Runs one request to its end over HTTP, with `streaming` off.

        Args:
            fields: Input tensors by name, as JSON values.
            timeout_s: Time to wait for the response.

        Returns:
            Output tensors by name; one-element tensors as scalars.

        Raises:
            TritonServerError: The request failed; the message is the server's.
        """
        request = urllib.request.Request(
            f"{self.http_url}/v2/models/{MODEL_NAME}/generate",
            data=json.dumps({**fields, "streaming": False}).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as response:
                answer: dict[str, Any] = json.load(response)
        except urllib.error.HTTPError as error:
            raise TritonServerError(error.read().decode(errors="replace")) from None
        except OSError as error:
            raise TritonServerError(f"no answer from {self.http_url}: {error}") from None
        return answer

    # ---------------------------------------------------------------------------- launching

    def _launch(self) -> None:
        triton, stub = find_installation()
        backends = self._work_dir / "backends"
        backend = backends / "python"
        backend.mkdir(parents=True)
        # The wheel ships no stub inside the backend's directory, where the backend looks for it.
        library_dir = triton / "backends" / "python"
        for source in (
            library_dir / "libtriton_python.so",
            library_dir / "triton_python_backend_utils.py",
            stub,
        ):
            (backend / source.name).symlink_to(source)
        with self.log_path.open("wb") as log:
            self._process = subprocess.Popen(
                [str(triton / "bin" / "tritonserver"), *self._arguments(backends)],
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _arguments(self, backends: Path) -> list[str]:
        addresses = [
            argument
            for name, port in (
                ("http", self.http_port),
                ("grpc", self.grpc_port),
                ("metrics", self.metrics_port),
            )
            for argument in (f"--{name}-address={self._host}", f"--{name}-port={port}")
        ]
        return [
            f"--model-repository={self._repository}",
            f"--backend-directory={backends}",
            "--disable-auto-complete-config",
            "--allow-gpu-metrics=false",
            f"--exit-timeout-secs={_EXIT_TIMEOUT_S}",
            f"--backend-config=python,shm-region-prefix-name={self._shm_prefix}",
            "--backend-config=python,stub-timeout-seconds=120",
            *addresses,
        ]

    def _environment(self) -> dict[str, str]:
        """The stub takes its environment from the first python3 on PATH."""
        environment = dict(os.environ)
        library_path = [str(libpython_dir()), environment.get("LD_LIBRARY_PATH", "")]
        environment["LD_LIBRARY_PATH"] = ":".join(filter(None, library_path))
        environment["PATH"] = f"{Path(sys.executable).parent}:{environment.get('PATH', '')}"
        if self._config is not None:
            environment[CONFIG_ENV] = str(self._config)
        else:
            environment.pop(CONFIG_ENV, None)
        return environment

    def _wait_until_ready(self, deadline_s: float) -> None:
        """Polls the health endpoint, then asks for one token: only an inference proves the model.

        The readiness endpoints stay positive when the Python stub has died.
        """
        while not self._is_healthy():
            self.check_alive()
            if time.monotonic() > deadline_s:
                raise TritonServerError(f"tritonserver was not ready in time\n{self.log_tail()}")
            time.sleep(0.05)
        try:
            self.generate(
                {"input_ids": [0], "max_tokens": 1, "ignore_eos": True},
                timeout_s=max(1.0, deadline_s - time.monotonic()),
            )
        except TritonServerError as error:
            raise TritonServerError(f"first inference failed: {error}\n{self.log_tail()}") from None

    def _is_healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.http_url}/v2/health/ready", timeout=5) as response:
                return bool(response.status == 200)
        except OSError:
            return False


def _reserve_ports(host: str, wanted: dict[str, int]) -> tuple[int, ...]:
    """Replaces 0 by free ports, all different; checks that the others are free."""
    sockets = []
    try:
        for name, port in wanted.items():
            listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            sockets.append(listener)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((host, port))
            except OSError as error:
                raise TritonServerError(
                    f"--{name}-port: cannot listen on {host}:{port} ({error.strerror})"
                ) from None
        return tuple(listener.getsockname()[1] for listener in sockets)
    finally:
        for listener in sockets:
            listener.close()


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _port(text: str) -> int:
    port = int(text)
    if not 0 <= port < 1 << 16:
        raise argparse.ArgumentTypeError(f"must be in 0..65535 (got {text})")
    return port


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="serve", description="Serve the model `taper` until interrupted."
    )
    parser.add_argument("--config", type=Path, help="serving configuration (YAML)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    parser.add_argument(
        "--grpc-port", type=_port, default=8001, help="%(default)s; 0: any free one"
    )
    parser.add_argument(
        "--http-port", type=_port, default=8000, help="%(default)s; 0: any free one"
    )
    parser.add_argument(
        "--metrics-port", type=_port, default=8002, help="%(default)s; 0: any free one"
    )
    parser.add_argument("--model-repository", type=Path, default=DEFAULT_MODEL_REPOSITORY)
    return parser.parse_args()


def main() -> int:
    """Serves until interrupted; the exit status is 1 if the server cannot start or dies."""
    arguments = _parse_arguments()
    # SIGINT too: a shell that starts a job in the background makes it ignore that signal.
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, _interrupt)
    try:
        if arguments.config is not None:
            load_config(arguments.config)  # a mistake is found here, not in the server's log
        with TritonServer(**vars(arguments)) as server:
            print(
                f"serving `{MODEL_NAME}` on {arguments.host}: gRPC {server.grpc_port}, "
                f"HTTP {server.http_port}, metrics {server.metrics_port} "
                f"(log: {server.log_path}); Ctrl-C stops",
                flush=True,
            )
            while True:
                server.check_alive()
                time.sleep(0.5)
    except (ConfigError, TritonServerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(main())
