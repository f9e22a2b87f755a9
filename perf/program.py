"""What a fork-join program costs when it runs to its full length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from taper_trtllm.request import (
    ForkJoinRequest,
    ParallelStage,
    SerialStage,
    max_context_tokens,
    max_new_tokens,
)


@dataclass(frozen=True, slots=True)
class ProgramCost:
    """Token counts of one request that runs to its full length.

    Attributes:
        num_output_tokens: Decoded tokens over all branches.
        critical_tokens: Decoded tokens on the longest path.
        num_prefill_tokens: Prompt, branch headers and joined branch texts.
        max_seq_tokens: Length of the final context.
        decode_context_tokens: Context length, summed over decoded tokens.
    """

    num_output_tokens: int
    critical_tokens: int
    num_prefill_tokens: int
    max_seq_tokens: int
    decode_context_tokens: int


def program_cost(request: ForkJoinRequest) -> ProgramCost:
    """Walks the program of a request."""
    num_prompt = len(request.input_ids)
    program = request.program
    prefill, context = _walk(program, num_prompt)
    return ProgramCost(
        num_output_tokens=max_new_tokens(program),
        critical_tokens=critical_tokens(program),
        num_prefill_tokens=num_prompt + prefill,
        max_seq_tokens=num_prompt + max_context_tokens(program),
        decode_context_tokens=context,
    )


def critical_tokens(program: Sequence[SerialStage | ParallelStage]) -> int:
    """Decoded tokens on the longest path through a program."""
    return sum(
        stage.max_tokens
        if isinstance(stage, SerialStage)
        else max(critical_tokens(branch.program) for branch in stage.branches)
        for stage in program
    )


def _walk(program: Sequence[SerialStage | ParallelStage], context: int) -> tuple[int, int]:
    """Returns (tokens prefilled, context length summed over decoded tokens) from a context on."""
    prefill = decode_context = 0
    for stage in program:
        if isinstance(stage, SerialStage):
            decode_context += sum(range(context, context + stage.max_tokens))
            context += stage.max_tokens
            continue
        prefill += len(stage.join_ids)
        joined = context + len(stage.join_ids)
        for j, branch in enumerate(stage.branches):
            header = len(branch.header_ids)
            inner_prefill, inner_context = _walk(branch.program, context + header)
            text = header + max_context_tokens(branch.program)
            # Branch 0 is contiguous with the prefix; the others' texts move to a new position.
            prefill += header + inner_prefill + (text if j else 0)
            decode_context += inner_context
            joined += text
        context = joined
    return prefill, decode_context
