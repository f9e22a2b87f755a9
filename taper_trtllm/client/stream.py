"""One request on its way: sent, followed, ended. All that is ever received is received here."""

from __future__ import annotations

import asyncio
import math
import re
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from types import TracebackType
from typing import Any

import grpc

from taper_trtllm.client.connection import Connection
from taper_trtllm.client.errors import (
    ConnectionLostError,
    DeadlineExceededError,
    ModelNotFoundError,
    RequestCancelledError,
    RequestFailedError,
)
from taper_trtllm.client.events import Event, Finished, branch_event
from taper_trtllm.client.results import Generation, Transcript, TranscriptBuilder
from taper_trtllm.client.wire import (
    INPUT_TYPES,
    OPTION_NAMES,
    Response,
    decode_response,
    input_tensors,
)
from taper_trtllm.request import RequestError

_CONTROL_TIMEOUT_S = 30.0  # a server that does not even answer this is lost
_LONGEST_S = 1e9  # what gRPC cannot count, it takes to be over


class AsyncStream:
    """A request and its events: a context manager that sends it, and an iterator.

    Leaving the context before the request has ended cancels it, with all its branches.

    Attributes:
        request_id: Its id.
    """

    def __init__(
        self,
        connection: Connection,
        request_id: str,
        tensors: Mapping[str, Any],
        deadline_s: float | None,
    ) -> None:
        """Describes the request; entering the context sends it.

        Args:
            connection: To the server.
            request_id: Its id.
            tensors: Its inputs, by name; see `wire.input_tensors`.
            deadline_s: After so long, from entering the context, it is cancelled.
        """
        self.request_id = request_id
        self._connection = connection
        self._tensors = tensors
        self._deadline_s = deadline_s
        self._transcript = TranscriptBuilder(request_id)
        self._events: asyncio.Queue[Event | None] = asyncio.Queue()
        self._ends_s = math.inf
        self._has_begun = False
        self._generation: Generation | None = None
        self._error: Exception | None = None
        self._call: Any = None
        self._reader: asyncio.Task[None] | None = None

    async def __aenter__(self) -> AsyncStream:
        """Sends the request.

        Raises:
            RequestError: A value cannot be sent.
            ServerUnavailableError: The server is not there.
            DeadlineExceededError: So far it is not.
            RuntimeError: It was sent before.
        """
        if self._reader is not None:
            raise RuntimeError("a stream is sent once; ask the client for another one")
        inputs = input_tensors(**self._tensors)
        if self._deadline_s is not None:
            self._ends_s = time.monotonic() + min(self._deadline_s, _LONGEST_S)
        try:
            await asyncio.wait_for(self._connection.connect(), self._deadline_s)
        except asyncio.TimeoutError:
            raise DeadlineExceededError(
                f"not connected within deadline_s={self._deadline_s:g}", self.transcript
            ) from None
        left_s = None
        if self._deadline_s is not None:
            left_s = max(0.0, self._ends_s - time.monotonic())
        self._call = self._connection.send(inputs, self.request_id, left_s)
        self._reader = asyncio.create_task(self._read())
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Cancels the request unless it has ended."""
        self.cancel()
        if self._reader is not None:
            await asyncio.wait([self._reader])  # if we are cancelled here, it is not

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        """The next event.

        Raises:
            RequestError: The server refused the request; names the field.
            ModelNotFoundError: The server does not serve the model.
            DeadlineExceededError: So for the other errors of `client.errors`.
            RuntimeError: The context was not entered.
        """
        self._check_sent()
        event = await self._events.get()
        if event is None:
            self._events.put_nowait(None)  # for whoever asks again
            if self._error is not None:
                raise self._error
            raise StopAsyncIteration
        return event

    async def result(self) -> Generation:
        """Waits for the end; events that nobody took are dropped.

        Raises:
            RequestError: See `__anext__`.
        """
        async for _ in self:
            pass
        assert self._generation is not None
        return self._generation

    @property
    def transcript(self) -> Transcript:
        """What has come so far."""
        return self._transcript.transcript()

    def cancel(self) -> None:
        """Cancels the request with all its branches; does nothing if it has ended."""
        # Never after the last response: that can leak inside tritonserver 2.51.
        if self._generation is None and self._error is None and self._call is not None:
            self._call.cancel()

    async def cancel_branch(self, *branch_paths: str) -> None:
        """Withdraws branches: joins go on without them. Those that have ended stay as they are.

        Args:
            branch_paths: Of branches of parallel stages that allow it (`allow_branch_cancel`).

        Raises:
            RequestError: The request has not begun, or there are too many branches.
            TaperClientError: The server cannot be asked.
            RuntimeError: The context was not entered.
        """
        self._check_sent()
        inputs = input_tensors(
            cancel_request_id=self.request_id, cancel_branch_paths=list(branch_paths)
        )
        call = self._connection.send(inputs, uuid.uuid4().hex, _CONTROL_TIMEOUT_S)
        refusals = []
        try:
            async for _, error in call:
                if error is not None:
                    refusals.append(self._refusal(error.message()))
        except grpc.aio.AioRpcError as error:
            raise self._lost(error) from None
        for refusal in refusals:
            is_not_open = getattr(refusal, "field", None) == "cancel_request_id"
            if not (is_not_open and self._has_begun):  # otherwise it has ended meanwhile
                raise refusal

    def _check_sent(self) -> None:
        if self._reader is None:
            raise RuntimeError("a stream is sent by `with`: `with client.stream(...) as stream:`")

    # ------------------------------------------------------------------------------ reader task

    async def _read(self) -> None:
        """Takes every response as it comes, to the end of the stream."""
        try:
            async for result, error in self._call:
                if error is not None:
                    self._error = self._refusal(error.message())
                else:
                    self._take(decode_response(result))
            self._fail(ConnectionLostError("the server ended the stream early", self.transcript))
        except grpc.aio.AioRpcError as error:
            self._fail(self._broken(error))
        except ValueError as error:  # a response that this client does not understand
            self._fail(error)
            self._call.cancel()
        except asyncio.CancelledError:  # what a call that we cancelled raises
            self._fail(self._cancelled())
        finally:
            self._events.put_nowait(None)

    def _take(self, response: Response) -> None:
        output = response.output
        self._has_begun = True
        self._transcript.add(output.branches, response.texts)
        for branch, text in zip(output.branches, response.texts, strict=True):
            self._events.put_nowait(branch_event(branch, text, output.progress))
        if output.finish_reason is not None and output.metrics is not None:
            self._generation = self._transcript.generation(output.finish_reason, output.metrics)
            self._events.put_nowait(Finished(self._generation))

    def _fail(self, error: Exception) -> None:
        """The stream is over; without the last response that is an error."""
        if self._generation is None and self._error is None:
            self._error = error

    def _broken(self, error: grpc.aio.AioRpcError) -> Exception:
        if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            return self._late()
        if error.code() is grpc.StatusCode.CANCELLED:
            return self._cancelled()
        # A deadline that passes while the request is sent can be an internal error to gRPC.
        return self._late() if self._is_late() else self._lost(error)

    def _is_late(self) -> bool:
        return time.monotonic() >= self._ends_s

    def _late(self) -> Exception:
        return DeadlineExceededError(
            f"not done within deadline_s={self._deadline_s:g}; cancelled", self.transcript
        )

    def _cancelled(self) -> Exception:
        if self._is_late():
            return self._late()
        return RequestCancelledError("the request was cancelled", self.transcript)

    def _lost(self, error: grpc.aio.AioRpcError) -> Exception:
        return ConnectionLostError(
            f"the connection was lost ({error.code().name}: {error.details()})", self.transcript
        )

    def _refusal(self, message: str) -> Exception:
        if message.startswith("Request for unknown model"):
            return ModelNotFoundError(f"model {self._connection.model!r}: {message}")
        field, colon, reason = message.partition(": ")
        if colon and re.split(r"[.\[]", field)[0] in {*INPUT_TYPES, "request_id"}:
            return RequestError(OPTION_NAMES.get(field, field), reason)
        return RequestFailedError(message, self.transcript)
