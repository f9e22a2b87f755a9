"""Compiled TensorRT-LLM engines behind the `Engine` interface: branches as revocable leases.

TensorRT-LLM's executor iterates by itself and has no hook that picks who enters an iteration. So a
branch enters as an ordinary request whose prompt is its prefix and all of its text so far; block
reuse finds its KV. The request is a *place* in the batch: it lasts for a lease of tokens, and is
taken back by a cancel when a plan leaves the branch out. Both act one iteration late: requests are
fetched right after the responses of step k are published, so whoever reacts to them enters step
k + 2, and a cancel seen during k + 1 still lets that step run, whose token is lost.

The ledger of blocks (`PagedSequences`) is this engine's own: it counts what the branches that it
keeps occupy, parked ones included, and what their places may still take. TensorRT-LLM needs more:
it lets a request in only if its whole prompt fits beside what runs, shared or not, so in a pool of
few prompts' size places wait for others to end. And it has no account of who comes back: the blocks
of what has ended stay findable too, and the oldest go first. If it drops a parked block, the place
computes it again, and `losses` counts it.

Nothing here has been run on TensorRT-LLM itself: names are those of the recorded contract, and
behaviour is tested on `perf.trtllm_fake`.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from taper_trtllm.config import TrtllmEngineConfig
from taper_trtllm.engines.base import (
    EngineCapabilities,
    EngineError,
    IterationAudit,
    OutOfBlocksError,
    PrefillChunk,
    SequenceId,
    SequenceParams,
    StepPlan,
    StepResult,
    WorkerRank,
)
from taper_trtllm.engines.paged_sequences import EngineSequence, PagedSequences
from taper_trtllm.engines.trtllm_audit import Auditor
from taper_trtllm.engines.trtllm_engine_dir import EngineDir, read_engine_dir
from taper_trtllm.engines.trtllm_session import PlaceRequest, TrtllmSession
from taper_trtllm.request import SamplingParams

_POLL_S = 0.05
_SILENT_POLL_S = 0.005
_STATISTICS_S = 0.001  # they are published a moment after the responses of the same turn
_WARM_UP_IDS = [0, 1]


@dataclass(slots=True)
class Place:
    """A sequence's request on the executor.

    Attributes:
        sequence_id: Whose.
        prompt_length: Tokens that it was asked for with.
        max_tokens: Tokens it may draw.
        keeps_tokens: False if it computes a prefix only: a request must draw, so it draws in vain.
        asked_in: Number of the step that asked.
        num_known_tokens: Tokens of the prompt that had KV by the ledger.
        num_tokens: Tokens it has drawn.
        is_prefill: Its first token ends a prefill chunk.
        num_left_out: Plans in a row that did not have it, since its first token.
        is_revoked: It was cancelled; its last word is not there yet.
    """

    sequence_id: SequenceId
    prompt_length: int
    max_tokens: int
    keeps_tokens: bool
    asked_in: int
    num_known_tokens: int
    is_prefill: bool
    num_tokens: int = 0
    num_left_out: int = 0
    is_revoked: bool = False


@dataclass(slots=True)
class Losses:
    """What leases cost, summed over the engine's life.

    Attributes:
        num_tokens: Tokens that branches got.
        num_places: Places that were asked for.
        num_reentries: Of them, those of branches that had one before.
        num_revoked: Places that were taken back.
        num_lost_tokens: Tokens drawn and lost by that.
        num_prefix_steps: Requests that only computed a prefix.
        num_idle_steps: Steps from the plan that gave a branch its place again to the next token,
            beyond the first.
        num_recomputed_tokens: Prompt tokens, in whole blocks, whose KV was gone though the ledger
            has it.
    """

    num_tokens: int = 0
    num_places: int = 0
    num_reentries: int = 0
    num_revoked: int = 0
    num_lost_tokens: int = 0
    num_prefix_steps: int = 0
    num_idle_steps: int = 0
    num_recomputed_tokens: int = 0


@dataclass(slots=True)
class _Outcome:
    """What the responses of one step add up to."""

    tokens: dict[SequenceId, tuple[int, ...]] = field(default_factory=dict)
    prefilled: dict[SequenceId, int] = field(default_factory=dict)
    decoded: list[SequenceId] = field(default_factory=list)
    failed: dict[SequenceId, str] = field(default_factory=dict)
    vacated: set[SequenceId] = field(default_factory=set)


class TrtllmEngine(PagedSequences):
    """Runs plans on a compiled engine.

    Args:
        config: Which engine, and how places are given.
        clock: Seconds, monotonic; another one for engines that run in virtual time.

    Raises:
        ConfigError: The engine or the bindings cannot be used.
        EngineError: The engine does not run.
        WorkerRank: Another rank of the engine leads.
    """

    def __init__(
        self, config: TrtllmEngineConfig, clock: Callable[[], float] | None = None
    ) -> None:
        self._config = config
        self._engine_dir = read_engine_dir(config.engine_dir)
        self._session = TrtllmSession(config, self._engine_dir)
        if not self._session.takes_requests:
            capabilities = _capabilities(config, self._engine_dir, 0, clock is not None)
            raise WorkerRank(capabilities, self._session.shutdown)
        self._clock = clock or time.monotonic
        self._is_lockstep = config.mode == "lockstep"
        self._places: dict[int, Place] = {}  # by the executor's request id
        self._place_of: dict[SequenceId, int] = {}
        self._num_given: dict[SequenceId, int] = {}  # places by sequence, for the records
        self._num_shared: dict[SequenceId, int] = {}
        self._unwanted: set[int] = set()  # requests to cancel after their first token
        self._auditor = Auditor()
        self._step = 0
        self._started_in = 0
        self.losses = Losses()
        try:
            num_blocks = self._num_pool_blocks()
        except Exception:
            self._session.shutdown()
            raise
        super().__init__(_capabilities(config, self._engine_dir, num_blocks, clock is not None))

    @property
    def fingerprint(self) -> Mapping[str, str]:
        """See `Engine`."""
        return self._engine_dir.fingerprint

    @property
    def session(self) -> TrtllmSession:
        """The executor that it drives."""
        return self._session

    def now_s(self) -> float:
        """See `Engine`."""
        return self._clock()

    def _num_pool_blocks(self) -> int:
        """Blocks in TensorRT-LLM's pool, which only an iteration tells; it also warms up."""
        self._session.ask(PlaceRequest(_WARM_UP_IDS, 1, SamplingParams(), 0, 0, 0, None))
        deadline_s = time.monotonic() + self._config.iteration_timeout_s
        num_blocks: int | None = None
        is_done = False
        while not is_done or num_blocks is None:
            news = self._session.poll(_POLL_S)
            for response in news.responses:
                if response.has_error():
                    raise EngineError(f"the engine cannot run: {response.error_msg}")
                is_done = is_done or bool(response.result.is_final)
            for stats in news.iterations:
                num_blocks = int(stats.kv_cache_stats.max_num_blocks)
            if time.monotonic() > deadline_s:
                raise EngineError("the engine's first iteration does not end")
        return num_blocks

    # ---- sequences

    def add_sequence(
        self,
        sequence_id: SequenceId,
        family: int,
        token_ids: Sequence[int],
        params: SequenceParams,
    ) -> None:
        """See `Engine`."""
        super().add_sequence(sequence_id, family, token_ids, params)
        self._enter(sequence_id, 0)

    def fork_sequence(
        self,
        parent_id: SequenceId,
        child_id: SequenceId,
        num_shared_tokens: int,
        suffix_ids: Sequence[int],
        params: SequenceParams,
    ) -> None:
        """See `Engine`."""
        self._drop_place(parent_id)
        super().fork_sequence(parent_id, child_id, num_shared_tokens, suffix_ids, params)
        self._enter(child_id, num_shared_tokens)

    def join_sequence(
        self, parent_id: SequenceId, child_id: SequenceId, suffix_ids: Sequence[int]
    ) -> None:
        """See `Engine`."""
        self._drop_place(child_id)
        self._drop_place(parent_id)
        super().join_sequence(parent_id, child_id, suffix_ids)
        self._leave(child_id)

    def preempt_sequence(self, sequence_id: SequenceId) -> None:
        """See `Engine`. TensorRT-LLM is left to evict the blocks when it needs them."""
        self._drop_place(sequence_id)
        super().preempt_sequence(sequence_id)

    def release_sequence(self, sequence_id: SequenceId) -> None:
        """See `Engine`."""
        self._drop_place(sequence_id)
        super().release_sequence(sequence_id)
        self._leave(sequence_id)

    def _enter(self, sequence_id: SequenceId, num_shared: int) -> None:
        self._num_given[sequence_id] = 0
        self._num_shared[sequence_id] = num_shared

    def _leave(self, sequence_id: SequenceId) -> None:
        del self._num_given[sequence_id], self._num_shared[sequence_id]

    def _drop_place(self, sequence_id: SequenceId) -> None:
        """Whatever a place still draws is not wanted any more."""
        request_id = self._place_of.get(sequence_id)
        if request_id is None:
            return
        place = self._places[request_id]
        if place.num_tokens == 0:
            # A cancel in the middle of a prompt would publish blocks that were never computed
            # (kvCacheManager.cpp @b35ac1b6, by reading): it waits for the first token.
            self._unwanted.add(request_id)
        elif not place.is_revoked:
            self._session.cancel(request_id)
        self._close(request_id)

    def _close(self, request_id: int) -> None:
        place = self._places.pop(request_id)
        self._auditor.end(request_id)
        del self._place_of[place.sequence_id]
        self._pool.give_back_room(self._sequences[place.sequence_id].table)

    # ---- the iteration

    def step(self, plan: StepPlan) -> StepResult:
        """See `Engine`: asks for places and takes them back, then waits for an iteration to end.

        In lockstep it waits until all of the plan is done, and nothing else runs meanwhile.
        """
        self._step += 1
        outcome = _Outcome()
        if self._config.mode == "lease":
            self._revoke(plan)
        self._ask(plan, outcome)
        if not self._places and not outcome.failed:
            raise OutOfBlocksError("no sequence of the plan fits the KV pool")
        audits = self._await(outcome)
        return self._result(outcome, audits)

    def _revoke(self, plan: StepPlan) -> None:
        """Takes back the places of sequences that the plan leaves out."""
        planned = {*plan.decode, *(chunk.sequence_id for chunk in plan.prefill)}
        for request_id, place in self._places.items():
            if place.sequence_id in planned or place.num_tokens == 0:
                place.num_left_out = 0
                continue
            place.num_left_out += 1
            if (
                place.num_left_out >= self._config.hysteresis_steps
                and place.num_tokens < place.max_tokens
                and not place.is_revoked
            ):
                self._session.cancel(request_id)
                place.is_revoked = True
                self.losses.num_revoked += 1

    def _ask(self, plan: StepPlan, outcome: _Outcome) -> None:
        """Asks for the places that the plan gives, in its order, as far as the token budget goes.

        What generating requests leave of max_num_tokens is dealt out by chunk units of one block to
        those that start (microBatchScheduler.cpp, EQUAL_PROGRESS). It is enough for a place whose
        KV is there, whatever its length; to ask for more would not start them any sooner.
        """
        num_starting = sum(place.num_tokens == 0 for place in self._places.values())
        num_running = len(self._places) - num_starting
        room = (self._engine_dir.max_num_tokens - num_running) // self.capabilities.tokens_per_block
        for wanted in self._worth_a_start(self._wanted(plan)):
            if num_starting >= max(1, room) and not self._is_lockstep:
                return
            try:
                self._give(wanted)
            except OutOfBlocksError:
                continue  # the room of a place that ends has not come back yet
            except ValueError as error:
                outcome.failed[wanted.sequence_id] = str(error)
                continue
            num_starting += 1
            self._started_in = self._step

    def _worth_a_start(self, wanted: list[Place]) -> list[Place]:
        """All of them, or none: a step in which anybody starts is longer for everybody.

        A request that has no place at all cannot wait. The others do, for it or for so many steps.
        """
        if (
            not self._is_lockstep
            and self._step - self._started_in < self._config.start_interval_steps
        ):
            placed = {self._family(place) for place in self._places.values()}
            if all(self._family(place) in placed for place in wanted):
                return []
        return wanted

    def _family(self, place: Place) -> int:
        return self._sequences[place.sequence_id].table.family

    def _wanted(self, plan: StepPlan) -> list[Place]:
        """Places of the plan that are not given yet: protected ones, prefill, extras."""
        leases = plan.max_new_tokens or (1,) * len(plan.decode)
        decode = [
            self._place(PrefillChunk(sequence_id, 1, True, lease), is_prefill=False)
            for sequence_id, lease in zip(plan.decode, leases, strict=True)
            if sequence_id not in self._place_of
        ]
        chunks = [
            self._place(chunk, is_prefill=True)
            for chunk in plan.prefill
            if chunk.sequence_id not in self._place_of
        ]
        protected = set(plan.decode[: plan.num_protected])
        first = [place for place in decode if place.sequence_id in protected]
        extras = [place for place in decode if place.sequence_id not in protected]
        return [*first, *chunks, *extras]

    def _place(self, chunk: PrefillChunk, *, is_prefill: bool) -> Place:
        """A step of decode is a chunk of one token."""
        num_computed = self.num_computed_tokens(chunk.sequence_id)
        return Place(
            chunk.sequence_id,
            prompt_length=num_computed + chunk.num_tokens,
            max_tokens=chunk.max_new_tokens if chunk.sample and not self._is_lockstep else 1,
            keeps_tokens=chunk.sample,
            asked_in=self._step,
            num_known_tokens=num_computed,
            is_prefill=is_prefill,
        )

    def _give(self, place: Place) -> None:
        """Asks for one place.

        Raises:
            OutOfBlocksError: Its blocks are not free.
            ValueError: TensorRT-LLM refuses it.
        """
        sequence_id = place.sequence_id
        sequence = self._sequences[sequence_id]
        num_written = place.prompt_length - place.num_known_tokens + place.max_tokens - 1
        self._pool.make_room(sequence.table, num_written)
        num_before = self._num_given[sequence_id]
        try:
            request_id = self._session.ask(
                PlaceRequest(
                    sequence.tokens[: place.prompt_length],
                    place.max_tokens,
                    sequence.params.sampling,
                    seed=_seed(sequence.params.seed, place.prompt_length),
                    num_prefix_tokens=self._num_shared[sequence_id],
                    client_id=_client_id(sequence.table.family, sequence_id, num_before),
                    cache_salt_id=sequence.params.cache_salt_id,
                )
            )
        except ValueError:
            self._pool.give_back_room(sequence.table)
            raise
        self._places[request_id] = place
        self._place_of[sequence_id] = request_id
        num_known_blocks = place.num_known_tokens // self.capabilities.tokens_per_block
        self._auditor.begin(request_id, place.prompt_length, num_known_blocks)
        self._num_given[sequence_id] = num_before + 1
        self.losses.num_places += 1
        self.losses.num_reentries += num_before > 0
        self.losses.num_prefix_steps += not place.keeps_tokens

    # ---- what became of it

    def _await(self, outcome: _Outcome) -> tuple[IterationAudit, ...]:
        """Waits for an iteration to end, in lockstep for all places to end.

        Turns in which TensorRT-LLM could schedule nobody do not count.

        Raises:
            EngineError: None ends in time.
        """
        deadline_s = time.monotonic() + self._config.iteration_timeout_s
        audits: list[IterationAudit] = []
        has_news = has_run = False
        while True:
            news = self._session.poll(_STATISTICS_S if has_news else self._patience_s())
            for response in news.responses:
                self._take(response, outcome)
            audits.extend(self._auditor.audit(news))
            has_news = has_news or bool(news.responses)
            has_run = has_run or any(
                stats.inflight_batching_stats.num_scheduled_requests for stats in news.iterations
            )
            if not self._places or (has_run and not self._is_lockstep):
                return tuple(audits)
            if not self._session.takes_requests:
                raise EngineError("TensorRT-LLM's executor has ended")
            if time.monotonic() > deadline_s:
                timeout_s = self._config.iteration_timeout_s
                raise EngineError(f"no iteration of the engine has ended for {timeout_s:g} s")

    def _patience_s(self) -> float:
        """How long to wait for a response; while only prompts are computed, none will tell."""
        is_decoding = any(place.num_tokens for place in self._places.values())
        return _POLL_S if is_decoding else _SILENT_POLL_S

    def _take(self, response: Any, outcome: _Outcome) -> None:
        """Merges one response into the transcript of its branch."""
        request_id = int(response.request_id)
        place = self._places.get(request_id)
        if place is None:  # of a branch that is gone, or of a place that was given up
            if request_id in self._unwanted:
                self._unwanted.remove(request_id)
                if not response.has_error() and not response.result.is_final:
                    self._session.cancel(request_id)
            return
        if response.has_error():
            outcome.failed[place.sequence_id] = str(response.error_msg)
            self._close(request_id)
            return
        result = response.result
        token_ids = [int(token_id) for token_id in result.output_token_ids[0]]
        if result.is_final:
            token_ids = self._with_end(place, token_ids, result)
        if token_ids:
            self._append(place, token_ids, outcome)
        if result.is_final:
            # A cancel clears what was not reported; a place that ended by itself lost nothing.
            self.losses.num_lost_tokens += place.is_revoked and self._was_cancelled(result)
            if place.is_revoked:
                outcome.vacated.add(place.sequence_id)
            self._close(request_id)

    def _append(self, place: Place, token_ids: list[int], outcome: _Outcome) -> None:
        sequence_id = place.sequence_id
        sequence = self._sequences[sequence_id]
        if place.num_tokens == 0:
            if not place.is_prefill:
                self.losses.num_idle_steps += self._step - place.asked_in
            else:
                outcome.prefilled[sequence_id] = place.prompt_length - place.num_known_tokens
        if not (place.is_prefill and place.num_tokens == 0):
            outcome.decoded.append(sequence_id)
        place.num_tokens += len(token_ids)
        if place.keeps_tokens:
            sequence.tokens.extend(token_ids)
            self.losses.num_tokens += len(token_ids)
            outcome.tokens[sequence_id] = (*outcome.tokens.get(sequence_id, ()), *token_ids)
            self._write(sequence, len(sequence.tokens) - 1)
        else:
            self._write(sequence, place.prompt_length)

    def _write(self, sequence: EngineSequence, num_tokens: int) -> None:
        """The sequence has KV up to there; its place has taken the blocks."""
        if num_tokens > sequence.table.num_tokens:
            self._pool.reserve([(sequence.table, num_tokens - sequence.table.num_tokens)])
        sequence.max_computed = max(sequence.max_computed, num_tokens)

    def _with_end(self, place: Place, token_ids: list[int], result: Any) -> list[int]:
        """The token that ended the stage is part of the text, whether it was sent or not.

        A place that only computes a prefix may draw one too: without it, nothing would tell that
        the prefix is there.
        """
        sampling = self._sequences[place.sequence_id].params.sampling
        reason = result.finish_reasons[0]
        if reason.name == "END_ID" and sampling.stop_ids:
            end_id = min(sampling.stop_ids)
            if not token_ids or token_ids[-1] != end_id:
                return [*token_ids, end_id]
        return token_ids

    @staticmethod
    def _was_cancelled(result: Any) -> bool:
        return bool(result.finish_reasons[0].name == "CANCELLED")

    def _result(self, outcome: _Outcome, audits: tuple[IterationAudit, ...]) -> StepResult:
        num_missed = self._auditor.num_missed_blocks
        self.losses.num_recomputed_tokens = num_missed * self.capabilities.tokens_per_block
        return StepResult(
            iteration=self._step,
            completed_at_s=self.now_s(),
            step_ms=sum(audit.step_ms for audit in audits),
            decoded=tuple(dict.fromkeys(outcome.decoded)),
            tokens=outcome.tokens,
            prefilled=outcome.prefilled,
            failed=outcome.failed,
            holding=frozenset(
                place.sequence_id for place in self._places.values() if not place.is_revoked
            ),
            vacated=frozenset(outcome.vacated),
            audits=None if self._is_lockstep else audits,
        )

    def idle(self) -> None:
        """See `Engine`: requests that wait for their first token to be cancelled are seen to."""
        if self._unwanted:
            for response in self._session.poll(_SILENT_POLL_S).responses:
                self._take(response, _Outcome())

    def check_integrity(self) -> None:
        """See `Engine`."""
        super().check_integrity()
        assert len(self._place_of) == len(self._places), "a place is lost"
        for sequence_id, request_id in self._place_of.items():
            assert self._places[request_id].sequence_id == sequence_id
        with_room = {i for i, s in self._sequences.items() if s.table.num_tokens_with_room}
        assert with_room <= set(self._place_of), "room without a place"

    def shutdown(self) -> None:
        """See `Engine`. Open places are taken back: TensorRT-LLM would run them to their end."""
        if self._session.takes_requests:
            for request_id in (*self._places, *self._unwanted):
                self._session.cancel(request_id)
        self._session.shutdown()


def _capabilities(
    config: TrtllmEngineConfig, engine_dir: EngineDir, num_kv_blocks: int, virtual_time: bool
) -> EngineCapabilities:
    is_lockstep = config.mode == "lockstep"
    return EngineCapabilities(
        name="trtllm",
        granularity="step" if is_lockstep else "lease",
        actuation_delay_steps=0 if is_lockstep else 1,
        lease_tokens=None if is_lockstep else config.lease_tokens,
        resident_when_gated=False,  # its blocks can be evicted
        min_recompute_tokens=0,  # the last token has no KV in any case
        width_buckets=None,
        disaggregated_prefill=frozenset(),
        prefix_sharing_attention=False,
        kv_merge=False,  # its KV is found by token ids alone
        bitwise_deterministic=False,
        virtual_time=virtual_time,
        max_batch_size=engine_dir.max_batch_size,
        max_seq_len=min(engine_dir.max_seq_len, engine_dir.max_input_len + 1),
        tokens_per_block=engine_dir.tokens_per_block,
        num_kv_blocks=num_kv_blocks,
        vocab_size=engine_dir.vocab_size,
    )


def _seed(seed: int, position: int) -> int:
    """Of a place that begins at a position: the sampler starts anew, and must not repeat itself."""
    digest = hashlib.blake2b(f"{seed}/{position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _client_id(family: int, sequence_id: SequenceId, num_before: int) -> int:
    """Family, branch and place in one number, for TensorRT-LLM's logs."""
    return (family & 0xFFFFFF) << 40 | (sequence_id & 0xFFFFFF) << 16 | (num_before & 0xFFFF)
