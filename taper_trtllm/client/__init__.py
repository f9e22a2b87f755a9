"""Client of the server: typed requests, fork-join programs, events as they happen.

Needs the extra ``client``. `AsyncTaperClient` does all the work; `TaperClient` drives it on an
event loop in a thread of its own.
"""

from taper_trtllm.client.aio import AsyncForkJoin, AsyncTaperClient
from taper_trtllm.client.errors import (
    ConnectionLostError,
    DeadlineExceededError,
    InterruptedRequestError,
    ModelNotFoundError,
    RequestCancelledError,
    RequestFailedError,
    ServerUnavailableError,
    TaperClientError,
)
from taper_trtllm.client.events import (
    BranchFinished,
    BranchStarted,
    Event,
    Finished,
    ForkRefused,
    Joined,
    StageStarted,
    Tokens,
)
from taper_trtllm.client.program import BranchProgram, RequestOptions, branch
from taper_trtllm.client.results import BranchResult, Generation, StageResult, Transcript
from taper_trtllm.client.stream import AsyncStream
from taper_trtllm.client.sync import ForkJoin, Stream, TaperClient
from taper_trtllm.output import RequestMetrics, StepProgress
from taper_trtllm.request import RequestError

__all__ = [
    "AsyncForkJoin",
    "AsyncStream",
    "AsyncTaperClient",
    "BranchFinished",
    "BranchProgram",
    "BranchResult",
    "BranchStarted",
    "ConnectionLostError",
    "DeadlineExceededError",
    "Event",
    "Finished",
    "ForkJoin",
    "ForkRefused",
    "Generation",
    "InterruptedRequestError",
    "Joined",
    "ModelNotFoundError",
    "RequestCancelledError",
    "RequestError",
    "RequestFailedError",
    "RequestMetrics",
    "RequestOptions",
    "ServerUnavailableError",
    "StageResult",
    "StageStarted",
    "StepProgress",
    "Stream",
    "TaperClient",
    "TaperClientError",
    "Tokens",
    "Transcript",
    "branch",
]
