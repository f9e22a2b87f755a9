"""The state machine of one request: what is ready, what forks, what joins. Pure.

A request is a tree of branches; the root is the request itself. Every branch walks the stages of
its own program. A branch is a *leaf* while it decodes a serial stage. At a parallel stage it forks
children and waits; when all are done their texts are joined, in order, into its own text, and it
goes on. The caller owns the engine and executes what the machine says (`JoinEvent`, ...).

Where joins merge KV (`ForkJoinRequest.join_mode`), an ended branch remains a leaf until all its
tokens have KV: the last one was only drawn.

The client declares the stages, or the model writes them while it decodes (`written_forks.py`): then
the serial stage in which it wrote a fork ends there, and a parallel and a serial one follow.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

from taper_trtllm.fork_format import Refusal
from taper_trtllm.output import FinishReason
from taper_trtllm.request import (
    ForkJoinRequest,
    ParallelStage,
    SerialStage,
    max_live_leaves,
    max_new_tokens,
)
from taper_trtllm.tag_scanner import Sighting
from taper_trtllm.token_spans import Spans, merged
from taper_trtllm.written_forks import WrittenBranch, WrittenForks


class BranchStatus(Enum):
    """What a branch is doing."""

    DECODING = auto()  # a leaf: in a serial stage
    FORKING = auto()  # at a parallel stage whose children are not forked yet
    WAITING = auto()  # its children run
    CLOSING = auto()  # ended; its last tokens have no KV yet, and the join takes it as it is
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
        written: What the model's own structure says about it; None in declared programs.
        tokens: Its own tokens: header, decoded ones, joined texts of its children.
        stage_index: The stage it is in.
        stage_end: Length of `tokens` at which the current serial stage is full; 0 in no such stage.
        num_given: Of `tokens`, those that nobody decoded: headers and join texts.
        num_off_path: Of `tokens`, those that are not on its longest path of decoded ones.
        spans: Where the tokens of its sequence stand, and what they see.
        children: Of the running parallel stage.
        status: What it is doing.
        is_cancelled: The client does not want it any more: the join goes on without it.
    """

    path: str
    parent: BranchNode | None
    index: int
    program: tuple[SerialStage | ParallelStage, ...]
    num_prefix_tokens: int
    written: WrittenBranch | None = None
    tokens: list[int] = field(default_factory=list)
    stage_index: int = 0
    stage_end: int = 0
    num_given: int = 0
    num_off_path: int = 0
    spans: Spans = ()
    children: tuple[BranchNode, ...] = ()
    status: BranchStatus = BranchStatus.DECODING
    is_cancelled: bool = False

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

    @property
    def is_taken_over(self) -> bool:
        """A join that computes texts anew goes on in its sequence: it follows its parent's."""
        return self.index == 0 and not self.is_cancelled and not self.has_end_token

    @property
    def has_end_token(self) -> bool:
        """Its last token is one that the join leaves out."""
        return self.written is not None and self.written.has_end_token


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """Tokens of a branch that its stage does not go on as usual after."""

    node: BranchNode
    stage_index: int
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None


@dataclass(frozen=True, slots=True)
class RefusedForkEvent:
    """The model wrote a fork that is not carried out; the branch goes on serially, or ends."""

    node: BranchNode
    stage_index: int
    reason: str


@dataclass(frozen=True, slots=True)
class DoneEvent:
    """A branch, not the root, ended. Its KV is of no use any more, unless it is taken over."""

    node: BranchNode
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True)
class CloseEvent:
    """The KV of a branch that ended will be merged: all its tokens need some.

    Attributes:
        node: The branch.
        num_dropped: Of its tokens, those at its end that the join leaves out.
        suffix_ids: The text that it is given to end with.
    """

    node: BranchNode
    num_dropped: int
    suffix_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class JoinEvent:
    """All children of `node` ended.

    Attributes:
        node: Who goes on.
        stage_index: The parallel stage that ended.
        first_child: Whose sequence the node goes on in; None if it goes on in its own.
        merged: Children whose KV the node goes on behind, in order.
        suffix_ids: What it then has to compute: the other texts and the join text.
        join_ids: The join text, the last of them.
    """

    node: BranchNode
    stage_index: int
    first_child: BranchNode | None
    merged: tuple[BranchNode, ...]
    suffix_ids: tuple[int, ...]
    join_ids: tuple[int, ...]

    @property
    def taken_over(self) -> tuple[BranchNode, ...]:
        """Children whose tokens and KV the node goes on behind, in order."""
        return self.merged if self.first_child is None else (self.first_child,)


Event = TokenEvent | RefusedForkEvent | DoneEvent | CloseEvent | JoinEvent


class ForkJoinState:
    """The tree of one request.

    Args:
        request: What the client asked for.
        written: The forks that the model writes; None if the client declared all.

    Attributes:
        root: The request itself.
        leaves: Branches that decode, are about to fork or close, in program order.
        is_finished: The program came to its end.
        num_output_tokens: Tokens decoded so far.
        num_remaining_serial_tokens: Most tokens that serial stages of the root may still decode, as
            far as they are known.
        most_leaves: Most leaves at a time, as far as stages are known.
    """

    def __init__(self, request: ForkJoinRequest, written: WrittenForks | None = None) -> None:
        program = request.program
        self._stop_ids = request.sampling.stop_ids
        self._end_ids = request.sampling.end_ids
        self._written = written
        self._merges = request.join_mode == "kv_merge"
        root = None if written is None else written.root()
        self.root = BranchNode("", None, 0, program, len(request.input_ids), root)
        self.leaves: list[BranchNode] = [self.root]
        self.is_finished = False
        self.num_output_tokens = 0
        self.most_leaves = max_live_leaves(program)
        self._num_output_bound = max_new_tokens(program)
        self.num_remaining_serial_tokens = _num_serial_tokens(program)
        self._enter_stage(self.root)

    @property
    def num_remaining_tokens(self) -> int:
        """Most tokens that may still be decoded."""
        return self._num_output_bound - self.num_output_tokens

    # -------------------------------------------------------------------------------- forks

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
                written=node.written and node.written.children[index],
                tokens=list(branch.header_ids),
                num_given=len(branch.header_ids),
                num_off_path=len(branch.header_ids),
                spans=node.spans,
            )
            for index, branch in enumerate(node.stage.branches)
        )
        node.status = BranchStatus.WAITING
        at = self.leaves.index(node)
        self.leaves[at : at + 1] = node.children
        self.most_leaves = max(self.most_leaves, len(self.leaves))
        for child in node.children:
            self._enter_stage(child)
        return node.children

    def find(self, path: str) -> BranchNode | None:
        """The branch of a path, unless it has ended, or one around it."""
        node = self.root
        while node.path != path:
            below = [c for c in node.children if f"{path}.".startswith(f"{c.path}.")]
            if not below or below[0].status is BranchStatus.DONE:
                return None
            node = below[0]
        return node

    # ------------------------------------------------------------------------------- tokens

    def advance(self, node: BranchNode, token_ids: Sequence[int]) -> Sequence[Event]:
        """Takes tokens that a leaf decoded, in order.

        Returns:
            What follows from them; nothing while the stage just goes on.

        Raises:
            ValueError: The branch does not decode, or got more tokens than its stage has left.
        """
        if node.written is not None:
            sighting = node.written.look(token_ids)
            if sighting is not None:
                return self._end_stage(node, token_ids, sighting)
        if len(node.tokens) + len(token_ids) >= node.stage_end or (
            self._stop_ids and not self._stop_ids.isdisjoint(token_ids)
        ):
            return self._end_stage(node, token_ids, None)
        self._take(node, token_ids)
        return ()

    def _take(self, node: BranchNode, token_ids: Sequence[int]) -> None:
        node.tokens.extend(token_ids)
        self.num_output_tokens += len(token_ids)
        if node is self.root:
            self.num_remaining_serial_tokens -= len(token_ids)

    def _end_stage(
        self, node: BranchNode, token_ids: Sequence[int], sighting: Sighting | None
    ) -> list[Event]:
        """Takes tokens of which the last one ends the stage, or is a tag that could have."""
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
        self._take(node, token_ids)
        reason, refusal = (None, None) if sighting is None else self._heed(node, sighting)
        if reason is None and stopped is not None:
            reason = "stop"
            if node.written is not None:
                node.written.has_end_token = token_ids[-1] in self._end_ids
        elif reason is None and node.num_stage_tokens_left == 0:
            reason = "length"
        events: list[Event] = [TokenEvent(node, stage_index, tuple(token_ids), reason)]
        if refusal is not None:
            events.append(RefusedForkEvent(node, stage_index, refusal.reason))
        if reason is not None:
            self._next_stage(node, reason, events)
        return events

    def _heed(
        self, node: BranchNode, sighting: Sighting
    ) -> tuple[FinishReason | None, Refusal | None]:
        """Why a tag ends the stage, if it does. A fork brings the stages that follow it."""
        assert self._written is not None and node.written is not None
        if sighting.kind == "branch_end":
            self._written.close(node.written, sighting)
            return "stop", None
        fork = self._written.fork(node.written, sighting, len(node.tokens), node.num_critical)
        if isinstance(fork, Refusal):
            return ("stop" if fork.finish else None), fork
        before = node.program[: node.stage_index]
        node.program = (*before, SerialStage(max_tokens=len(node.tokens)), *fork)
        return "fork", None

    # ------------------------------------------------------------------------------- stages

    def _enter_stage(self, node: BranchNode) -> None:
        if isinstance(node.stage, ParallelStage):
            node.status = BranchStatus.FORKING
            node.stage_end = 0
            return
        node.status = BranchStatus.DECODING
        num_tokens = len(node.tokens)
        if self._written is None or node.written is None:
            node.stage_end = num_tokens + node.stage.max_tokens
            return
        self._written.begin_stage(node.written)
        left = node.written.num_tokens_left(num_tokens, node.num_critical)
        node.stage_end = num_tokens + left
        if node is self.root:
            self.num_remaining_serial_tokens = left
            # Given texts have taken their part by now, and end tokens have given theirs back.
            unused = node.written.max_tokens - num_tokens
            self._num_output_bound = self.num_output_tokens + unused

    def _next_stage(self, node: BranchNode, reason: FinishReason, events: list[Event]) -> None:
        if isinstance(node.stage, SerialStage):
            self._forfeit(node)
        if node.stage_index + 1 < len(node.program):
            node.stage_index += 1
            self._enter_stage(node)
        else:
            self._end(node, reason, events)

    def _forfeit(self, node: BranchNode) -> None:
        """What is left of a stage will not be decoded in it any more."""
        if node.written is None:
            self._num_output_bound -= node.num_stage_tokens_left
        if node is self.root:
            ahead = node.program[node.stage_index + 1 :]
            self.num_remaining_serial_tokens = _num_serial_tokens(ahead)

    def _end(self, node: BranchNode, reason: FinishReason, events: list[Event]) -> None:
        node.stage_end = 0
        if node.parent is not None:
            events.append(DoneEvent(node, reason))
            if self._merges and _is_read_on(node):
                events.append(self._begin_closing(node))
                return
        node.status = BranchStatus.DONE
        self.leaves.remove(node)
        if node.parent is not None:
            self._join_if_due(node.parent, events)
            return
        self.is_finished = True
        self._num_output_bound = self.num_output_tokens

    def _begin_closing(self, node: BranchNode) -> CloseEvent:
        num_generated, num_critical = node.num_generated, node.num_critical
        num_dropped = 0
        suffix_ids: tuple[int, ...] = ()
        if self._written is not None and node.written is not None:
            num_dropped = int(node.written.has_end_token)
            node.written.has_end_token = False
            suffix_ids = self._written.closing_ids(node.written)
        node.tokens[len(node.tokens) - num_dropped :] = suffix_ids
        node.num_given = len(node.tokens) - num_generated + num_dropped
        node.num_off_path = len(node.tokens) - num_critical
        node.status = BranchStatus.CLOSING
        return CloseEvent(node, num_dropped, suffix_ids)

    def close(self, node: BranchNode) -> Sequence[Event]:
        """All tokens of a closing branch have KV.

        Returns:
            What follows: the join, if it was the last.
        """
        if node.status is not BranchStatus.CLOSING or node.parent is None:
            raise ValueError(f"branch {node.path!r} is not closing")
        node.status = BranchStatus.DONE
        self.leaves.remove(node)
        events: list[Event] = []
        self._join_if_due(node.parent, events)
        return events

    def _join_if_due(self, node: BranchNode, events: list[Event]) -> None:
        if all(child.status is BranchStatus.DONE for child in node.children):
            self._join(node, events)

    def _join(self, node: BranchNode, events: list[Event]) -> None:
        """All children are done: their texts become the node's own, in order."""
        children = [child for child in node.children if not child.is_cancelled]
        event = self._merge(node, children) if self._merges else self._concat(node, children)
        num_critical = node.num_critical + max((c.num_critical for c in children), default=0)
        num_generated = node.num_generated + sum(
            child.num_generated - child.has_end_token for child in children
        )
        node.tokens.extend(token for child in event.taken_over for token in child.tokens)
        node.tokens.extend(event.suffix_ids)
        node.num_given = len(node.tokens) - num_generated
        node.num_off_path = len(node.tokens) - num_critical
        node.children = ()
        events.append(event)
        self._insert_leaf(node)
        self._next_stage(node, "completed", events)

    def _merge(self, node: BranchNode, children: Sequence[BranchNode]) -> JoinEvent:
        """The children stand behind the node as they are."""
        assert isinstance(node.stage, ParallelStage)
        join_ids = node.stage.join_ids
        if self._written is not None and node.written is not None:
            join_ids = self._written.merge(node.written)
        if children:
            branches = [(child.spans, child.num_context_tokens) for child in children]
            node.spans = merged(node.spans, node.num_context_tokens, branches)
        return JoinEvent(node, node.stage_index, None, tuple(children), join_ids, join_ids)

    def _concat(self, node: BranchNode, children: Sequence[BranchNode]) -> JoinEvent:
        """The first child goes on; the texts of the others follow."""
        first = node.children[0] if node.children[0].is_taken_over else None
        suffix, join_ids = self._suffix(node, children, first)
        return JoinEvent(node, node.stage_index, first, (), tuple(suffix), join_ids)

    def _suffix(
        self, node: BranchNode, children: Sequence[BranchNode], first: BranchNode | None
    ) -> tuple[list[int], tuple[int, ...]]:
        """What the join appends behind `first`, and the join text at its end."""
        assert isinstance(node.stage, ParallelStage)
        if self._written is not None and node.written is not None:
            headers = [len(branch.header_ids) for branch in node.stage.branches]
            texts = [
                child.tokens[header : len(child.tokens) - child.has_end_token]
                for child, header in zip(children, headers, strict=True)
            ]
            return self._written.join(node.written, texts, takes_first=first is not None)
        join_ids = node.stage.join_ids
        suffix = [token for child in children if child is not first for token in child.tokens]
        return [*suffix, *join_ids], join_ids

    def _insert_leaf(self, node: BranchNode) -> None:
        """Puts a joined branch back among the leaves, in program order."""
        key = _order(node)
        at = sum(_order(leaf) < key for leaf in self.leaves)
        self.leaves.insert(at, node)

    # ------------------------------------------------------------------------------- cancel

    def cancel(self, path: str) -> Sequence[Event]:
        """Ends a branch whose text nobody wants; the join goes on without it.

        Returns:
            What follows; nothing if there is no such branch, or it has ended.

        Raises:
            ValueError: The program does not allow it.
        """
        node = self.find(path)
        if node is None:
            return ()
        parent = node.parent
        if parent is None or not _allows_cancel(parent.stage):
            raise ValueError(f"branch {path!r} cannot be cancelled: allow_branch_cancel is not set")
        self._num_output_bound -= sum(_num_tokens_ahead(below) for below in _subtree(node))
        gone = set(_subtree(node))
        self.leaves = [leaf for leaf in self.leaves if leaf not in gone]
        node.status = BranchStatus.DONE
        node.stage_end = 0
        node.is_cancelled = True
        events: list[Event] = [DoneEvent(node, "cancelled")]
        self._join_if_due(parent, events)
        return events


def _num_serial_tokens(program: Sequence[SerialStage | ParallelStage]) -> int:
    return sum(stage.max_tokens for stage in program if isinstance(stage, SerialStage))


def _allows_cancel(stage: SerialStage | ParallelStage) -> bool:
    return isinstance(stage, ParallelStage) and stage.allow_branch_cancel


def _num_tokens_ahead(node: BranchNode) -> int:
    """Most tokens that a branch may still decode, but for children that run."""
    if node.status is BranchStatus.DONE:
        return 0
    rest = node.program[node.stage_index + 1 :]
    if node.status is BranchStatus.FORKING:
        rest = node.program[node.stage_index :]
    left = node.num_stage_tokens_left if node.status is BranchStatus.DECODING else 0
    return left + max_new_tokens(rest)


def _is_read_on(node: BranchNode) -> bool:
    """Something is decoded behind the join that takes its text."""
    parent = node.parent
    return parent is not None and (
        parent.stage_index + 1 < len(parent.program) or _is_read_on(parent)
    )


def _subtree(node: BranchNode) -> Iterator[BranchNode]:
    yield node
    for child in node.children:
        yield from _subtree(child)


def _order(node: BranchNode) -> tuple[int, ...]:
    return tuple(int(part) for part in node.path.split(".")) if node.path else ()
