"""The thread that drives an executor behind a server."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from taper_trtllm.batch import StepRecord
from taper_trtllm.executor import TaperExecutor

logger = logging.getLogger(__name__)


class ExecutorThread:
    """Drives an executor until it is stopped.

    Args:
        executor: Driven from now on by this thread alone.
        after_turn: Called on the thread after every `run_once`, and once more at the end.
    """

    _IDLE_WAIT_S = 0.05

    def __init__(
        self,
        executor: TaperExecutor,
        after_turn: Callable[[StepRecord | None], None] = lambda record: None,
    ) -> None:
        self._executor = executor
        self._after_turn = after_turn
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="taper-executor", daemon=True)

    def start(self) -> None:
        """Begins to drive."""
        self._thread.start()

    def stop(self) -> None:
        """Stops driving and shuts the executor down; open requests are answered with an error."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        executor = self._executor
        try:
            while not self._stop.is_set():
                record = executor.run_once()
                self._after_turn(record)
                if record is None:
                    executor.wait_for_work(self._IDLE_WAIT_S)
        except Exception as error:
            logger.exception("the engine failed")
            executor.fail_all(f"the engine failed: {error}")
        executor.fail_all("the server is shutting down")
        self._after_turn(None)  # the answers first: an engine that is lost may hang here
        executor.shutdown()
