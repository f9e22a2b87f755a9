"""What happens to a request while it streams, in order."""

from __future__ import annotations

from dataclasses import dataclass

from taper_trtllm.client.results import Generation
from taper_trtllm.output import FinishReason


@dataclass(frozen=True, slots=True)
class _BranchEvent:
    """Common to all but the last.

    Attributes:
        branch_path: Which branch; see `taper_trtllm.output.BranchOutput.branch_path`.
        stage_index: Which stage of its program.
        token_ids: Tokens that are part of the event.
        text: Their text; empty if the prompt came as token ids.
    """

    branch_path: str
    stage_index: int
    token_ids: tuple[int, ...]
    text: str


@dataclass(frozen=True, slots=True)
class Tokens(_BranchEvent):
    """A branch has decoded.

    Attributes:
        finish_reason: Why the serial stage ended with these tokens; None while it goes on.
    """

    finish_reason: FinishReason | None


@dataclass(frozen=True, slots=True)
class Finished:
    """The request has ended; nothing follows."""

    generation: Generation


Event = Tokens | Finished
