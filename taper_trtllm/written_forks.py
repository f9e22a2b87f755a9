"""Forks that the model writes itself, of one request: budgets, limits, and the text of joins. Pure.

Outputs may not depend on the schedule, so nothing is drawn from a common pot while branches run:
what is left of a branch when it forks is divided there and then, and what its children did not use
is its own again at the join. In that account stands everything that is appended to the prompt,
headers and closing texts too, so a request never needs more memory than `max_tokens` says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from taper_trtllm.fork_format import BoundForkFormat, Refusal, choose_branches
from taper_trtllm.request import (
    Branch,
    JoinMode,
    ParallelStage,
    RequestLimits,
    SerialStage,
)
from taper_trtllm.tag_scanner import Sighting, TagScanner


@dataclass(slots=True)
class WrittenBranch:
    """What the model's own structure says about one branch.

    Attributes:
        depth: Parallel stages around it.
        max_tokens: Most tokens of its own: header, decoded, joined and closing ones.
        max_critical_tokens: Most decoded tokens on its longest path; None for no limit.
        max_leaves: Most leaves at a time that it may become.
        outline_id: Its number in the outline; None for the request itself.
        scanner: Looks for tags in the serial stage that runs.
        tail: Text behind the tag that ended its last stage, inside the same token.
        is_closed: It ended by its own tag.
        has_end_token: It ended by the model's end token, which the join leaves out.
        num_forks: That it has made.
        children: Of the running parallel stage.
    """

    depth: int
    max_tokens: int
    max_critical_tokens: int | None
    max_leaves: int
    outline_id: str | None = None
    scanner: TagScanner | None = None
    tail: str = ""
    is_closed: bool = False
    has_end_token: bool = False
    num_forks: int = 0
    children: tuple[WrittenBranch, ...] = ()

    @property
    def end_tail(self) -> str:
        """Text behind its end tag, inside the same token."""
        return self.tail if self.is_closed else ""

    def num_tokens_left(self, num_tokens: int, num_critical: int) -> int:
        """Tokens that it may still decode by itself, of so many."""
        left = self.max_tokens - num_tokens
        if self.max_critical_tokens is None:
            return left
        return min(left, self.max_critical_tokens - num_critical)

    def look(self, token_ids: Sequence[int]) -> Sighting | None:
        """Looks at new tokens of its serial stage.

        Raises:
            ValueError: Tokens follow a tag that they may not follow.
        """
        assert self.scanner is not None
        for index, token_id in enumerate(token_ids):
            sighting = self.scanner.push(token_id)
            if sighting is not None:
                if index + 1 < len(token_ids):
                    raise ValueError("a branch got tokens beyond a tag")
                return sighting
        return None


class WrittenForks:
    """Forks of one request.

    Args:
        bound_format: What the model writes.
        max_tokens: Of the request: all that is appended to its prompt.
        limits: What a request may ask for; the format's own limits hold too.
    """

    def __init__(
        self, bound_format: BoundForkFormat, max_tokens: int, limits: RequestLimits
    ) -> None:
        own = bound_format.format.limits
        self._bound = bound_format
        self._max_tokens = max_tokens
        self._max_leaves = limits.max_leaves
        self._max_depth = min(own.max_depth, limits.max_depth)
        self._max_branches = min(own.max_branches, limits.max_fan_out)
        self._limits = own

    @property
    def tag_ids(self) -> frozenset[int]:
        """Token ids that can end a stage; none where tags are text."""
        return self._bound.tag_ids or frozenset()

    def is_trained_with(self, join_mode: JoinMode) -> bool:
        """Whether models of this format were trained with such joins."""
        return self._bound.format.trained_join == join_mode

    def root(self) -> WrittenBranch:
        """The request itself."""
        max_critical_tokens = self._limits.max_critical_tokens
        return WrittenBranch(0, self._max_tokens, max_critical_tokens, self._max_leaves)

    def begin_stage(self, branch: WrittenBranch) -> None:
        """A serial stage of a branch begins: nothing before it counts."""
        branch.scanner = self._bound.scanner(
            is_branch=branch.depth > 0, may_fork=branch.depth < self._max_depth
        )

    def close(self, branch: WrittenBranch, sighting: Sighting) -> None:
        """The branch ended by its tag."""
        branch.is_closed = True
        branch.tail = sighting.tail

    def fork(
        self,
        branch: WrittenBranch,
        sighting: Sighting,
        num_tokens: int,
        num_critical: int,
    ) -> tuple[ParallelStage, SerialStage] | Refusal:
        """Divides what is left of a branch among the branches that it wrote and itself.

        Args:
            branch: Who forks.
            sighting: The trigger, with the outline.
            num_tokens: Tokens of its own so far, the trigger included.
            num_critical: Of them, those on its longest path of decoded ones.

        Returns:
            The stages to come, or why there are none: the parallel one, whose join text is known at
            the join only, and the serial one after it, with the least that it may decode.
        """
        max_branches = min(self._max_branches, branch.max_leaves)
        chosen = choose_branches(self._bound.format, sighting.outline_ids, max_branches)
        if isinstance(chosen, Refusal):
            return chosen
        if branch.num_forks >= self._limits.max_rounds:
            return Refusal("too_many_rounds", finish=False)
        headers = [self._bound.branch_header_ids(i, sighting.tail) for i in chosen]
        num_given = self._num_given_tokens(chosen, headers)
        share = (branch.max_tokens - num_tokens - num_given) // (len(chosen) + 1)
        share = min(share, self._limits.max_branch_tokens or share)
        max_critical = branch.max_critical_tokens
        if max_critical is not None:  # one token is left for the branch itself
            share = min(share, max_critical - num_critical - 1)
        if share < 1:
            return Refusal("no_budget", finish=False)
        branch.num_forks += 1
        branch.tail = sighting.tail
        branch.children = tuple(
            WrittenBranch(
                depth=branch.depth + 1,
                max_tokens=len(header) + share,
                max_critical_tokens=max_critical and max_critical - num_critical - 1,
                max_leaves=branch.max_leaves // len(chosen),
                outline_id=outline_id,
            )
            for outline_id, header in zip(chosen, headers, strict=True)
        )
        left = branch.max_tokens - num_tokens - num_given - share * len(chosen)
        branches = tuple(Branch(header_ids=tuple(h), max_tokens=share) for h in headers)
        return ParallelStage(branches=branches), SerialStage(max_tokens=left)

    def join(
        self, branch: WrittenBranch, texts: Sequence[Sequence[int]], *, takes_first: bool
    ) -> tuple[list[int], tuple[int, ...]]:
        """What a branch goes on with when its children have ended.

        Args:
            branch: Whose children.
            texts: What each of them wrote behind its header.
            takes_first: The first child's header and text are there already.

        Returns:
            All tokens to append, and those at their end that are the join text.
        """
        bound, tail = self._bound, branch.tail
        suffix: list[int] = []
        for index, (child, text) in enumerate(zip(branch.children, texts, strict=True)):
            assert child.outline_id is not None
            if index > 0 or not takes_first:
                header_ids = bound.joined_header_ids if index > 0 else bound.branch_header_ids
                suffix += (*header_ids(child.outline_id, tail), *text)
            suffix += self.closing_ids(child)
            tail = child.end_tail
        join_ids = tuple(bound.join_ids(tail))
        branch.children = ()
        return [*suffix, *join_ids], join_ids

    def closing_ids(self, branch: WrittenBranch) -> tuple[int, ...]:
        """The text that a branch is given which ended without its tag."""
        return () if branch.is_closed else self._bound.forced_close_ids()

    def merge(self, branch: WrittenBranch) -> tuple[int, ...]:
        """The join text behind children that stand there as they are, headers included."""
        tail = branch.children[-1].end_tail
        branch.children = ()
        return self._bound.join_ids(tail) or self._bound.join_ids()  # there is always one

    def _num_given_tokens(
        self, outline_ids: Sequence[str], headers: Sequence[Sequence[int]]
    ) -> int:
        """Most tokens that headers, closing texts and the join text of a fork can have.

        What precedes a header in the joined text is not known yet, so its tokens are bounded by its
        bytes: no token is less than one, but for a space that some tokenizers put in front.
        """
        form = self._bound.format
        joined = _num_bytes(form.separator_next + form.branch_header)
        closed = len(self._bound.forced_close_ids())
        return _num_bytes(form.join_text) + sum(
            max(len(header), joined + _num_bytes(outline_id)) + closed
            for outline_id, header in zip(outline_ids, headers, strict=True)
        )


def _num_bytes(text: str) -> int:
    return len(text.encode()) + 1
