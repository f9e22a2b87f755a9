"""What a fork-join program costs when it runs to its full length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from taper_trtllm.kv_budget import serial_footprint_blocks
from taper_trtllm.request import (
    ForkJoinRequest,
    ParallelStage,
    SerialStage,
    max_new_tokens,
)


@dataclass(frozen=True, slots=True)
class ProgramCost:
    """Token counts of one request that runs to its full length.

    Attributes:
        num_output_tokens: Decoded tokens over all branches.
        critical_tokens: Decoded tokens on the longest path.
        footprint_blocks: KV blocks that its worst-case serial execution reserves.
        num_drawn_by_prefill: Of the decoded tokens, those that need no decode step: a prompt, a
            header and a join draw the first token behind them.
        decode_context_tokens: Context length, summed over decoded tokens.
        num_prefill_tokens: Prompt, branch headers and joined branch texts.
        num_prefill_chunks: Pieces that these come in.
        prefill_token_context: Context length, summed over prefilled tokens.
    """

    num_output_tokens: int
    critical_tokens: int
    footprint_blocks: int
    num_drawn_by_prefill: int
    decode_context_tokens: float
    num_prefill_tokens: int
    num_prefill_chunks: int
    prefill_token_context: int


def program_cost(
    request: ForkJoinRequest, tokens_per_block: int, shared_context_weight: float = 1.0
) -> ProgramCost:
    """Walks the program of a request.

    Args:
        request: Whose.
        tokens_per_block: Of the engine.
        shared_context_weight: Cost of a context token that another branch reads in the same step,
            as a share of one that nobody else reads; branches run abreast.
    """
    num_prompt = len(request.input_ids)
    program = request.program
    walk = _Walk(shared_context_weight)
    walk.prefill(0, num_prompt)
    walk.run(program, num_prompt, float(num_prompt), draws=num_prompt > 1)
    return ProgramCost(
        num_output_tokens=max_new_tokens(program),
        critical_tokens=critical_tokens(program),
        footprint_blocks=serial_footprint_blocks(num_prompt, program, tokens_per_block),
        num_drawn_by_prefill=walk.num_drawn,
        decode_context_tokens=walk.decode_context,
        num_prefill_tokens=walk.prefill_tokens,
        num_prefill_chunks=walk.prefill_chunks,
        prefill_token_context=walk.prefill_context,
    )


def critical_tokens(program: Sequence[SerialStage | ParallelStage]) -> int:
    """Decoded tokens on the longest path through a program."""
    return sum(
        stage.max_tokens
        if isinstance(stage, SerialStage)
        else max(critical_tokens(branch.program) for branch in stage.branches)
        for stage in program
    )


class _Walk:
    """Adds up what a program decodes and prefills, and at which context length."""

    def __init__(self, shared_context_weight: float) -> None:
        self._shared_weight = shared_context_weight
        self.decode_context = 0.0
        self.prefill_context = self.prefill_tokens = self.prefill_chunks = self.num_drawn = 0

    def run(
        self,
        program: Sequence[SerialStage | ParallelStage],
        context: int,
        read: float,
        draws: bool,
    ) -> int:
        """Walks a program.

        Args:
            program: Its stages.
            context: Length of the context that it starts at.
            read: What a step reads of it for one branch.
            draws: Prefill came before, whose last token draws one.

        Returns:
            The length of the context at its end.
        """
        for stage in program:
            before = context
            if isinstance(stage, SerialStage):
                self.decode_context += _sum_of_lengths(read, stage.max_tokens)
                context += stage.max_tokens
                self.num_drawn += draws
                draws = False
            else:
                context, draws = self._run_parallel(stage, context, read)
            read += context - before
        return context

    def prefill(self, context: int, num_tokens: int) -> None:
        """One piece of prefill."""
        if num_tokens:
            self.prefill_chunks += 1
            self.prefill_tokens += num_tokens
            self.prefill_context += int(_sum_of_lengths(context, num_tokens))

    def _run_parallel(self, stage: ParallelStage, fork: int, read: float) -> tuple[int, bool]:
        """The length of the context behind the join, and whether that needed prefill."""
        first_end = joined = fork
        num_others = len(stage.branches) - 1
        read *= (1 + num_others * self._shared_weight) / (1 + num_others)
        for j, branch in enumerate(stage.branches):
            header = len(branch.header_ids)
            self.prefill(fork, header)
            end = self.run(branch.program, fork + header, read + header, draws=header > 0)
            joined += end - fork
            first_end = end if j == 0 else first_end
        # Branch 0 is contiguous with the prefix; the others' texts move to a new position.
        joined += len(stage.join_ids)
        self.prefill(first_end, joined - first_end)
        return joined, joined > first_end


def _sum_of_lengths(context: float, num_tokens: int) -> float:
    return num_tokens * context + num_tokens * (num_tokens - 1) // 2
