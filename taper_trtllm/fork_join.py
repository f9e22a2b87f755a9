"""The state machine of one request: what is ready, what forks, what joins. Pure.

A request is a tree of branches; the root is the request itself. Every branch walks the stages of
its own program. A branch is a *leaf* while it decodes a serial stage. At a parallel stage it forks
children and waits; when all are done their texts are joined, in order, into its own text, and it
goes on. The caller owns the engine and executes what the machine says (`JoinEvent`, ...).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

from taper_trtllm.output import FinishReason
from taper_trtllm.request import (
    ForkJoinRequest,
    ParallelStage,
    SerialStage,
    max_new_tokens,
)


class BranchStatus(Enum):
    """What a branch is doing."""

    DECODING = auto()  # a leaf: in a serial stage
    FORKING = auto()  # at a parallel stage whose children are not forked yet
    WAITING = auto()  # its children run
    DONE = auto()


@dataclass(slots=True, eq=False)
class BranchNode:
    """One branch of the tree.

    Attributes:
        path: See `output.BranchOutput.branch_path`.
        parent: None for the root.
        index: Position among its siblings.
        program: Its stages.
        num_prefix_tokens: Context before its own tokens: the whole context of the parent at fork.
        tokens: Its own tokens: header, decoded ones, joined texts of its children.
        stage_index: The stage it is in.
        stage_end: Length of `tokens` at which the current serial stage is full; 0 in no such stage.
        num_given: Of `tokens`, those that nobody decoded: headers and join texts.
        num_off_path: Of `tokens`, those that are not on its longest path of decoded ones.
        children: Of the running parallel stage.
        status: What it is doing.
    """

    path: str
    parent: BranchNode | None
    index: int
    program: tuple[SerialStage | ParallelStage, ...]
    num_prefix_tokens: int
    tokens: list[int] = field(default_factory=list)
    stage_index: int = 0
    stage_end: int = 0
    num_given: int = 0
    num_off_path: int = 0
    children: tuple[BranchNode, ...] = ()
    status: BranchStatus = BranchStatus.DECODING

    @property
    def num_context_tokens(self) -> int:
        """Tokens of the branch's sequence: prefix and its own."""
        return self.num_prefix_tokens + len(self.tokens)

    @property
    def stage(self) -> SerialStage | ParallelStage:
        """The stage it is in."""
        return self.program[self.stage_index]

    @property
    def num_stage_tokens_left(self) -> int:
        """Tokens that the current serial stage may still decode."""
        return self.stage_end - len(self.tokens)

    @property
    def num_generated(self) -> int:
        """Tokens decoded by this branch and below."""
        return len(self.tokens) - self.num_given

    @property
    def num_critical(self) -> int:
        """Decoded tokens on its longest path."""
        return len(self.tokens) - self.num_off_path

    @property
    def num_fork_tokens(self) -> int:
        """Context tokens that must have KV before children can share it: all but the last.

        The last one has none when a serial stage ends. Each child computes it with its header, or
        draws its first token from it; a step for it alone would hold all of them up.
        """
        return self.num_context_tokens - 1


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """Tokens that count as output of a branch in a stage."""

    node: BranchNode
    stage_index: int
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None


@dataclass(frozen=True, slots=True)
class DoneEvent:
    """A branch, not the root, ended. Its KV is of no use any more, unless it is branch 0."""

    node: BranchNode


@dataclass(frozen=True, slots=True)
class JoinEvent:
    """All children of `node` ended.

    The node takes over `first_child`, whose tokens are contiguous with its own, and then has
    `suffix_ids` (the other texts and the join text) to compute.
    """

    node: BranchNode
    first_child: BranchNode
    suffix_ids: tuple[int, ...]


Event = TokenEvent | DoneEvent | JoinEvent


class ForkJoinState:
    """The tree of one request.

    Attributes:
        root: The request itself.
        leaves: Branches that decode or are about to fork, in program order.
        is_finished: The program came to its end.
        num_output_tokens: Tokens decoded so far.
        num_remaining_serial_tokens: Most tokens that serial stages of the root may still decode.
    """

    def __init__(self, request: ForkJoinRequest) -> None:
        program = request.program
        self._stop_ids = request.sampling.stop_ids
        self.root = BranchNode("", None, 0, program, len(request.input_ids))
        self.leaves: list[BranchNode] = [self.root]
        self.is_finished = False
        self.num_output_tokens = 0
        self._num_output_bound = max_new_tokens(program)
        self.num_remaining_serial_tokens = sum(
            stage.max_tokens for stage in program if isinstance(stage, SerialStage)
        )
        self._enter_stage(self.root)

    @property
    def num_remaining_tokens(self) -> int:
        """Most tokens that may still be decoded."""
        return self._num_output_bound - self.num_output_tokens

    def fork(self, node: BranchNode) -> tuple[BranchNode, ...]:
        """Forks the children of a parallel stage, each with its header as its first tokens."""
        if node.status is not BranchStatus.FORKING:
            raise ValueError(f"branch {node.path!r} is not about to fork")
        assert isinstance(node.stage, ParallelStage)
        prefix = f"{node.path}.{node.stage_index}" if node.path else str(node.stage_index)
        node.children = tuple(
            BranchNode(
                path=f"{prefix}.{index}",
                parent=node,
                index=index,
                program=branch.program,
                num_prefix_tokens=node.num_context_tokens,
                tokens=list(branch.header_ids),
                num_given=len(branch.header_ids),
                num_off_path=len(branch.header_ids),
            )
            for index, branch in enumerate(node.stage.branches)
        )
        node.status = BranchStatus.WAITING
        at = self.leaves.index(node)
        self.leaves[at : at + 1] = node.children
        for child in node.children:
            self._enter_stage(child)
        return node.children

    def append(self, node: BranchNode, token_ids: Sequence[int]) -> bool:
        """Takes tokens that a leaf decoded, if its stage goes on; False if that needs `advance`."""
        num_tokens = len(token_ids)
        if len(node.tokens) + num_tokens >= node.stage_end:
            return False
        if self._stop_ids and not self._stop_ids.isdisjoint(token_ids):
            return False
        node.tokens.extend(token_ids)
        self.num_output_tokens += num_tokens
        if node is self.root:
            self.num_remaining_serial_tokens -= num_tokens
        return True

    def advance(self, node: BranchNode, token_ids: Sequence[int]) -> list[Event]:
        """Takes tokens that a leaf decoded, in order.

        Raises:
            ValueError: The branch does not decode, or got more tokens than its stage has left.
        """
        if node.status is not BranchStatus.DECODING:
            raise ValueError(f"branch {node.path!r} got tokens while it is {node.status.name}")
        if not token_ids:
            return []
        stage_index = node.stage_index
        left = node.num_stage_tokens_left
        stopped = next((i for i, t in enumerate(token_ids) if t in self._stop_ids), None)
        used = left if stopped is None else min(left, stopped + 1)
        if used < len(token_ids):
            raise ValueError(f"branch {node.path!r} got tokens beyond the end of its stage")
        node.tokens.extend(token_ids)
        self.num_output_tokens += len(token_ids)
        if node is self.root:
            self.num_remaining_serial_tokens -= len(token_ids)
        reason: FinishReason | None = None
        if stopped is not None:
            reason = "stop"
        elif node.num_stage_tokens_left == 0:
            reason = "length"
        events: list[Event] = [TokenEvent(node, stage_index, tuple(token_ids), reason)]
        if reason is not None:
            self._forfeit(node)
            self._next_stage(node, events)
        return events

    def _forfeit(self, node: BranchNode) -> None:
        """What is left of a stage will not be decoded any more."""
        self._num_output_bound -= node.num_stage_tokens_left
        if node is self.root:
            self.num_remaining_serial_tokens -= node.num_stage_tokens_left

    def _enter_stage(self, node: BranchNode) -> None:
        if isinstance(node.stage, SerialStage):
            node.status = BranchStatus.DECODING
            node.stage_end = len(node.tokens) + node.stage.max_tokens
        else:
            node.status = BranchStatus.FORKING
            node.stage_end = 0

    def _next_stage(self, node: BranchNode, events: list[Event]) -> None:
        if node.stage_index + 1 < len(node.program):
            node.stage_index += 1
            self._enter_stage(node)
            return
        node.status = BranchStatus.DONE
        node.stage_end = 0
        self.leaves.remove(node)
        if node.parent is None:
            self.is_finished = True
            return
        events.append(DoneEvent(node))
        if all(child.status is BranchStatus.DONE for child in node.parent.children):
            self._join(node.parent, events)

    def _join(self, node: BranchNode, events: list[Event]) -> None:
        """All children are done: their texts become the node's own, in order."""
        assert isinstance(node.stage, ParallelStage)
        first, *others = node.children
        suffix = [token for child in others for token in child.tokens]
        suffix.extend(node.stage.join_ids)
        num_critical = node.num_critical + max(child.num_critical for child in node.children)
        node.tokens.extend(first.tokens)
        node.tokens.extend(suffix)
        node.num_given += len(node.stage.join_ids) + sum(c.num_given for c in node.children)
        node.num_off_path = len(node.tokens) - num_critical
        node.children = ()
        events.append(JoinEvent(node, first, tuple(suffix)))
        self._insert_leaf(node)
        self._next_stage(node, events)

    def _insert_leaf(self, node: BranchNode) -> None:
        """Puts a joined branch back among the leaves, in program order."""
        key = _order(node)
        at = sum(_order(leaf) < key for leaf in self.leaves)
        self.leaves.insert(at, node)


def _order(node: BranchNode) -> tuple[int, ...]:
    return tuple(int(part) for part in node.path.split(".")) if node.path else ()
