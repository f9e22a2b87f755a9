"""The asyncio client."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

from taper_trtllm.client.connection import Connection
from taper_trtllm.client.program import (
    Program,
    RequestOptions,
    TextOrIds,
    request_tensors,
)
from taper_trtllm.client.results import Generation
from taper_trtllm.client.stream import AsyncStream

if TYPE_CHECKING:
    from typing_extensions import Unpack


class AsyncTaperClient:
    """Sends requests to a server; for one event loop, any number at a time.

    ```
    async with AsyncTaperClient("localhost:8001") as client:
        generation = await client.generate("Once upon a time", 100)
    ```
    """

    def __init__(
        self,
        url: str = "localhost:8001",
        model: str = "taper",
        *,
        connect_timeout_s: float = 5.0,
    ) -> None:
        """Connects when the first request is sent.

        Args:
            url: ``host:port`` of the gRPC endpoint.
            model: Model name.
            connect_timeout_s: How long to go on trying while nothing answers there.
        """
        self._connection = Connection(url, model, connect_timeout_s)

    async def __aenter__(self) -> AsyncTaperClient:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends the connection; what still runs is cancelled."""
        await self._connection.close()

    async def generate(
        self,
        prompt: TextOrIds,
        max_tokens: int,
        *,
        fork_format: str | None = None,
        **options: Unpack[RequestOptions],
    ) -> Generation:
        """Decodes up to `max_tokens` tokens behind `prompt`.

        Args:
            prompt: Text or token ids.
            max_tokens: At most so many; with `fork_format`, all that is put behind the prompt.
            fork_format: The model writes forks itself, in this format, such as ``multiverse``.
            options: See `RequestOptions`.

        Raises:
            RequestError: The server refused the request; names the field.
            TaperClientError: See `client.errors`.
        """
        what = {"max_tokens": max_tokens, "fork_format": fork_format}
        async with self._open(prompt, options, what) as stream:
            return await stream.result()

    def stream(
        self,
        prompt: TextOrIds,
        max_tokens: int,
        *,
        fork_format: str | None = None,
        **options: Unpack[RequestOptions],
    ) -> AsyncStream:
        """As `generate`, event by event: ``async with client.stream(...) as stream:``."""
        what = {"max_tokens": max_tokens, "fork_format": fork_format, "events": True}
        return self._open(prompt, options, what)

    def fork_join(self, prompt: TextOrIds) -> AsyncForkJoin:
        """A program to build on: ``await client.fork_join("...").serial(16).run()``."""
        return AsyncForkJoin(client=self, prompt=prompt)

    def _open(
        self, prompt: TextOrIds, options: RequestOptions, what: Mapping[str, Any]
    ) -> AsyncStream:
        request_id = options.get("request_id") or uuid.uuid4().hex
        tensors = {**request_tensors(prompt, options), **what}
        return AsyncStream(self._connection, request_id, tensors, options.get("deadline_s"))


@dataclass(frozen=True, kw_only=True)
class AsyncForkJoin(Program):
    """A program behind a prompt, on its way to a server."""

    client: AsyncTaperClient
    prompt: TextOrIds

    async def run(self, **options: Unpack[RequestOptions]) -> Generation:
        """Runs it to its end; see `AsyncTaperClient.generate`."""
        what = {"stages": self.stages_json()}
        async with self.client._open(self.prompt, options, what) as stream:
            return await stream.result()

    def stream(self, **options: Unpack[RequestOptions]) -> AsyncStream:
        """Runs it, event by event."""
        what = {"stages": self.stages_json(), "events": True}
        return self.client._open(self.prompt, options, what)
