"""Runs the commands of a build one after another, and remembers which are done.

A step is done when its command has ended well *and* its result was found whole. Its key covers the
command, the inputs' hashes and all steps before it, so that a changed option, model or version runs
it again. The state file is replaced as a whole after each step.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine_build.commands import Step

STATE_FILE = "state.json"
_TAIL_LINES = 15


class StepError(RuntimeError):
    """A step that failed; the message says which, how, where its log is and how to go on."""


@dataclass(frozen=True)
class CheckedStep:
    """A step with what clears its old result away and what finds faults in the new one."""

    step: Step
    clear: Callable[[], None]
    check: Callable[[], list[str]]


class StepRunner:
    """Runs steps in a work directory that holds their logs and the state file.

    Attributes:
        work_dir: Created if needed.
        say: Receives each line for the user.
    """

    def __init__(self, work_dir: Path, say: Callable[[str], None]) -> None:
        self.work_dir = work_dir
        self.say = say

    def run(
        self, steps: Sequence[CheckedStep], inputs: Mapping[str, Any], *, force: bool
    ) -> list[str]:
        """Runs what is not done.

        Args:
            steps: In order.
            inputs: What the first command depends on beside itself, JSON.
            force: Runs everything.

        Returns:
            Names of the steps that were run.

        Raises:
            StepError: A command failed, or its result has faults; later steps were not run.
        """
        keys = _keys(steps, inputs)
        first = 0 if force else self._num_done(steps, keys)
        for checked in steps[:first]:
            self.say(f"{checked.step.name}: done already by the same command, skipped")
        for checked, key in zip(steps[first:], keys[first:], strict=True):
            self._run(checked)
            self._record(checked.step, key)
        return [checked.step.name for checked in steps[first:]]

    def log_path(self, step: Step) -> Path:
        """Where the output of a step goes."""
        return self.work_dir / f"{step.name}.log"

    def load_state(self) -> dict[str, Any]:
        """The state file; an empty one if there is none, or it cannot be read."""
        try:
            state = json.loads((self.work_dir / STATE_FILE).read_text())
        except (OSError, ValueError):
            return {}
        return state if isinstance(state, dict) else {}

    def save_state(self, **changes: Any) -> None:
        """Replaces entries of the state file."""
        self.work_dir.mkdir(parents=True, exist_ok=True)
        path = self.work_dir / STATE_FILE
        new = path.with_suffix(".new")
        new.write_text(json.dumps({**self.load_state(), **changes}, indent=2) + "\n")
        os.replace(new, path)

    def _num_done(self, steps: Sequence[CheckedStep], keys: Sequence[str]) -> int:
        """Steps up to the last one that is done: it needs none of those before it any more."""
        done = self.load_state().get("steps", {})
        for number in range(len(steps), 0, -1):
            checked = steps[number - 1]
            known = done.get(checked.step.name, {}).get("key") == keys[number - 1]
            if known and not checked.check():
                return number
        return 0

    def _run(self, checked: CheckedStep) -> None:
        step = checked.step
        log = self.log_path(step)
        self.say(f"{step.name}: {shlex.join(step.argv)}")
        self.say(f"{step.name}: output goes to {log}")
        self._record(step, None)  # from here on its old result is not to be trusted
        checked.clear()
        start = time.monotonic()
        with log.open("w") as output:
            output.write(f"$ {shlex.join(step.argv)}\n")
            output.flush()
            try:
                status = subprocess.run(
                    step.argv, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
                ).returncode
            except OSError as error:
                raise self._error(step, f"could not be started: {error.strerror}") from None
        if status:
            raise self._error(step, f"failed with exit status {status}")
        faults = checked.check()
        if faults:
            raise self._error(step, "ended, but its result is not what was asked for", faults)
        self.say(f"{step.name}: done in {time.monotonic() - start:.0f} s")

    def _record(self, step: Step, key: str | None) -> None:
        """Notes that a step is done; None that it is not."""
        steps = self.load_state().get("steps", {})
        steps.pop(step.name, None)
        if key is not None:
            steps[step.name] = {"key": key, "argv": list(step.argv)}
        self.save_state(steps=steps)

    def _error(self, step: Step, what: str, faults: Sequence[str] = ()) -> StepError:
        log = self.log_path(step)
        tail = log.read_text(errors="replace").splitlines()[1:][-_TAIL_LINES:]
        lines = [
            f"step `{step.name}` {what}",
            *(f"  - {fault}" for fault in faults),
            f"  log: {log}",
            *(["  last lines:"] if tail else []),
            *(f"    {line}" for line in tail),
            "  to resume, run the same command again: steps that are done are skipped",
        ]
        return StepError("\n".join(lines))


def _keys(steps: Sequence[CheckedStep], inputs: Mapping[str, Any]) -> list[str]:
    keys: list[str] = []
    for checked in steps:
        before: Any = keys[-1] if keys else inputs
        text = json.dumps([before, checked.step.argv], sort_keys=True)
        keys.append(hashlib.sha256(text.encode()).hexdigest())
    return keys
