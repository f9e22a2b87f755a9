"""The executor in a process of its own, for servers that do other work in Python.

A server's threads (responses, metrics, polling) would take the interpreter lock from the step loop
many times in a step; measured in Triton's Python stub, steps took 1.7 times as long. Here the loop
has an interpreter to itself, and a turn of it sends everything it has to say as one message.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import FrameType

from taper_trtllm.batch import StepRecord
from taper_trtllm.config import ConfigError, ServingConfig
from taper_trtllm.engines.base import EngineCapabilities, WorkerRank
from taper_trtllm.executor import TaperExecutor
from taper_trtllm.executor_thread import ExecutorThread
from taper_trtllm.live_request import OutputCallback
from taper_trtllm.output import RequestOutput
from taper_trtllm.request import ForkJoinRequest, RequestError
from taper_trtllm.request_gate import ExecutorClosedError, FormatTerms, RequestGate

logger = logging.getLogger(__name__)

_BUFFER_BYTES = 4 << 20  # so that a step never waits for the server to read
_EXIT_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class _Ready:
    """The executor runs, or this rank of the engine works for the one that leads."""

    capabilities: EngineCapabilities
    policy_name: str
    num_free_blocks: int
    format_terms: Mapping[str, FormatTerms]
    closed_because: str | None = None


@dataclass(frozen=True, slots=True)
class _Failed:
    message: str


@dataclass(frozen=True, slots=True)
class _Turn:
    """What one turn of the loop has to say."""

    outputs: tuple[RequestOutput, ...]
    started_ids: tuple[str, ...]
    record: StepRecord | None
    num_free_blocks: int


@dataclass(frozen=True, slots=True)
class _Submit:
    request: ForkJoinRequest


@dataclass(frozen=True, slots=True)
class _Cancel:
    request_id: str


@dataclass(frozen=True, slots=True)
class _CancelBranch:
    request_id: str
    branch_path: str


@dataclass(frozen=True, slots=True)
class _Stop:
    pass


class ExecutorProcess:
    """A `TaperExecutor` in another process: `submit`, `cancel` and what is told about requests.

    All methods may be called from any thread. Callbacks and observers run on one reader thread.

    Args:
        config: What to serve; the other process builds it. On ranks that work for the leader of a
            compiled engine it takes no requests.

    Raises:
        ConfigError: The executor could not be built; the message says why.
    """

    def __init__(self, config: ServingConfig) -> None:
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
        # Not `-m`: what it sends must be pickled under this module's name, not as `__main__`.
        start = f"from {__name__} import main; main()"
        self._process = subprocess.Popen(
            [sys.executable, "-c", start, str(theirs.fileno())], pass_fds=[theirs.fileno()]
        )
        theirs.close()
        self._connection = Connection(ours.detach())
        self._lock = threading.Lock()  # the gate and the callbacks
        self._sending = threading.Lock()
        self._connection.send(config)
        ready = self._first_message()
        self.capabilities = ready.capabilities
        self.policy_name = ready.policy_name
        self.num_free_blocks = ready.num_free_blocks
        self._gate = RequestGate(config.limits, ready.capabilities, ready.format_terms)
        if ready.closed_because is not None:
            self._gate.close(ready.closed_because)
        self._callbacks: dict[str, OutputCallback] = {}
        self._observers: list[Callable[[StepRecord], None]] = []
        self._reader = threading.Thread(target=self._read, name="executor-reader", daemon=True)
        self._reader.start()

    def _first_message(self) -> _Ready:
        try:
            message = self._connection.recv()
        except EOFError:
            message = _Failed(f"the executor process ended ({self._process.wait()})")
        if isinstance(message, _Ready):
            return message
        try:
            self._process.wait(_EXIT_TIMEOUT_S)
        except subprocess.TimeoutExpired:  # half an engine may not come down by itself
            self._process.kill()
            self._process.wait()
        raise ConfigError(message.message)

    def submit(self, request: ForkJoinRequest, on_output: OutputCallback) -> None:
        """Queues a request; its outputs go to `on_output` on the reader thread.

        Raises:
            RequestError: The request is out of limits or its id is in use; nothing was queued.
            QueueFullError: The waiting queue is at its limit.
            ExecutorClosedError: The executor takes no more requests.
        """
        self._gate.check(request)
        with self._lock:
            self._gate.enter(request.request_id)
            self._callbacks[request.request_id] = on_output
        self._send(_Submit(request))

    def cancel(self, request_id: str) -> None:
        """Ends a request and its whole family before the next step; unknown ids are ignored."""
        self._send(_Cancel(request_id))

    def cancel_branch(self, request_id: str, branch_path: str) -> None:
        """Ends a branch before the next step; see `TaperExecutor.cancel_branch`."""
        self._send(_CancelBranch(request_id, branch_path))

    def is_running(self, request_id: str) -> bool | None:
        """True once it was started, False while it is queued, None if it is not open."""
        with self._lock:
            return self._gate.is_started(request_id)

    def add_step_observer(self, observer: Callable[[StepRecord], None]) -> None:
        """Registers a function that the reader thread calls for every step."""
        self._observers.append(observer)

    def stop(self) -> None:
        """Ends the process; open requests are answered with an error."""
        with self._lock:
            self._gate.close("the server is shutting down")
        self._send(_Stop())
        self._reader.join(_EXIT_TIMEOUT_S)
        self._process.kill()
        self._process.wait()

    def _send(self, message: object) -> None:
        try:
            with self._sending:
                self._connection.send(message)
        except OSError:
            logger.debug("the executor process is gone; its reader answers what is open")

    # ------------------------------------------------------------------------ reader thread

    def _read(self) -> None:
        try:
            while True:
                self._take(self._connection.recv())
        except (EOFError, OSError):
            self._answer_open("the executor process ended")
        except Exception as error:  # nobody would read on: better an answer than none
            logger.exception("the executor's messages cannot be taken")
            self._answer_open(f"the server failed: {error}")

    def _take(self, turn: _Turn) -> None:
        with self._lock:
            for request_id in turn.started_ids:
                if request_id in self._callbacks:  # else it has ended already
                    self._gate.start(request_id)
            callbacks = [self._callbacks[output.request_id] for output in turn.outputs]
            for output in turn.outputs:
                if output.finished:
                    self._close(output.request_id)
        self.num_free_blocks = turn.num_free_blocks
        for callback, output in zip(callbacks, turn.outputs, strict=True):
            callback(output)
        if turn.record is not None:
            for observer in self._observers:
                observer(turn.record)

    def _close(self, request_id: str) -> None:
        self._gate.leave(request_id)
        del self._callbacks[request_id]

    def _answer_open(self, message: str) -> None:
        with self._lock:
            self._gate.close(message)
            callbacks = dict(self._callbacks)
            for request_id in callbacks:
                self._close(request_id)
        for request_id, callback in callbacks.items():
            callback(RequestOutput(request_id, finish_reason="error", error=message))


# ------------------------------------------------------------------------------ the other side


class _Worker:
    """Serves one `ExecutorProcess`."""

    def __init__(self, connection: Connection, executor: TaperExecutor) -> None:
        self._connection = connection
        self._executor = executor
        self._outputs: deque[RequestOutput] = deque()
        self._waiting: set[str] = set()
        self._sending = threading.Lock()
        self._thread = ExecutorThread(executor, after_turn=self._end_turn)

    def run(self) -> None:
        """Until the server says so, or is gone."""
        executor = self._executor
        self._connection.send(
            _Ready(
                executor.capabilities,
                executor.policy_name,
                executor.num_free_blocks,
                executor.format_terms,
            )
        )
        self._thread.start()
        try:
            while not isinstance(message := self._connection.recv(), _Stop):
                if isinstance(message, _Submit):
                    self._submit(message.request)
                elif isinstance(message, _CancelBranch):
                    executor.cancel_branch(message.request_id, message.branch_path)
                else:
                    executor.cancel(message.request_id)
        except EOFError:
            logger.warning("the server is gone")
        self._thread.stop()

    def _submit(self, request: ForkJoinRequest) -> None:
        try:
            self._executor.submit(request, self._outputs.append)
            self._waiting.add(request.request_id)
        except (RequestError, ExecutorClosedError) as error:  # the engine has failed meanwhile
            self._outputs.append(
                RequestOutput(request.request_id, finish_reason="error", error=str(error))
            )
            self._end_turn(None)

    def _end_turn(self, record: StepRecord | None) -> None:
        """After every turn of the loop: what it did goes out as one message."""
        with self._sending:
            waiting = tuple(self._waiting)
            started = tuple(i for i in waiting if self._executor.is_running(i) is not False)
            outputs = tuple(self._outputs.popleft() for _ in range(len(self._outputs)))
            if record is None and not outputs and not started:
                return
            self._waiting.difference_update(started)
            turn = _Turn(outputs, started, record, self._executor.num_free_blocks)
            try:
                self._connection.send(turn)
            except OSError:
                logger.debug("the server is gone")


def _work(connection: Connection, rank: WorkerRank, policy_name: str) -> None:
    """Computes for the leader until it ends; without the server, not even that long."""
    closed_because = "this rank works for the leader of its engine: send requests to rank 0"
    connection.send(_Ready(rank.capabilities, policy_name, 0, {}, closed_because))
    threading.Thread(target=_end_with_server, args=(connection,), daemon=True).start()
    rank.work()


def _end_with_server(connection: Connection) -> None:
    try:
        while True:
            connection.recv()  # told to stop: the leader is, too, and ends the work
    except (EOFError, OSError):
        os._exit(1)


def _leave_to_server(signum: int, frame: FrameType | None) -> None:
    """Interrupts and mpirun's signals reach whole process groups; the server ends this process."""


def main() -> None:
    """Entry point of the process; its argument is the number of an inherited socket."""
    logging.basicConfig()
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, _leave_to_server)
    connection = Connection(int(sys.argv[1]))
    config: ServingConfig = connection.recv()
    try:
        executor = TaperExecutor.from_config(config)
    except WorkerRank as rank:
        _work(connection, rank, config.scheduler.policy)
        return
    except Exception as error:
        connection.send(_Failed(str(error) or type(error).__name__))
        raise SystemExit(1) from error
    _Worker(connection, executor).run()
