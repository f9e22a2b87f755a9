"""What a request has produced, by branch and stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from taper_trtllm.output import BranchOutput, FinishReason, RequestMetrics


@dataclass(frozen=True, slots=True)
class StageResult:
    """What a branch decoded in one serial stage.

    Attributes:
        stage_index: The stage of the branch's program.
        token_ids: Decoded tokens.
        text: Their text; empty if the prompt came as token ids.
        finish_reason: Why the stage ended; None if it had not.
    """

    stage_index: int
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason | None


@dataclass(frozen=True, slots=True)
class BranchResult:
    """What one branch decoded, its own branches and all headers left out.

    Attributes:
        path: See `taper_trtllm.output.BranchOutput.branch_path`; ``""`` is the request itself.
        stages: Its serial stages that have begun, in order.
    """

    path: str
    stages: tuple[StageResult, ...] = ()

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Tokens of all its stages."""
        return tuple(token for stage in self.stages for token in stage.token_ids)

    @property
    def text(self) -> str:
        """Text of all its stages; empty if the prompt came as token ids."""
        return "".join(stage.text for stage in self.stages)

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why its last stage that has begun ended; None if it had not."""
        return self.stages[-1].finish_reason if self.stages else None


@dataclass(frozen=True, slots=True)
class Transcript:
    """What has come of a request.

    Attributes:
        request_id: Its id.
        branches: By path, in order of their first token; the request itself is always there.
    """

    request_id: str
    branches: Mapping[str, BranchResult]

    @property
    def text(self) -> str:
        """Text of the request's own serial stages: of a plain request, the answer."""
        return self.branches[""].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Tokens of the request's own serial stages."""
        return self.branches[""].token_ids


@dataclass(frozen=True, slots=True)
class Generation(Transcript):
    """A request that has ended.

    Attributes:
        finish_reason: ``completed``, or ``cancelled`` by somebody else.
        metrics: The server's timings and accounting.
    """

    finish_reason: FinishReason
    metrics: RequestMetrics


@dataclass(slots=True)
class _GrowingStage:
    token_ids: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    finish_reason: FinishReason | None = None


class TranscriptBuilder:
    """Gathers the outputs of one request."""

    def __init__(self, request_id: str) -> None:
        self._request_id = request_id
        self._branches: dict[str, dict[int, _GrowingStage]] = {"": {}}

    def add(self, outputs: Sequence[BranchOutput], texts: Sequence[str]) -> None:
        """Adds the outputs of one response and the text of each."""
        for output, text in zip(outputs, texts, strict=True):
            if output.event:  # headers and join texts were not decoded
                continue
            stages = self._branches.setdefault(output.branch_path, {})
            stage = stages.setdefault(output.stage_index, _GrowingStage())
            stage.token_ids += output.token_ids
            stage.texts.append(text)
            stage.finish_reason = output.finish_reason or stage.finish_reason

    def transcript(self) -> Transcript:
        """What there is so far."""
        return Transcript(self._request_id, self._results())

    def generation(self, finish_reason: FinishReason, metrics: RequestMetrics) -> Generation:
        """The ended request."""
        return Generation(self._request_id, self._results(), finish_reason, metrics)

    def _results(self) -> dict[str, BranchResult]:
        return {
            path: BranchResult(
                path,
                tuple(
                    StageResult(i, tuple(s.token_ids), "".join(s.texts), s.finish_reason)
                    for i, s in sorted(stages.items())
                ),
            )
            for path, stages in self._branches.items()
        }
