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
        decode_context_tokens: Context length, summed over decoded tokens.
        num_prefill_tokens: Prompt, branch headers and joined branch texts.
        num_prefill_chunks: Pieces that these come in.
        prefill_token_context: Context length, summed over prefilled tokens.
    """

    num_output_tokens: int
    critical_tokens: int
    footprint_blocks: int
    decode_context_tokens: int
    num_prefill_tokens: int
    num_prefill_chunks: int
    prefill_token_context: int


def program_cost(request: ForkJoinRequest, tokens_per_block: int) -> ProgramCost:
    """Walks the program of a request on an engine with blocks of `tokens_per_block`."""
    num_prompt = len(request.input_ids)
    program = request.program
    walk = _Walk()
    walk.prefill(0, num_prompt)
    walk.run(program, num_prompt)
    return ProgramCost(
        num_output_tokens=max_new_tokens(program),
        critical_tokens=critical_tokens(program),
        footprint_blocks=serial_footprint_blocks(num_prompt, program, tokens_per_block),
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

    def __init__(self) -> None:
        self.decode_context = self.prefill_context = 0
        self.prefill_tokens = self.prefill_chunks = 0

    def run(self, program: Sequence[SerialStage | ParallelStage], context: int) -> int:
        """Walks a program that starts at a context length; returns the length at its end."""
        for stage in program:
            if isinstance(stage, SerialStage):
                self.decode_context += _sum_of_lengths(context, stage.max_tokens)
                context += stage.max_tokens
            else:
                context = self._run_parallel(stage, context)
        return context

    def prefill(self, context: int, num_tokens: int) -> None:
        """One piece of prefill."""
        if num_tokens:
            self.prefill_chunks += 1
            self.prefill_tokens += num_tokens
            self.prefill_context += _sum_of_lengths(context, num_tokens)

    def _run_parallel(self, stage: ParallelStage, fork: int) -> int:
        first_end = joined = fork
        for j, branch in enumerate(stage.branches):
            header = len(branch.header_ids)
            self.prefill(fork, header)
            end = self.run(branch.program, fork + header)
            joined += end - fork
            first_end = end if j == 0 else first_end
        # Branch 0 is contiguous with the prefix; the others' texts move to a new position.
        joined += len(stage.join_ids)
        self.prefill(first_end, joined - first_end)
        return joined


def _sum_of_lengths(context: int, num_tokens: int) -> int:
    return num_tokens * context + num_tokens * (num_tokens - 1) // 2
