"""Random fork-join programs, and what each branch must decode if it ran alone."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence

from hypothesis import strategies as st

from taper_trtllm.request import (
    Branch,
    ForkJoinRequest,
    ParallelStage,
    SamplingParams,
    SerialStage,
)

token = st.integers(0, 96)
branch_cancels = st.lists(  # step, request, stage and branch
    st.tuples(st.integers(0, 40), st.integers(0, 2), st.integers(0, 2), st.integers(0, 3)),
    max_size=6,
)
serial_stage = st.integers(1, 7).map(lambda n: SerialStage(max_tokens=n))


def _branch(stages: st.SearchStrategy[tuple[SerialStage | ParallelStage, ...]] | None):
    header = st.lists(token, max_size=3).map(tuple)
    leaf = st.builds(lambda h, n: Branch(header_ids=h, max_tokens=n), header, st.integers(1, 7))
    if stages is None:
        return leaf
    nested = st.builds(lambda h, s: Branch(header_ids=h, stages=s), header, stages)
    return st.one_of(leaf, leaf, nested)


def programs(depth: int = 3) -> st.SearchStrategy[tuple[SerialStage | ParallelStage, ...]]:
    """Programs of one to three stages, nested to `depth`."""
    stages = st.lists(serial_stage, min_size=1, max_size=2).map(tuple)
    for level in range(depth):
        branch = _branch(stages if level else None)
        parallel = st.builds(
            lambda b, j: ParallelStage(branches=tuple(b), join_ids=tuple(j)),
            st.lists(branch, min_size=1, max_size=4),
            st.lists(token, max_size=2),
        )
        stages = st.lists(st.one_of(serial_stage, parallel), min_size=1, max_size=3).map(tuple)
    return stages


def requests(depth: int = 3) -> st.SearchStrategy[ForkJoinRequest]:
    """Requests without an id of their own: give each one with `model_copy`."""
    return st.builds(
        lambda prompt, stages, stop, warm: ForkJoinRequest(
            request_id="r",
            input_ids=tuple(prompt),
            stages=stages,
            sampling=SamplingParams(stop_token_ids=tuple(stop), temperature=float(warm)),
        ),
        st.lists(token, min_size=1, max_size=20),
        programs(depth),
        st.lists(token, max_size=4),
        st.booleans(),
    )


def expected_outputs(
    request: ForkJoinRequest,
    generate: Callable[[str, Sequence[int], int], list[int]],
    cancelled: Container[str] = (),
) -> dict[tuple[str, int], list[int]]:
    """Decoded tokens by (branch path, stage index), each branch generated alone.

    Args:
        request: The program.
        generate: (branch path, context, max new tokens) -> tokens, stop token included.
        cancelled: Paths of branches that the joins leave out.
    """
    outputs: dict[tuple[str, int], list[int]] = {}

    def run(path: str, prefix: list[int], program) -> list[int]:
        """Runs one branch; returns its own text."""
        text: list[int] = []
        for index, stage in enumerate(program):
            if isinstance(stage, SerialStage):
                new = generate(path, [*prefix, *text], stage.max_tokens)
                outputs[path, index] = new
                text += new
            else:
                base = f"{path}.{index}" if path else str(index)
                context = [*prefix, *text]
                for b, branch in enumerate(stage.branches):
                    if f"{base}.{b}" in cancelled:
                        continue
                    header = list(branch.header_ids)
                    text += header + run(f"{base}.{b}", context + header, branch.program)
                text += stage.join_ids
        return text

    run("", list(request.input_ids), request.program)
    return outputs
