"""A request that runs: its tree of branches bound to the engine's sequences and to its clocks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from taper_trtllm.engines.base import Engine, SequenceId, SequenceParams
from taper_trtllm.fork_join import (
    BranchNode,
    BranchStatus,
    DoneEvent,
    ForkJoinState,
    JoinEvent,
    TokenEvent,
)
from taper_trtllm.output import BranchOutput, RequestMetrics, RequestOutput
from taper_trtllm.request import ForkJoinRequest, max_live_leaves
from taper_trtllm.slo import SlackTracker

OutputCallback = Callable[[RequestOutput], None]


@dataclass(slots=True, eq=False)
class LiveSequence:
    """One branch's sequence on the engine.

    Attributes:
        sequence_id: The engine's id.
        node: The branch.
        num_shared_tokens: Tokens it took over from its parent by reference.
        last_advanced: Step in which it last got a token.
    """

    sequence_id: SequenceId
    node: BranchNode
    num_shared_tokens: int
    last_advanced: int


@dataclass(frozen=True, slots=True)
class PrefillNeed:
    """Pending tokens of a sequence that must be computed before its branch can go on."""

    sequence: LiveSequence
    num_tokens: int
    sample: bool


class LiveRequest:
    """One started request.

    Attributes:
        request: What the client asked for.
        family: The engine's family id; also the arrival order.
        num_reserved_blocks: KV blocks reserved for it.
        stage_width: Width granted in the first step after the last fork or join; 0 before it.
        protected: The branch that this step protects; set by the planner.
    """

    def __init__(
        self,
        request: ForkJoinRequest,
        family: int,
        num_reserved_blocks: int,
        tracker: SlackTracker,
        on_output: OutputCallback,
        arrival_s: float,
    ) -> None:
        self.request = request
        self.family = family
        self.num_reserved_blocks = num_reserved_blocks
        self.tracker = tracker
        self.on_output = on_output
        self.arrival_s = arrival_s
        self.state = ForkJoinState(request)
        self.stage_width = 0
        self.protected: BranchNode | None = None
        self._max_live_leaves = max_live_leaves(request.program)
        self._sequences: dict[BranchNode, LiveSequence] = {}
        self._unforked: list[BranchNode] = []  # waiting branches whose children were dropped
        # Accounting for RequestMetrics.
        self.first_scheduled_s: float | None = None
        self._join_began_s: float | None = None
        self._join_wait_s = 0.0
        self._num_forks = 0
        self._num_reused_tokens = 0
        self._num_reused_blocks = 0
        self._num_recomputed_tokens = 0
        self._num_joined_tokens = 0
        self._num_deferred = 0
        self._num_decode_steps = 0
        self._num_advanced = 0

    # --------------------------------------------------------------------------- sequences

    @property
    def is_running(self) -> bool:
        """It has sequences on the engine; False while it is queued or suspended."""
        return bool(self._sequences)

    @property
    def has_started_decoding(self) -> bool:
        """Its first token was produced."""
        return self.tracker.first_token_s is not None

    def start(self, engine: Engine, next_id: Callable[[], SequenceId], step: int) -> None:
        """Registers the root; after a suspension with all the text it has."""
        root = self.state.root
        sequence = LiveSequence(next_id(), root, 0, step)
        tokens = (*self.request.input_ids, *root.tokens)
        engine.add_sequence(sequence.sequence_id, self.family, tokens, self._params(root))
        self._sequences[root] = sequence
        if root.status is BranchStatus.WAITING:
            self._unforked.append(root)

    def fork_where_ready(
        self, engine: Engine, next_id: Callable[[], SequenceId], step: int
    ) -> None:
        """Forks every branch whose prefix is computed; nested forks follow at once."""
        progress = True
        while progress:
            progress = False
            for node in [*self._unforked, *self._forking()]:
                sequence = self._sequences.get(node)
                if sequence is None:
                    continue
                computed = engine.num_computed_tokens(sequence.sequence_id)
                if computed >= node.num_fork_tokens:
                    self._fork(engine, node, next_id, step)
                    progress = True

    def _forking(self) -> list[BranchNode]:
        return [leaf for leaf in self.state.leaves if leaf.status is BranchStatus.FORKING]

    def _fork(
        self, engine: Engine, node: BranchNode, next_id: Callable[[], SequenceId], step: int
    ) -> None:
        shared = node.num_fork_tokens
        if node.status is BranchStatus.FORKING:
            self.state.fork(node)
            self._num_forks += 1
            self._num_reused_tokens += shared * len(node.children)
            self._num_reused_blocks += (
                shared // engine.capabilities.tokens_per_block * len(node.children)
            )
            self.stage_width = 0
        else:
            self._unforked.remove(node)
        for child in node.children:
            if child.status is not BranchStatus.DONE or child.index == 0:
                self._add_child(engine, child, shared, next_id, step)

    def _add_child(
        self,
        engine: Engine,
        child: BranchNode,
        num_shared: int,
        next_id: Callable[[], SequenceId],
        step: int,
    ) -> None:
        assert child.parent is not None
        sequence = LiveSequence(next_id(), child, num_shared, step)
        engine.fork_sequence(
            self._sequences[child.parent].sequence_id,
            sequence.sequence_id,
            num_shared,
            child.tokens,
            self._params(child),
        )
        self._sequences[child] = sequence
        if child.status is BranchStatus.WAITING:
            self._unforked.append(child)

    def _params(self, node: BranchNode) -> SequenceParams:
        """Each branch draws from a seed of its own, so equal branches differ."""
        seed = f"{self.request.sampling.seed}/{node.path}".encode()
        digest = hashlib.blake2b(seed, digest_size=8).digest()
        return SequenceParams(self.request.sampling, int.from_bytes(digest, "little") >> 1)

    def ready_sequences(self, engine: Engine) -> list[LiveSequence]:
        """Leaves that decode in their next step, in program order."""
        ready = []
        for leaf in self.state.leaves:
            sequence = self._sequences.get(leaf)
            if (
                sequence is not None
                and leaf.status is BranchStatus.DECODING
                and self._num_pending(engine, sequence) == 1
            ):
                ready.append(sequence)
        return ready

    def prefill_needs(self, engine: Engine, max_width: int | None) -> list[PrefillNeed]:
        """What must be computed before branches can decode or fork, in program order.

        The order is stable over steps: whoever protects the first need sees it through.
        """
        needs: dict[BranchNode, PrefillNeed] = {}
        for leaf in self.state.leaves[:max_width]:
            node = leaf
            while node not in self._sequences:  # dropped: its parent must be forked again first
                assert node.parent is not None
                node = node.parent
            need = self._need(engine, node)
            if need is not None:
                needs[node] = need
        return list(needs.values())

    def _need(self, engine: Engine, node: BranchNode) -> PrefillNeed | None:
        sequence = self._sequences[node]
        if node.status is BranchStatus.DECODING:
            pending = self._num_pending(engine, sequence)
            return PrefillNeed(sequence, pending, sample=True) if pending > 1 else None
        missing = node.num_fork_tokens - engine.num_computed_tokens(sequence.sequence_id)
        return PrefillNeed(sequence, missing, sample=False) if missing > 0 else None

    @staticmethod
    def _num_pending(engine: Engine, sequence: LiveSequence) -> int:
        return engine.num_tokens(sequence.sequence_id) - engine.num_computed_tokens(
            sequence.sequence_id
        )

    # -------------------------------------------------------------------------- giving back

    def drop_extras(self, engine: Engine) -> Iterator[BranchNode]:
        """Drops, one per item, the subtrees beside the protected branch; last branch first."""
        chain = list(_ancestors(self.protected or self.state.root))
        for node in reversed(chain):
            for child in reversed(node.children):
                sequence = self._sequences.get(child)
                if child in chain or sequence is None:
                    continue
                computed = engine.num_computed_tokens(sequence.sequence_id)
                if computed > sequence.num_shared_tokens or child.children:
                    self._drop(engine, child)
                    yield child

    def _drop(self, engine: Engine, node: BranchNode) -> None:
        """Frees the KV of a subtree; every token is kept."""
        self._count_lost(engine, node)
        for below in node.children:
            self._forget(engine, below)
        if node.status is BranchStatus.WAITING and node not in self._unforked:
            self._unforked.append(node)
        engine.preempt_sequence(self._sequences[node].sequence_id)

    def _count_lost(self, engine: Engine, node: BranchNode) -> None:
        sequence = self._sequences.get(node)
        if sequence is not None:
            computed = engine.num_computed_tokens(sequence.sequence_id)
            self._num_recomputed_tokens += max(0, computed - sequence.num_shared_tokens)
        for below in node.children:
            self._count_lost(engine, below)

    def _forget(self, engine: Engine, node: BranchNode) -> None:
        for below in node.children:
            self._forget(engine, below)
        sequence = self._sequences.pop(node, None)
        if sequence is not None:
            engine.release_sequence(sequence.sequence_id)
        if node in self._unforked:
            self._unforked.remove(node)

    def suspend(self, engine: Engine) -> None:
        """Frees all its KV until it is started again; every token is kept."""
        self._count_lost(engine, self.state.root)
        self.release(engine)

    def release(self, engine: Engine) -> None:
        """Leaves the engine."""
        self._forget(engine, self.state.root)

    # ------------------------------------------------------------------------------ tokens

    def sequences(self) -> Iterator[LiveSequence]:
        """All its sequences."""
        return iter(self._sequences.values())

    def take_tokens(
        self,
        engine: Engine,
        sequence: LiveSequence,
        token_ids: Sequence[int],
        now_s: float,
        step: int,
    ) -> list[BranchOutput]:
        """Advances one branch and carries out what follows from it."""
        sequence.last_advanced = step
        outputs = []
        for event in self.state.advance(sequence.node, token_ids):
            if isinstance(event, TokenEvent):
                outputs.append(self._record(event, now_s))
            elif isinstance(event, DoneEvent):
                if event.node.index != 0:  # branch 0 is taken over by the join
                    self._forget(engine, event.node)
            else:
                self._join(engine, event, now_s, step)
        return outputs

    def _record(self, event: TokenEvent, now_s: float) -> BranchOutput:
        serial = event.node is self.state.root
        self.tracker.record_tokens(now_s, len(event.token_ids), serial)
        self._end_join_wait(now_s)
        if serial and event.finish_reason is not None:
            self.tracker.end_serial_stage()
        return BranchOutput(
            event.node.path, event.stage_index, event.token_ids, event.finish_reason
        )

    def _join(self, engine: Engine, event: JoinEvent, now_s: float, step: int) -> None:
        self.stage_width = 0
        node = event.node
        if node.status is BranchStatus.DONE and (node.parent is None or node.index != 0):
            self._forget(engine, event.first_child)
            return  # nothing follows in this sequence: nothing is computed for it
        parent = self._sequences[node]
        child = self._sequences.pop(event.first_child)
        engine.join_sequence(parent.sequence_id, child.sequence_id, event.suffix_ids)
        parent.last_advanced = step  # it may be ready at once, and has no claim to go first
        self._num_joined_tokens += len(event.suffix_ids)
        if node is self.state.root:
            self._join_began_s = now_s

    def _end_join_wait(self, now_s: float) -> None:
        if self._join_began_s is not None:
            self._join_wait_s += now_s - self._join_began_s
            self._join_began_s = None

    # ------------------------------------------------------------------------- accounting

    def slack_ms(self, now_s: float) -> float:
        """Time to the request's next deadline."""
        return self.tracker.slack_s(now_s) * 1e3

    def is_savable(self, now_s: float, baseline_ms: float) -> bool:
        """Whether its objective can still be met with steps of T0 and branches all abreast."""
        state = self.state
        in_branches = state.num_remaining_tokens - state.num_remaining_serial_tokens
        steps = state.num_remaining_serial_tokens + -(-in_branches // self._max_live_leaves)
        return self.tracker.is_savable(
            now_s,
            baseline_ms / 1e3,
            state.num_remaining_tokens,
            steps,
            state.num_remaining_serial_tokens,
        )

    def count_decode_step(self, num_ready: int, num_advanced: int) -> None:
        """One step in which the request was in decode."""
        self._num_decode_steps += 1
        self._num_advanced += num_advanced
        self._num_deferred += num_ready - num_advanced
        if num_ready > 1 and self.stage_width == 0:
            self.stage_width = num_advanced

    def metrics(self, epoch_s: float) -> RequestMetrics:
        """The final accounting; `epoch_s` turns the monotonic clock into wall-clock time."""
        tracker = self.tracker
        met = self.state.is_finished and tracker.is_met(self.state.root.num_critical)

        def wall_ns(time_s: float | None) -> int | None:
            return None if time_s is None else int((epoch_s + time_s) * 1e9)

        return RequestMetrics(
            num_prompt_tokens=len(self.request.input_ids),
            num_output_tokens=self.state.num_output_tokens,
            arrival_time_ns=int((epoch_s + self.arrival_s) * 1e9),
            first_scheduled_time_ns=wall_ns(self.first_scheduled_s),
            first_token_time_ns=wall_ns(tracker.first_token_s),
            last_token_time_ns=wall_ns(tracker.last_token_s),
            ttft_ms=tracker.ttft_ms,
            tpot_ms=tracker.tpot_ms,
            serial_tpot_ms=tracker.serial_tpot_ms,
            join_wait_ms=self._join_wait_s * 1e3,
            num_forks=self._num_forks,
            num_reused_tokens=self._num_reused_tokens,
            num_reused_blocks=self._num_reused_blocks,
            num_recomputed_tokens=self._num_recomputed_tokens,
            num_joined_tokens=self._num_joined_tokens,
            num_deferred_branch_steps=self._num_deferred,
            mean_width=self._num_advanced / max(1, self._num_decode_steps),
            slo_met=met,
        )


def _ancestors(node: BranchNode) -> Iterator[BranchNode]:
    current: BranchNode | None = node
    while current is not None:
        yield current
        current = current.parent
