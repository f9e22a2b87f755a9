"""A request that runs: its tree of branches bound to the engine's sequences and to its clocks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import compress, takewhile

import numpy as np

from taper_trtllm.batch import IntArray
from taper_trtllm.engines.base import SequenceParams
from taper_trtllm.fork_join import (
    BranchNode,
    BranchStatus,
    CloseEvent,
    DoneEvent,
    Event,
    ForkJoinState,
    JoinEvent,
    RefusedForkEvent,
    TokenEvent,
)
from taper_trtllm.output import BranchOutput, RequestMetrics, RequestOutput
from taper_trtllm.request import ForkJoinRequest, SamplingParams
from taper_trtllm.request_account import RequestAccount
from taper_trtllm.sequence_table import LiveSequence, NewTokens, SequenceTable
from taper_trtllm.slo import SlackTracker
from taper_trtllm.written_forks import WrittenForks

OutputCallback = Callable[[RequestOutput], None]


@dataclass(frozen=True, slots=True)
class PrefillNeed:
    """Pending tokens of a sequence that must be computed before its branch can go on.

    Attributes:
        sequence: Whose.
        num_tokens: Pending.
        sample: The last of them yields a token.
        is_prompt: They are the prompt, before the request has any text of its own.
    """

    sequence: LiveSequence
    num_tokens: int
    sample: bool
    is_prompt: bool


class LiveRequest:
    """One request from its intake on, queued, started or suspended.

    Args:
        max_width: Leaves that may be started at a time (`AdmissionPolicy.max_width`).
        written: The forks that the model writes, if it does.

    Attributes:
        request: What the client asked for.
        family: The engine's family id; also the arrival order.
        num_reserved_blocks: KV blocks reserved for it.
        ready_rows: [L] rows of the leaves that decode in their next step, in program order.
        ready_paths: Their branch paths.
        prefill_needs: What must be computed before other branches can decode or fork, in program
            order. It is stable over steps: whoever protects the first need sees it through.
        stage_width: Width granted in the first step after the last fork or join; 0 before it.
        protected: The sequence that this step protects; set by the planner.
        num_protected_tokens: Tokens of its prefill that it has blocks for, if that is a prefill.
        account: What it took so far.
    """

    def __init__(
        self,
        request: ForkJoinRequest,
        family: int,
        num_reserved_blocks: int,
        tracker: SlackTracker,
        on_output: OutputCallback,
        arrival_s: float,
        max_width: int | None = None,
        written: WrittenForks | None = None,
    ) -> None:
        self.request = request
        self.family = family
        self.num_reserved_blocks = num_reserved_blocks
        self.tracker = tracker
        self.on_output = on_output
        self.account = RequestAccount(arrival_s)
        self.state = ForkJoinState(request, written)
        self.ready_rows: IntArray = np.zeros(0, dtype=np.int64)
        self.ready_paths: tuple[str, ...] = ()
        self.prefill_needs: tuple[PrefillNeed, ...] = ()
        self.stage_width = 0
        self.protected: LiveSequence | None = None
        self.num_protected_tokens = 0
        self._max_width = max_width
        self._written = written
        self._sampling = _stopping_at_tags(request.sampling, written)
        self._merges = request.join_mode == "kv_merge"
        self._sequences: dict[BranchNode, LiveSequence] = {}
        self._unforked: list[BranchNode] = []  # waiting branches whose children were dropped
        self._events: list[BranchOutput] = []  # what happened since the last tokens

    # --------------------------------------------------------------------------- sequences

    @property
    def has_started_decoding(self) -> bool:
        """Its first token was produced."""
        return self.tracker.first_token_s is not None

    @property
    def num_prompt_tokens_left(self) -> int:
        """Tokens of its prompt that its first token waits for, as of the last survey."""
        if self.has_started_decoding:
            return 0
        if self.prefill_needs:
            return self.prefill_needs[0].num_tokens
        return len(self.request.input_ids)

    @property
    def has_one_leaf(self) -> bool:
        """Nothing of it runs beside its only leaf."""
        return len(self.state.leaves) == 1

    def start(self, sequences: SequenceTable) -> None:
        """Registers the root; after a suspension with all the text it has."""
        root = self.state.root
        tokens = (*self.request.input_ids, *root.tokens)
        self._sequences[root] = sequences.add(root, self.family, tokens, self._params(root))
        if root.status is BranchStatus.WAITING:
            self._unforked.append(root)

    def fork_and_close_where_ready(self, sequences: SequenceTable) -> None:
        """Forks and closes every branch whose tokens are computed; what follows, at once."""
        progress = True
        while progress:
            progress = False
            for node in [*self._unforked, *self._leaves(BranchStatus.FORKING)]:
                sequence = self._sequences.get(node)
                if sequence and sequences.num_computed(sequence) >= node.num_fork_tokens:
                    self._fork(sequences, node)
                    progress = True
            for node in self._leaves(BranchStatus.CLOSING):
                sequence = self._sequences.get(node)
                if sequence and sequences.num_pending(sequence) == 0:
                    self._close(sequences, node)
                    progress = True

    def _leaves(self, status: BranchStatus) -> list[BranchNode]:
        return [leaf for leaf in self.state.leaves if leaf.status is status]

    def _close(self, sequences: SequenceTable, node: BranchNode) -> None:
        since_s = self.tracker.last_token_s  # a join that follows was waited for since then
        assert since_s is not None
        self._events += self._carry_out(sequences, self.state.close(node), since_s)

    def _fork(self, sequences: SequenceTable, node: BranchNode) -> None:
        shared = node.num_fork_tokens
        if node.status is BranchStatus.FORKING:
            self._note_fork(node, self.state.fork(node))
            self.account.count_fork(len(node.children), shared, sequences.tokens_per_block)
            self.stage_width = 0
        else:
            self._unforked.remove(node)
        parent = self._sequences[node]
        for child in node.children:
            if child.status is not BranchStatus.DONE or child.is_taken_over:
                self._sequences[child] = sequences.fork(parent, child, shared, self._params(child))
                if child.status is BranchStatus.WAITING:
                    self._unforked.append(child)

    def _params(self, node: BranchNode) -> SequenceParams:
        """Each branch draws from a seed of its own, so equal branches differ."""
        seed = f"{self.request.sampling.seed}/{node.path}".encode()
        digest = hashlib.blake2b(seed, digest_size=8).digest()
        return SequenceParams(
            self._sampling, int.from_bytes(digest, "little") >> 1, self.request.cache_salt_id
        )

    def _note_fork(self, node: BranchNode, children: Iterable[BranchNode]) -> None:
        if self.request.events:
            self._events.append(BranchOutput(node.path, node.stage_index, event="stage_started"))
            self._events += [
                BranchOutput(child.path, 0, tuple(child.tokens), event="branch_started")
                for child in children
            ]

    def survey(self, sequences: SequenceTable) -> None:
        """Lists anew which leaves are ready and what must be prefilled; due after every change.

        Args:
            sequences: The table, refreshed.
        """
        decoding = [
            sequence
            for leaf in self.state.leaves
            if leaf.status is BranchStatus.DECODING
            and (sequence := self._sequences.get(leaf)) is not None
        ]
        rows = np.array([sequence.row for sequence in decoding], dtype=np.int64)
        columns = sequences.rows(rows)
        is_ready = columns["num_tokens"] - columns["num_computed"] == 1
        self.ready_rows = rows[is_ready]
        self.ready_paths = tuple(compress((s.node.path for s in decoding), is_ready.tolist()))
        self.prefill_needs = tuple(self._needs(sequences))

    def _needs(self, sequences: SequenceTable) -> Iterator[PrefillNeed]:
        seen: set[BranchNode] = set()
        closing = self._leaves(BranchStatus.CLOSING)
        running = [leaf for leaf in self.state.leaves if leaf.status is not BranchStatus.CLOSING]
        for leaf in [*closing, *running[: self._max_width]]:
            node = leaf
            while node not in self._sequences:  # dropped: its parent must be forked again first
                assert node.parent is not None
                node = node.parent
            if node not in seen:
                seen.add(node)
                yield from self._need(sequences, node)

    def _need(self, sequences: SequenceTable, node: BranchNode) -> Iterator[PrefillNeed]:
        sequence = self._sequences[node]
        num_computed = sequences.num_computed(sequence)
        if node.status is BranchStatus.DECODING:
            missing, least, sample = sequences.num_pending(sequence), 2, True
        elif node.status is BranchStatus.CLOSING:
            missing, least, sample = sequences.num_pending(sequence), 1, False
        else:
            missing, least, sample = node.num_fork_tokens - num_computed, 1, False
        if missing >= least:
            is_root = node is self.state.root
            is_prompt = is_root and num_computed + missing <= len(self.request.input_ids)
            yield PrefillNeed(sequence, missing, sample, is_prompt)

    # -------------------------------------------------------------------------- giving back

    def drop_extras(self, sequences: SequenceTable) -> Iterator[BranchNode]:
        """Drops, one per item, the subtrees beside the protected branch; last branch first."""
        chain = list(_ancestors(self.protected.node if self.protected else self.state.root))
        for node in reversed(chain):
            for child in reversed(node.children):
                sequence = self._sequences.get(child)
                if child in chain or sequence is None:
                    continue
                computed = sequences.num_computed(sequence)
                is_holding = sequence.sequence_id in sequences.holding
                if computed > sequence.num_shared_tokens or child.children or is_holding:
                    self._drop(sequences, child)
                    yield child

    def _drop(self, sequences: SequenceTable, node: BranchNode) -> None:
        """Frees the KV of a subtree; every token is kept."""
        self._count_lost(sequences, node)
        for below in node.children:
            self._forget(sequences, below)
        if node.status is BranchStatus.WAITING and node not in self._unforked:
            self._unforked.append(node)
        sequences.preempt(self._sequences[node])

    def _count_lost(self, sequences: SequenceTable, node: BranchNode) -> None:
        sequence = self._sequences.get(node)
        if sequence is not None:
            computed = sequences.num_computed(sequence)
            self.account.num_recomputed_tokens += max(0, computed - sequence.num_shared_tokens)
        for below in node.children:
            self._count_lost(sequences, below)

    def _forget(self, sequences: SequenceTable, node: BranchNode) -> None:
        for below in node.children:
            self._forget(sequences, below)
        sequence = self._sequences.pop(node, None)
        if sequence is not None:
            sequences.release(sequence)
        if node in self._unforked:
            self._unforked.remove(node)

    def suspend(self, sequences: SequenceTable) -> None:
        """Frees all its KV until it is started again; every token is kept."""
        self._count_lost(sequences, self.state.root)
        self.release(sequences)

    def release(self, sequences: SequenceTable) -> None:
        """Leaves the engine."""
        self._forget(sequences, self.state.root)

    # ------------------------------------------------------------------------------ tokens

    def sequences(self) -> Iterator[LiveSequence]:
        """All its sequences."""
        return iter(self._sequences.values())

    def take_tokens(
        self, sequences: SequenceTable, taken: NewTokens, now_s: float
    ) -> list[BranchOutput]:
        """Advances branches by their tokens of one step and carries out what follows from it."""
        state = self.state
        num_tokens_before = state.num_output_tokens
        is_serial = taken[0][0].node is state.root  # then there is no other leaf
        self.account.end_join(now_s)
        outputs: list[BranchOutput] = []
        for sequence, token_ids in taken:
            node = sequence.node
            events = state.advance(node, token_ids)
            if not events:
                outputs.append(BranchOutput(node.path, node.stage_index, token_ids))
            else:
                sequences.touch(sequence)
                outputs += self._carry_out(sequences, events, now_s)
        self.tracker.record_tokens(now_s, state.num_output_tokens - num_tokens_before, is_serial)
        if is_serial and outputs[0].finish_reason is not None:
            self.tracker.end_serial_stage()
        return [*self.take_events(), *outputs] if self._events else outputs

    def cancel_branch(self, sequences: SequenceTable, path: str, now_s: float) -> None:
        """Ends a branch that nobody wants any more; unknown ones are ignored.

        Raises:
            ValueError: The program does not allow it.
        """
        events = self.state.cancel(path)
        self._events += self._carry_out(sequences, events, now_s)

    def take_events(self) -> tuple[BranchOutput, ...]:
        """What happened since the last tokens."""
        events, self._events = tuple(self._events), []
        return events

    def _carry_out(
        self, sequences: SequenceTable, events: Iterable[Event], now_s: float
    ) -> Iterator[BranchOutput]:
        """Does what follows from tokens, and says what the client is to know of it."""
        tells_all = self.request.events
        for event in events:
            if isinstance(event, TokenEvent):
                path, stage_index = event.node.path, event.stage_index
                yield BranchOutput(path, stage_index, event.token_ids, event.finish_reason)
                continue
            if isinstance(event, JoinEvent):
                self._join(sequences, event, now_s)
            elif isinstance(event, DoneEvent) and not self._is_kept(event.node):
                self._forget(sequences, event.node)
            elif isinstance(event, CloseEvent):
                self._begin_closing(sequences, event)
                continue
            if tells_all:
                yield _event_output(event)

    def _is_kept(self, node: BranchNode) -> bool:
        """The join takes its KV over."""
        return node.status is BranchStatus.CLOSING if self._merges else node.is_taken_over

    def _begin_closing(self, sequences: SequenceTable, event: CloseEvent) -> None:
        sequence = self._sequences.get(event.node)
        if sequence is not None and (event.num_dropped or event.suffix_ids):
            sequences.end(sequence, event.num_dropped, event.suffix_ids)

    def _join(self, sequences: SequenceTable, event: JoinEvent, now_s: float) -> None:
        self.stage_width = 0
        node = event.node
        if node in self._unforked:  # its children were dropped, and are not needed any more
            self._unforked.remove(node)
        children = [self._sequences.pop(child, None) for child in event.taken_over]
        parent = self._sequences.get(node)
        is_over = node.status is BranchStatus.DONE and (
            node.parent is None or not self._is_kept(node)
        )
        if parent is None or is_over:  # nothing follows in it, so nothing is computed for it
            for child in filter(None, children):
                sequences.release(child)
            return
        if self._merges:
            self._merge(sequences, parent, children, event)
        else:
            self._concat(sequences, parent, children, event)
        self.account.num_joined_tokens += len(event.suffix_ids)
        if node is self.state.root:
            self.account.begin_join(now_s)

    def _concat(
        self,
        sequences: SequenceTable,
        parent: LiveSequence,
        children: Sequence[LiveSequence | None],
        event: JoinEvent,
    ) -> None:
        """Goes on in the first child's sequence; the other texts are computed behind it."""
        if children and children[0] is not None:
            sequences.join(parent, children[0], event.suffix_ids)
            return
        first = () if event.first_child is None else event.first_child.tokens
        sequences.extend(parent, (*first, *event.suffix_ids), self._params(event.node))

    def _merge(
        self,
        sequences: SequenceTable,
        parent: LiveSequence,
        children: Sequence[LiveSequence | None],
        event: JoinEvent,
    ) -> None:
        """Goes on behind the children's KV, as far as it is there: some may have been dropped."""
        kept = [child for child in takewhile(bool, children) if child is not None]
        for child in children[len(kept) :]:
            if child is not None:
                sequences.release(child)
        rest = [token for child in event.merged[len(kept) :] for token in child.tokens]
        sequences.merge(parent, kept, (*rest, *event.suffix_ids))

    # ---------------------------------------------------------------------------- standing

    @property
    def num_context_tokens(self) -> int:
        """Tokens that one of its sequences reads: the context of its first leaf."""
        return self.state.leaves[0].num_context_tokens

    def is_savable(self, now_s: float, step_ms: float) -> bool:
        """Whether its objective can still be met with such steps, as many abreast as may be."""
        num_tokens = self.state.num_remaining_tokens
        num_serial = self.state.num_remaining_serial_tokens
        most_abreast = self.state.most_leaves
        if self._max_width is not None:
            most_abreast = min(most_abreast, self._max_width)
        num_steps = num_serial - (num_serial - num_tokens) // most_abreast
        return self.tracker.is_savable(now_s, step_ms / 1e3, num_tokens, num_steps, num_serial)

    def count_decode_step(self, num_ready: int, num_advanced: int, is_probe: bool) -> None:
        """One step in which the request was in decode; what a probe grants is no grant."""
        self.account.count_decode_step(num_ready, num_advanced)
        if num_ready > 1 and self.stage_width == 0 and not is_probe:
            self.stage_width = num_advanced

    def metrics(self, epoch_s: float) -> RequestMetrics:
        """The final accounting; `epoch_s` turns the monotonic clock into wall-clock time."""
        return self.account.metrics(self.request, self.state, self.tracker, self._written, epoch_s)


def _stopping_at_tags(sampling: SamplingParams, written: WrittenForks | None) -> SamplingParams:
    """Engines that draw several tokens at a time must stop where the model forks."""
    if written is None or not written.tag_ids:
        return sampling
    stop_ids = tuple({*sampling.stop_token_ids, *written.tag_ids})
    return sampling.model_copy(update={"stop_token_ids": stop_ids})


def _event_output(event: RefusedForkEvent | DoneEvent | JoinEvent) -> BranchOutput:
    """What a client is told of an event that is no tokens."""
    path = event.node.path
    if isinstance(event, JoinEvent):
        return BranchOutput(path, event.stage_index, event.join_ids, event="joined")
    if isinstance(event, RefusedForkEvent):
        return BranchOutput(path, event.stage_index, event=f"fork_refused:{event.reason}")
    stage_index, reason = event.node.stage_index, event.finish_reason
    return BranchOutput(path, stage_index, (), reason, event="branch_finished")


def _ancestors(node: BranchNode) -> Iterator[BranchNode]:
    current: BranchNode | None = node
    while current is not None:
        yield current
        current = current.parent
