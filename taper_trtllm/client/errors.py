"""What can go wrong with a request, as a client sees it."""

from __future__ import annotations

from taper_trtllm.client.results import Transcript


class TaperClientError(Exception):
    """Base of the client's errors; a refused request is a `taper_trtllm.request.RequestError`."""


class ServerUnavailableError(TaperClientError):
    """No server answers; nothing was sent."""


class ModelNotFoundError(TaperClientError):
    """The server does not serve the model."""


class InterruptedRequestError(TaperClientError):
    """A request that was accepted did not end.

    Attributes:
        partial: What had come of it.
    """

    def __init__(self, message: str, partial: Transcript) -> None:
        super().__init__(message)
        self.partial = partial


class DeadlineExceededError(InterruptedRequestError):
    """`deadline_s` was over; the request is cancelled."""


class RequestCancelledError(InterruptedRequestError):
    """The client cancelled the request and then asked for its result."""


class ConnectionLostError(InterruptedRequestError):
    """The connection broke after the request was sent, which is therefore not sent again."""


class RequestFailedError(InterruptedRequestError):
    """The server could not finish the request; the message is the server's."""
