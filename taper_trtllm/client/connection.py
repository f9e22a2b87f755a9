"""One gRPC channel to a server, opened when it is first needed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
from tritonclient.grpc import InferInput
from tritonclient.grpc import aio as grpcclient

from taper_trtllm.client.errors import ServerUnavailableError

_CHANNEL_ARGUMENTS = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 1000),
]
_POLL_S = 0.005


class Connection:
    """The channel; for one event loop."""

    def __init__(self, url: str, model: str, connect_timeout_s: float) -> None:
        """Describes it.

        Args:
            url: ``host:port`` of the gRPC endpoint.
            model: Model name.
            connect_timeout_s: How long to go on trying while nothing answers there.
        """
        self.model = model
        self._url = url
        self._connect_timeout_s = connect_timeout_s
        self._client: _Client | None = None

    async def connect(self) -> None:
        """Waits until the server is there.

        gRPC tries again and again, at most a second apart. Nothing else is ever tried twice: of a
        request that has been sent nobody can know whether it runs.

        Raises:
            ServerUnavailableError: It is not.
        """
        if self._client is None:
            self._client = _Client(self._url, channel_args=_CHANNEL_ARGUMENTS)
        try:
            await asyncio.wait_for(self._client.connected(), self._connect_timeout_s)
        except asyncio.TimeoutError:
            raise ServerUnavailableError(
                f"no Triton server at {self._url} (gRPC); start one with scripts/serve.sh"
            ) from None

    def send(self, inputs: list[InferInput], request_id: str, timeout_s: float | None) -> Any:
        """Sends one request on a stream of its own; `connect` has returned.

        Returns:
            What tritonclient's `stream_infer` returns: responses and errors, and `cancel`.
        """

        async def requests() -> AsyncIterator[dict[str, Any]]:
            yield {"model_name": self.model, "inputs": inputs, "request_id": request_id}

        assert self._client is not None
        return self._client.stream_infer(requests(), stream_timeout=timeout_s)

    async def close(self) -> None:
        """Ends the channel and every request on it."""
        client, self._client = self._client, None
        if client is not None:
            await client.close()


class _Client(grpcclient.InferenceServerClient):  # type: ignore[misc]
    """tritonclient's, which cannot say whether it is connected."""

    async def connected(self) -> None:
        """Returns when it is; polls, since a watch that is given up outlives its event loop."""
        while self._channel.get_state(try_to_connect=True) is not grpc.ChannelConnectivity.READY:
            await asyncio.sleep(_POLL_S)
