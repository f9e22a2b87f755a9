"""Which requests enter a step: the capacity scheduler, then the micro-batch scheduler.

Follow `GuaranteedNoEvictScheduler` (batch_manager/capacityScheduler.cpp @02a10fed) and
`MicroBatchScheduler` (microBatchScheduler.cpp @b8b7b782). Other capacity policies are not made.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from perf.trtllm_fake.active_request import ActiveRequest, State
from perf.trtllm_fake.block_tree import BlockTree


@dataclass(slots=True)
class ScheduledBatch:
    """Requests of one step.

    Attributes:
        context: Requests in their prompt; `chunk_size` says how much of it.
        generation: Requests that compute their last token.
    """

    context: list[ActiveRequest] = field(default_factory=list)
    generation: list[ActiveRequest] = field(default_factory=list)


def fitting_requests(
    active: Iterable[ActiveRequest], tree: BlockTree, max_num_requests: int
) -> list[ActiveRequest]:
    """Those that have, or can be given, the blocks to run to their end.

    Generating requests keep theirs. Others follow in order until one does not fit; one whose first
    missing block an earlier one is about to compute is passed over, so that it can reuse it.

    Args:
        active: By priority.
        tree: The blocks.
        max_num_requests: Most requests at a time.
    """
    active = list(active)
    contributed = _blocks_of_chunked_contexts(active, tree)
    available = tree.num_free_blocks
    fitting: list[ActiveRequest] = []
    pending: list[ActiveRequest] = []
    for request in active:
        if len(fitting) >= max_num_requests:
            break
        if request.state is State.GENERATION:
            fitting.append(request)
            available -= _blocks_to_completion(request, tree)
        else:
            pending.append(request)
    for request in pending:
        if _beneficial_to_skip(request, tree, contributed):
            continue
        if len(fitting) >= max_num_requests:
            break
        needed = _blocks_to_completion(request, tree)
        if needed > available:
            break
        fitting.append(request)
        available -= needed
    return fitting


def _blocks_of_chunked_contexts(
    active: Iterable[ActiveRequest], tree: BlockTree
) -> set[tuple[object, bytes]]:
    """What requests in the middle of their prompt are computing."""
    blocks = set()
    if tree.enable_reuse:
        for request in active:
            if request.state is State.CONTEXT and not request.is_first_chunk:
                missing = tree.first_missing(request.text)
                if missing is not None:
                    blocks.add(missing)
    return blocks


def _beneficial_to_skip(
    request: ActiveRequest, tree: BlockTree, contributed: set[tuple[object, bytes]]
) -> bool:
    if not tree.enable_reuse or not request.is_first_chunk:
        return False
    missing = tree.first_missing(request.text)
    if missing is None:
        return False
    if missing in contributed:
        return True
    contributed.add(missing)
    return False


def _blocks_to_completion(request: ActiveRequest, tree: BlockTree) -> int:
    return tree.blocks_to_completion(request.sequence, request.prompt_len, request.max_new_tokens)


@dataclass(frozen=True, slots=True)
class MicroBatchScheduler:
    """Fits requests into the token budget of a step.

    A generating request costs one token, a context request all of its remaining prompt: what it may
    reuse is not known yet. Without chunking, the first that does not fit ends the scan. With it,
    contexts share what generating requests leave, cut to whole chunk units: in order, or by turns.

    Attributes:
        max_batch_size: Most requests.
        max_num_tokens: Most tokens.
        chunk_unit: Unit of context chunks; None if contexts are not cut.
        equal_progress: Contexts get one unit each by turns (`ContextChunkingPolicy`).
    """

    max_batch_size: int
    max_num_tokens: int
    chunk_unit: int | None
    equal_progress: bool = False

    def schedule(self, fitting: Sequence[ActiveRequest]) -> ScheduledBatch:
        """Selects from those that the capacity scheduler let through."""
        batch, contexts = ScheduledBatch(), []
        num_tokens = num_context_tokens = 0
        fits = True
        for index, request in enumerate(fitting):
            if index >= self.max_batch_size:
                break
            if request.state is State.GENERATION:
                if num_tokens + 1 > self.max_num_tokens:
                    break
                batch.generation.append(request)
                num_tokens += 1
            elif self.chunk_unit is None:
                if num_tokens + request.num_tokens > self.max_num_tokens:
                    break
                batch.context.append(request)
                num_tokens += request.num_tokens
            else:
                request.set_chunk_size(request.remaining_context)
                contexts.append(request)
                fits = fits and request.chunk_size <= self.max_num_tokens
                num_context_tokens += min(request.chunk_size, self.max_num_tokens)
        if not fits or num_context_tokens > self.max_num_tokens - num_tokens:
            cut = self._cut_equally if self.equal_progress else self._cut_in_order
            cut(contexts, self.max_num_tokens - num_tokens)
            # Those that end their prompt stand last: they become generating requests.
            contexts.sort(key=lambda request: request.chunk_size == request.remaining_context)
        batch.context += [request for request in contexts if request.chunk_size > 0]
        return batch

    def _cut_equally(self, contexts: Sequence[ActiveRequest], capacity: int) -> None:
        """A unit for each by turns, as long as one fits."""
        assert self.chunk_unit is not None
        sizes = [0] * len(contexts)
        progress = True
        while progress and capacity > 0:
            progress = False
            for index, request in enumerate(contexts):
                more = min(self.chunk_unit, request.remaining_context - sizes[index])
                if 0 < more <= capacity:
                    sizes[index] += more
                    capacity -= more
                    progress = True
        for request, size in zip(contexts, sizes, strict=True):
            request.set_chunk_size(size)

    def _cut_in_order(self, contexts: Sequence[ActiveRequest], capacity: int) -> None:
        """First come, first served."""
        assert self.chunk_unit is not None
        for request in contexts:
            size = min(request.remaining_context, capacity)
            if size != request.remaining_context:
                size = size // self.chunk_unit * self.chunk_unit
            request.set_chunk_size(size)
            capacity -= size
