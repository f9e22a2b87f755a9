"""A picture of a request while it decodes: branches in columns. Needs rich."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from taper_trtllm.client.events import (
    BranchEvent,
    BranchFinished,
    BranchStarted,
    Event,
    Finished,
    ForkRefused,
    Joined,
    StageStarted,
    Tokens,
)
from taper_trtllm.output import StepProgress

_MIN_COLUMN_WIDTH = 24
_LIVE_LINES = 6  # of each text, while the picture is drawn again and again
_BARS = "▁▂▃▄▅▆▇█"


@dataclass(slots=True)
class _Fork:
    """A parallel stage: its branches by index, and the join text once it is over."""

    branches: dict[int, _Branch] = field(default_factory=dict)
    joined: str | None = None


@dataclass(slots=True)
class _Branch:
    """What is known of a branch: text or a fork for each of its stages."""

    header: str = ""
    stages: dict[int, list[str] | _Fork] = field(default_factory=dict)
    num_tokens: int = 0
    finish_reason: str | None = None
    notes: list[str] = field(default_factory=list)

    def fork(self, stage_index: int) -> _Fork:
        stage = self.stages.setdefault(stage_index, _Fork())
        assert isinstance(stage, _Fork)
        return stage

    def texts(self, stage_index: int) -> list[str]:
        stage = self.stages.setdefault(stage_index, [])
        assert isinstance(stage, list)
        return stage


class RequestView:
    """Draws a request from its events; a rich renderable.

    Branches that the last steps advanced have a bright border, those left out a dim one. Below the
    figures stands how many branches advanced, from the first response to the last.

    Attributes:
        is_live: Show the ends of long texts only.
    """

    def __init__(self, prompt: str, *, show_ids: bool = False) -> None:
        """Begins with the prompt.

        Args:
            prompt: Shown above everything.
            show_ids: Show token ids instead of text, such as those of a random model.
        """
        self.is_live = True
        self._prompt = prompt
        self._show_ids = show_ids
        self._root = _Branch()
        self._progress: StepProgress | None = None
        self._widths: list[int] = []
        self._advanced: set[str] = set()
        self._started_s = time.monotonic()
        self._finished: Finished | None = None
        self._elapsed_s = 0.0

    def add(self, event: Event) -> None:
        """Takes the next event."""
        self._elapsed_s = time.monotonic() - self._started_s
        if isinstance(event, Finished):
            self._finished = event
            self._advanced.clear()
            return
        if event.progress is not self._progress:  # another response
            self._progress = event.progress
            self._advanced.clear()
            if event.progress is not None:
                self._widths.append(event.progress.width)
        self._take(event)

    def _take(self, event: BranchEvent) -> None:
        branch = self._branch(event.branch_path)
        match event:
            case StageStarted(stage_index=index):
                branch.fork(index)
            case BranchStarted():
                branch.header = self._shown(event)
            case Tokens(stage_index=index):
                branch.texts(index).append(self._shown(event))
                branch.num_tokens += len(event.token_ids)
                self._advanced.add(event.branch_path)
            case BranchFinished(finish_reason=reason):
                branch.finish_reason = reason or "completed"
            case Joined(stage_index=index):
                branch.fork(index).joined = self._shown(event)
            case ForkRefused(reason=reason):
                branch.notes.append(f"fork refused: {reason}")

    def _branch(self, path: str) -> _Branch:
        branch = self._root
        steps = [int(part) for part in path.split(".")] if path else []
        for stage_index, index in zip(steps[::2], steps[1::2], strict=True):
            branch = branch.fork(stage_index).branches.setdefault(index, _Branch())
        return branch

    def _shown(self, event: BranchEvent) -> str:
        if self._show_ids:
            return "".join(f"{token} " for token in event.token_ids)
        return "".join(c if c.isprintable() or c == "\n" else "·" for c in event.text)

    # ------------------------------------------------------------------------------- drawing

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The picture, as wide as the console."""
        yield self._status()
        yield self._width_bars(options.max_width)
        yield Text(self._prompt, "bold")
        yield from self._stages(self._root, "", options.max_width)

    def _status(self) -> Text:
        parts = [f"{self._elapsed_s:.1f} s"]
        if self._finished is not None:
            metrics = self._finished.generation.metrics
            parts += [
                self._finished.generation.finish_reason,
                f"{metrics.num_output_tokens} tokens",
                f"mean width {metrics.mean_width:.1f}",
                *_milliseconds("TTFT", metrics.ttft_ms),
                *_milliseconds("TPOT", metrics.tpot_ms),
                "SLO met" if metrics.slo_met else "SLO missed",
            ]
        elif self._progress is not None:
            parts += [
                f"width {self._progress.width}",
                f"batch {self._progress.batch_width}",
                *_milliseconds("step", self._progress.step_ms),
                *_milliseconds("slack", self._progress.slack_ms),
            ]
        return Text(" · ".join(parts), "reverse")

    def _width_bars(self, width: int) -> Text:
        """The widths so far, each bar the largest of as many as it stands for."""
        per_bar = max(1, -(-len(self._widths) // width))
        starts = range(0, len(self._widths), per_bar)
        largest = [max(self._widths[start : start + per_bar]) for start in starts]
        scale = (len(_BARS) - 1) / max(1, *self._widths, 1)
        return Text("".join(_BARS[round(bar * scale)] for bar in largest), "cyan")

    def _stages(self, branch: _Branch, path: str, width: int) -> Iterator[RenderableType]:
        for stage_index, stage in sorted(branch.stages.items()):
            if isinstance(stage, list):
                yield Text(self._tail("".join(stage), width), overflow="fold")
                continue
            prefix = f"{path}.{stage_index}" if path else f"{stage_index}"
            yield self._columns(stage, prefix, width)
            if stage.joined:
                yield Text(stage.joined, "dim")
        for note in branch.notes:
            yield Text(note, "yellow")

    def _columns(self, fork: _Fork, prefix: str, width: int) -> Table:
        """The branches side by side, in as many rows as they need."""
        branches = sorted(fork.branches.items())
        per_row = max(1, min(len(branches), width // _MIN_COLUMN_WIDTH))
        table = Table.grid(expand=True)
        for _ in range(per_row):
            table.add_column(ratio=1)
        panels = [self._panel(b, f"{prefix}.{i}", width // per_row) for i, b in branches]
        for start in range(0, len(panels), per_row):
            table.add_row(*panels[start : start + per_row])
        return table

    def _panel(self, branch: _Branch, path: str, width: int) -> Panel:
        parts = [Text(branch.header, "bold")] if branch.header else []
        title = f"{path} · {branch.num_tokens}"
        if branch.finish_reason is not None:
            title += f" · {branch.finish_reason}"
        return Panel(
            Group(*parts, *self._stages(branch, path, width - 4)),
            title=title,
            title_align="left",
            border_style=self._style(branch, path),
        )

    def _style(self, branch: _Branch, path: str) -> str:
        if branch.finish_reason == "cancelled":
            return "red"
        if branch.finish_reason is not None:
            return "green"
        is_advancing = any(f"{a}.".startswith(f"{path}.") for a in self._advanced)
        return "bright_cyan" if is_advancing else "dim"

    def _tail(self, text: str, width: int) -> str:
        limit = _LIVE_LINES * max(width, 1)
        return "…" + text[-limit:] if self.is_live and len(text) > limit else text


def _milliseconds(name: str, value_ms: float | None) -> list[str]:
    return [] if value_ms is None else [f"{name} {value_ms:.1f} ms"]
