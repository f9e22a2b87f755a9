"""The blocking client: the asyncio client on an event loop in a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import CancelledError
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from taper_trtllm.client.aio import AsyncForkJoin, AsyncTaperClient
from taper_trtllm.client.events import Event
from taper_trtllm.client.program import Program, RequestOptions, TextOrIds
from taper_trtllm.client.results import Generation
from taper_trtllm.client.stream import AsyncStream

if TYPE_CHECKING:
    from typing_extensions import Unpack

T = TypeVar("T")


class TaperClient:
    """`AsyncTaperClient` for code that blocks; from any thread, any number of requests at a time.

    ```
    with TaperClient("localhost:8001") as client:
        print(client.generate("Once upon a time", 100).text)
    ```
    """

    def __init__(
        self,
        url: str = "localhost:8001",
        model: str = "taper",
        *,
        connect_timeout_s: float = 5.0,
    ) -> None:
        """See `AsyncTaperClient`."""
        self._loop = _LoopThread()
        self._async = AsyncTaperClient(url, model, connect_timeout_s=connect_timeout_s)

    def __enter__(self) -> TaperClient:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection; what still runs is cancelled."""
        if not self._loop.is_closed:
            self._loop.run(self._async.close())
            self._loop.stop()

    def generate(
        self,
        prompt: TextOrIds,
        max_tokens: int,
        *,
        fork_format: str | None = None,
        **options: Unpack[RequestOptions],
    ) -> Generation:
        """See `AsyncTaperClient.generate`."""
        return self._loop.run(
            self._async.generate(prompt, max_tokens, fork_format=fork_format, **options)
        )

    def stream(
        self,
        prompt: TextOrIds,
        max_tokens: int,
        *,
        fork_format: str | None = None,
        **options: Unpack[RequestOptions],
    ) -> Stream:
        """As `generate`, event by event: ``with client.stream(...) as stream:``."""
        stream = self._async.stream(prompt, max_tokens, fork_format=fork_format, **options)
        return Stream(self._loop, stream)

    def fork_join(self, prompt: TextOrIds) -> ForkJoin:
        """A program to build on: ``client.fork_join("...").serial(16).run()``."""
        return ForkJoin(client=self, prompt=prompt)


@dataclass(frozen=True, kw_only=True)
class ForkJoin(Program):
    """A program behind a prompt, on its way to a server."""

    client: TaperClient
    prompt: TextOrIds

    def run(self, **options: Unpack[RequestOptions]) -> Generation:
        """Runs it to its end; see `AsyncTaperClient.generate`."""
        return self.client._loop.run(self._async().run(**options))

    def stream(self, **options: Unpack[RequestOptions]) -> Stream:
        """Runs it, event by event."""
        return Stream(self.client._loop, self._async().stream(**options))

    def _async(self) -> AsyncForkJoin:
        return AsyncForkJoin(client=self.client._async, prompt=self.prompt, stages=self.stages)


class Stream:
    """`AsyncStream` for code that blocks."""

    def __init__(self, loop: _LoopThread, stream: AsyncStream) -> None:
        self._loop = loop
        self._stream = stream
        self.request_id = stream.request_id

    def __enter__(self) -> Stream:
        """See `AsyncStream.__aenter__`."""
        self._loop.run(self._stream.__aenter__())
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """See `AsyncStream.__aexit__`."""
        self._loop.run(self._stream.__aexit__(exc_type, exc, traceback))

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        """See `AsyncStream.__anext__`."""
        event = self._loop.run(_next(self._stream))
        if event is None:
            raise StopIteration
        return event

    def result(self) -> Generation:
        """See `AsyncStream.result`."""
        return self._loop.run(self._stream.result())

    def cancel(self) -> None:
        """See `AsyncStream.cancel`."""
        self._loop.call_soon(self._stream.cancel)

    def cancel_branch(self, *branch_paths: str) -> None:
        """See `AsyncStream.cancel_branch`."""
        self._loop.run(self._stream.cancel_branch(*branch_paths))


async def _next(stream: AsyncStream) -> Event | None:
    """The next event; None at the end, because StopIteration does not pass through futures."""
    return await anext(stream, None)


async def _end_tasks() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class _LoopThread:
    """An event loop that runs coroutines for other threads."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="taper-client", daemon=True
        )
        self._thread.start()

    @property
    def is_closed(self) -> bool:
        """`stop` was called."""
        return self._loop.is_closed()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Waits for a coroutine; interrupted, it is cancelled.

        Raises:
            RuntimeError: `stop` was called, before or meanwhile.
        """
        if self.is_closed:
            coroutine.close()
            raise RuntimeError("the client is closed")
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except CancelledError:  # `_end_tasks`
            raise RuntimeError("the client was closed") from None
        except BaseException:
            future.cancel()
            raise

    def call_soon(self, callback: Callable[[], None]) -> None:
        """Has a function called on the loop."""
        self._loop.call_soon_threadsafe(callback)

    def stop(self) -> None:
        """Ends everything that still runs, and the thread."""
        self.run(_end_tasks())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
