"""Ready-made programs: best of N, skeleton first, map and reduce, tree search.

All are a few lines over `TaperClient.fork_join`, to be used or to be copied.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from taper_trtllm.client.events import Tokens
from taper_trtllm.client.program import (
    BranchProgram,
    RequestOptions,
    TextOrIds,
    branch,
)
from taper_trtllm.client.results import BranchResult, Generation
from taper_trtllm.client.sync import TaperClient
from taper_trtllm.request import RequestError

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True, slots=True)
class Candidate:
    """One of several answers.

    Attributes:
        score: What the given function said of it.
        result: The answer.
    """

    score: float
    result: BranchResult


def best_of_n(
    client: TaperClient,
    prompt: TextOrIds,
    n: int,
    max_tokens: int,
    *,
    score: Callable[[BranchResult], float],
    **options: Unpack[RequestOptions],
) -> list[Candidate]:
    """Draws `n` answers that share the prompt's KV, and ranks them.

    Give a `temperature`: greedy answers are all the same.

    Args:
        client: Connected client.
        prompt: Text or token ids.
        n: How many.
        max_tokens: Of each.
        score: The higher, the better.
        options: See `RequestOptions`.

    Returns:
        The best first.
    """
    program = client.fork_join(prompt).parallel([branch(max_tokens=max_tokens)] * n)
    branches = program.run(**options).branches
    answers = [branches[f"0.{i}"] for i in range(n)]
    ranked = [Candidate(score(answer), answer) for answer in answers]
    return sorted(ranked, key=lambda candidate: candidate.score, reverse=True)


@dataclass(frozen=True, slots=True)
class Expansion:
    """A skeleton and what became of it.

    Attributes:
        plan: The first request.
        points: What was read from its text.
        expanded: The second request; branch ``0.i`` is about point i. None without points.
    """

    plan: Generation
    points: tuple[str, ...]
    expanded: Generation | None


def numbered_points(text: str) -> list[str]:
    """Points of a list such as ``1. this`` or ``2) that``, one a line."""
    return [
        match.strip() for match in re.findall(r"^[ \t]*\d+[.)][ \t]*(\S.*)$", text, re.MULTILINE)
    ]


def skeleton_then_expand(
    client: TaperClient,
    prompt: str,
    *,
    plan_tokens: int,
    point_tokens: int,
    parse_points: Callable[[str], Sequence[str]] = numbered_points,
    header: str = "\n\n{point}\n",
    **options: Unpack[RequestOptions],
) -> Expansion:
    """Has a plan written, then all of its points expanded in parallel.

    These are two requests, because the client reads the plan. The second one begins with prompt
    and plan as text; their KV is computed again unless the engine shares KV between requests
    (compiled engines do, the embedded one does not). A model that writes its own forks needs one
    request only: ``fork_format``.

    Args:
        client: Connected client.
        prompt: Should ask for a list.
        plan_tokens: At most, of the plan.
        point_tokens: At most, of each expansion.
        parse_points: Reads the points from the plan's text.
        header: What each branch begins with.
        options: See `RequestOptions`.
    """
    plan = client.generate(prompt, plan_tokens, **options)
    points = tuple(parse_points(plan.text))
    if not points:
        return Expansion(plan, points, None)
    branches = [branch(header.format(point=point), point_tokens) for point in points]
    expanded = client.fork_join(prompt + plan.text).parallel(branches).run(**options)
    return Expansion(plan, points, expanded)


def map_reduce(
    client: TaperClient,
    prompt: TextOrIds,
    chunks: Sequence[TextOrIds],
    *,
    map_tokens: int,
    reduce_prompt: TextOrIds,
    reduce_tokens: int,
    **options: Unpack[RequestOptions],
) -> Generation:
    """Works on all chunks in parallel, then on what came of them.

    One request: the chunks are branch headers, so all of them are in the context of the last stage,
    each with its answer.

    Args:
        client: Connected client.
        prompt: Shared by all chunks.
        chunks: One branch each; put the question about the chunk at its end.
        map_tokens: At most, of each branch.
        reduce_prompt: Put behind all branches.
        reduce_tokens: At most, of the last stage, which is the result's `text`.
        options: See `RequestOptions`.
    """
    branches = [branch(chunk, map_tokens) for chunk in chunks]
    program = client.fork_join(prompt).parallel(branches, join=reduce_prompt)
    return program.serial(reduce_tokens).run(**options)


@dataclass(frozen=True, slots=True)
class SearchResult:
    """What a tree search found.

    Attributes:
        best: Path of the best branch that reached the last level.
        text: Text from the root to it; empty if the prompt came as token ids.
        token_ids: Its tokens.
        scores: Last score of every branch that was scored.
        pruned: Branches that were cancelled.
    """

    best: str
    text: str
    token_ids: tuple[int, ...]
    scores: dict[str, float]
    pruned: frozenset[str]


def tree_search(
    client: TaperClient,
    prompt: TextOrIds,
    *,
    width: int,
    depth: int,
    step_tokens: int,
    beam: int,
    score: Callable[[str, Sequence[int]], float],
    score_every: int = 8,
    **options: Unpack[RequestOptions],
) -> SearchResult:
    """Searches a tree of continuations in one request, and prunes it while it decodes.

    Every node decodes `step_tokens` and forks `width` children, `depth` levels deep (at most 3). At
    each level no more than `beam` branches that have a score go on; the worst are cancelled, with
    all that is below them. Which are compared depends on who decodes first, so two runs may differ.

    Args:
        client: Connected client.
        prompt: Text or token ids.
        width: Children of a node.
        depth: Levels.
        step_tokens: Tokens of a node.
        beam: Branches of a level that are kept.
        score: Of the text and the token ids from the root to the branch; the higher, the better.
        score_every: A branch is scored whenever it has decoded so many tokens, and at its end.
        options: See `RequestOptions`; give a `temperature`.

    Raises:
        RequestError: Nothing could be found: `beam` or `depth` is less than one, for example.
    """
    for name, value in (("depth", depth), ("beam", beam)):
        if value < 1:
            raise RequestError(name, f"must be at least 1 (got {value})")
    root = client.fork_join(prompt)
    program = root.parallel(_level(width, depth, step_tokens), allow_branch_cancel=True)
    tree = _SearchTree(beam, score)
    with program.stream(**options) as stream:
        for event in stream:
            if isinstance(event, Tokens) and tree.grow(event, score_every):
                worst = tree.prune(event.branch_path)
                if worst:
                    stream.cancel_branch(*worst)
    return tree.result(depth)


def _level(width: int, depth: int, step_tokens: int) -> list[BranchProgram]:
    node = branch(max_tokens=step_tokens)
    if depth > 1:
        below = _level(width, depth - 1, step_tokens)
        node = node.parallel(below, allow_branch_cancel=True)
    return [node] * width


class _SearchTree:
    """What has been decoded, scored and pruned."""

    def __init__(self, beam: int, score: Callable[[str, Sequence[int]], float]) -> None:
        self._beam = beam
        self._score = score
        self._texts: dict[str, str] = {}
        self._token_ids: dict[str, tuple[int, ...]] = {}
        self._num_scored: dict[str, int] = {}
        self._scores: dict[str, float] = {}
        self._pruned: set[str] = set()

    def grow(self, tokens: Tokens, score_every: int) -> bool:
        """Takes new tokens; True if the branch got a score."""
        path = tokens.branch_path
        self._texts[path] = self._texts.get(path, "") + tokens.text
        self._token_ids[path] = self._token_ids.get(path, ()) + tokens.token_ids
        num_tokens = len(self._token_ids[path])
        num_new = num_tokens - self._num_scored.get(path, 0)
        if num_new < score_every and tokens.finish_reason is None:
            return False
        self._num_scored[path] = num_tokens
        self._scores[path] = self._score(*self._line(path))
        return True

    def prune(self, path: str) -> list[str]:
        """Branches to cancel on the level of `path`: all but the best."""
        level = [p for p in self._scores if len(_line_of(p)) == len(_line_of(path))]
        alive = sorted(filter(self._is_alive, level), key=self._scores.__getitem__, reverse=True)
        worst = alive[self._beam :]
        self._pruned.update(worst)
        return worst

    def result(self, depth: int) -> SearchResult:
        """The best branch of the last level that is left; there always is one."""
        leaves = [p for p in self._scores if len(_line_of(p)) == depth and self._is_alive(p)]
        best = max(leaves, key=self._scores.__getitem__)
        text, token_ids = self._line(best)
        return SearchResult(best, text, token_ids, self._scores, frozenset(self._pruned))

    def _is_alive(self, path: str) -> bool:
        return self._pruned.isdisjoint(_line_of(path))

    def _line(self, path: str) -> tuple[str, tuple[int, ...]]:
        """Text and token ids from the root to a branch."""
        line = [p for p in _line_of(path) if p in self._token_ids]
        text = "".join(self._texts[p] for p in line)
        return text, tuple(token for p in line for token in self._token_ids[p])


def _line_of(path: str) -> list[str]:
    """Paths from the first level to a branch: ``0.1`` and ``0.1.1.0`` for ``0.1.1.0``."""
    parts = path.split(".")
    return [".".join(parts[:end]) for end in range(2, len(parts) + 1, 2)]
