"""What happens to a request while it streams, in order."""

from __future__ import annotations

from dataclasses import dataclass

from taper_trtllm.client.results import Generation
from taper_trtllm.output import BranchOutput, FinishReason, StepProgress


@dataclass(frozen=True, slots=True)
class BranchEvent:
    """Common to all events but the last.

    Attributes:
        branch_path: Which branch; see `taper_trtllm.output.BranchOutput.branch_path`.
        stage_index: Which stage of its program.
        token_ids: Tokens that the event brings.
        text: Their text; empty if the prompt came as token ids.
        progress: How the request stood after the step; the same object for all events of one
            response.
    """

    branch_path: str
    stage_index: int
    token_ids: tuple[int, ...]
    text: str
    progress: StepProgress | None


@dataclass(frozen=True, slots=True)
class StageStarted(BranchEvent):
    """A branch is about to fork: `stage_index` is a parallel stage."""


@dataclass(frozen=True, slots=True)
class BranchStarted(BranchEvent):
    """A branch begins, with its header as tokens and text."""


@dataclass(frozen=True, slots=True)
class Tokens(BranchEvent):
    """A branch has decoded.

    Attributes:
        finish_reason: Why the serial stage ended with these tokens; None while it goes on.
    """

    finish_reason: FinishReason | None


@dataclass(frozen=True, slots=True)
class BranchFinished(BranchEvent):
    """A branch has ended.

    Attributes:
        finish_reason: Why; ``cancelled`` if the client withdrew it, even after it had ended.
    """

    finish_reason: FinishReason | None


@dataclass(frozen=True, slots=True)
class Joined(BranchEvent):
    """All branches of a parallel stage have ended; the join text as tokens and text."""


@dataclass(frozen=True, slots=True)
class ForkRefused(BranchEvent):
    """The model wrote a fork that does not take place; the branch goes on serially, or ends.

    Attributes:
        reason: Such as ``too_many_branches`` or ``no_budget``.
    """

    reason: str


@dataclass(frozen=True, slots=True)
class Finished:
    """The request has ended; nothing follows."""

    generation: Generation


Event = StageStarted | BranchStarted | Tokens | BranchFinished | Joined | ForkRefused | Finished


def branch_event(output: BranchOutput, text: str, progress: StepProgress | None) -> Event:
    """The event that one entry of a response is.

    Raises:
        ValueError: This client does not know it.
    """
    fields = (output.branch_path, output.stage_index, output.token_ids, text, progress)
    name, _, reason = output.event.partition(":")
    if not name:
        return Tokens(*fields, output.finish_reason)
    if name == "branch_finished":
        return BranchFinished(*fields, output.finish_reason)
    if name == "fork_refused":
        return ForkRefused(*fields, reason)
    if name == "stage_started":
        return StageStarted(*fields)
    if name == "branch_started":
        return BranchStarted(*fields)
    if name == "joined":
        return Joined(*fields)
    raise ValueError(f"unknown event {output.event!r}: the server is newer than this client")
