"""Fork-join requests: what a client may ask for, and every check on it.

A request is a program of stages. A serial stage decodes; a parallel stage forks branches that share
everything before it and joins their texts, in order, before the next stage.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    ValidationError,
)
from pydantic import model_validator as _model_validator

MAX_DEPTH = 3
MAX_FAN_OUT = 256
MAX_STOP_TOKEN_IDS = 256

JoinMode = Literal["concat", "kv_merge"]
TokenId = Annotated[StrictInt, Field(ge=0)]
TokenIds = tuple[TokenId, ...]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class RequestError(ValueError):
    """A request that cannot be served, with the field that is at fault.

    Attributes:
        field: Path of the field in the request, such as ``stages[1].branches[0].max_tokens``.
        reason: What is wrong with it, naming the limit.
    """

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SamplingParams(_Model):
    """How tokens are drawn. Draws are seeded by branch and position, never by schedule.

    `ignore_eos` takes back `end_id`; `stop_token_ids` hold all the same, as in TensorRT-LLM.
    """

    temperature: Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)] = 0.0
    top_k: Annotated[StrictInt, Field(ge=0)] = 0
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 1.0
    seed: Annotated[StrictInt, Field(ge=0, lt=2**63)] = 0
    end_id: TokenId | None = None
    stop_token_ids: Annotated[TokenIds, Field(max_length=MAX_STOP_TOKEN_IDS)] = ()
    ignore_eos: bool = False

    @property
    def stop_ids(self) -> frozenset[int]:
        """Token ids that end a stage; the token itself is kept in the output."""
        return self.end_ids.union(self.stop_token_ids)

    @property
    def end_ids(self) -> frozenset[int]:
        """Those of them that end a text, not only a stage."""
        return frozenset(() if self.end_id is None or self.ignore_eos else (self.end_id,))


class SloTarget(_Model):
    """The latency objective of one request.

    Attributes:
        ttft_ms: Time to first token.
        tpot_ms: Time per output token, over all tokens and inside serial stages.
        stretch: Optional bound on end-to-end latency over critical-path tokens times `tpot_ms`.
    """

    ttft_ms: _Positive
    tpot_ms: _Positive
    stretch: _Positive | None = None


class SerialStage(_Model):
    """Decode up to `max_tokens` tokens, or to a stop token."""

    type: Literal["serial"] = "serial"
    max_tokens: Annotated[StrictInt, Field(ge=1)]


class Branch(_Model):
    """One branch: the given header tokens, then one serial stage or nested stages."""

    header_ids: TokenIds = ()
    header_text: StrictStr | None = None
    max_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    stages: tuple[Stage, ...] | None = None

    @_model_validator(mode="after")
    def _one_body(self) -> Branch:
        if (self.max_tokens is None) == (self.stages is None):
            raise ValueError("give exactly one of max_tokens and stages")
        if self.stages is not None and not self.stages:
            raise ValueError("stages must not be empty")
        return self

    @property
    def program(self) -> tuple[Stage, ...]:
        """The branch as a list of stages."""
        if self.stages is not None:
            return self.stages
        assert self.max_tokens is not None
        return (SerialStage(max_tokens=self.max_tokens),)


class ParallelStage(_Model):
    """Fork `branches` from the shared prefix; join their texts and `join_ids` at the end.

    With `allow_branch_cancel` the client may withdraw branches while they run; the join goes on
    without their texts.
    """

    type: Literal["parallel"] = "parallel"
    branches: Annotated[tuple[Branch, ...], Field(min_length=1, max_length=MAX_FAN_OUT)]
    join_ids: TokenIds = ()
    join_text: StrictStr | None = None
    allow_branch_cancel: StrictBool = False


Stage = Annotated[SerialStage | ParallelStage, Field(discriminator="type")]
Branch.model_rebuild()
ParallelStage.model_rebuild()


class ForkJoinRequest(_Model):
    """A request: prompt, program, sampling and objective.

    `max_tokens` alone is one serial stage. Together with `stages` it is a cap that must cover the
    sum of what they may generate. Engines that share KV between requests share it among those with
    the same `cache_salt_id` only, or none.

    With `fork_format` the model writes the forks itself (`fork_format.py`); then `max_tokens` is
    all that may be appended to the prompt, headers and join texts included. `events` asks for
    outputs that tell of forks and joins, too.

    `join_mode` says how branches become context. ``concat``: their texts are computed again, one
    behind the other. ``kv_merge``: their KV is taken as it is, computed without the siblings and at
    overlapping positions, and what follows stands behind the longest; that is how models of the
    formats ``multiverse`` and ``npr`` were trained.
    """

    request_id: Annotated[StrictStr, Field(min_length=1, max_length=256)]
    input_ids: Annotated[TokenIds, Field(min_length=1)]
    stages: tuple[Stage, ...] = ()
    max_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    sampling: SamplingParams = SamplingParams()
    slo: SloTarget | None = None
    cache_salt_id: Annotated[StrictInt, Field(ge=0, lt=2**63)] | None = None
    fork_format: StrictStr | None = None
    events: StrictBool = False
    join_mode: JoinMode = "concat"

    @property
    def program(self) -> tuple[Stage, ...]:
        """The stages to run, the short form expanded."""
        if self.stages:
            return self.stages
        assert self.max_tokens is not None
        return (SerialStage(max_tokens=self.max_tokens),)


class RequestLimits(_Model):
    """What one request may ask for; part of the serving configuration."""

    max_prompt_tokens: Annotated[int, Field(ge=1)] = 2048
    max_total_tokens: Annotated[int, Field(ge=1)] = 8192
    max_fan_out: Annotated[int, Field(ge=1, le=MAX_FAN_OUT)] = MAX_FAN_OUT
    max_depth: Annotated[int, Field(ge=0, le=MAX_DEPTH)] = MAX_DEPTH
    max_leaves: Annotated[int, Field(ge=1)] = 512
    max_queue_length: Annotated[int, Field(ge=1)] = 1024


# ------------------------------------------------------------------ what a program amounts to


def max_new_tokens(program: Sequence[SerialStage | ParallelStage]) -> int:
    """Tokens that a program generates at most, over all its branches."""
    return sum(
        stage.max_tokens
        if isinstance(stage, SerialStage)
        else sum(max_new_tokens(branch.program) for branch in stage.branches)
        for stage in program
    )


def max_context_tokens(program: Sequence[SerialStage | ParallelStage]) -> int:
    """Tokens that a program appends to its prompt at most: generated, headers and join texts."""
    return sum(
        stage.max_tokens
        if isinstance(stage, SerialStage)
        else len(stage.join_ids)
        + sum(len(b.header_ids) + max_context_tokens(b.program) for b in stage.branches)
        for stage in program
    )


def max_live_leaves(program: Sequence[SerialStage | ParallelStage]) -> int:
    """Leaves that can be ready at the same time."""
    return max(
        1
        if isinstance(stage, SerialStage)
        else sum(max_live_leaves(branch.program) for branch in stage.branches)
        for stage in program
    )


def fork_depth(program: Sequence[SerialStage | ParallelStage]) -> int:
    """Depth of nested parallel stages; 0 for a plain request."""
    return max(
        0
        if isinstance(stage, SerialStage)
        else 1 + max(fork_depth(branch.program) for branch in stage.branches)
        for stage in program
    )


# ------------------------------------------------------------------------------- validation


def parse_stages(stages_json: str | bytes) -> list[Any]:
    """Reads the `stages` tensor.

    Raises:
        RequestError: It is not a JSON list.
    """
    try:
        stages = json.loads(stages_json)
    except (ValueError, RecursionError) as error:
        raise RequestError("stages", f"not valid JSON ({error})") from None
    if not isinstance(stages, list) or not stages:
        raise RequestError("stages", "must be a non-empty JSON list of stages")
    return stages


def build_request(**fields: Any) -> ForkJoinRequest:
    """Builds a request from untrusted fields.

    Raises:
        RequestError: A field is missing, unknown, of the wrong type or out of range.
    """
    try:
        request = ForkJoinRequest.model_validate(fields)
        if not request.stages and request.max_tokens is None:
            raise RequestError("max_tokens", "required when stages is not given")
        if request.stages and request.fork_format is not None:
            raise RequestError("fork_format", "give stages or fork_format, not both")
        # Here, before anything else walks the program: a hostile one nests hundreds deep.
        check_limit("stages", fork_depth(request.program), MAX_DEPTH, "nested parallel stages")
    except RecursionError:
        raise RequestError("stages", f"nested deeper than {MAX_DEPTH}") from None
    except ValidationError as error:
        raise first_error(error) from None
    return request


def check_request(request: ForkJoinRequest, limits: RequestLimits, vocab_size: int) -> None:
    """Checks a request against the configured limits and the model's vocabulary.

    Raises:
        RequestError: Names the field, the value and the limit.
    """
    num_prompt = len(request.input_ids)
    check_limit("input_ids", num_prompt, limits.max_prompt_tokens, "prompt tokens")
    program = request.program
    check_limit("stages", fork_depth(program), limits.max_depth, "nested parallel stages")
    _check_fan_out(program, limits.max_fan_out, "stages")
    check_limit("stages", max_live_leaves(program), limits.max_leaves, "leaves live at a time")
    num_new = max_new_tokens(program)
    if request.max_tokens is not None and num_new > request.max_tokens:
        raise RequestError(
            "max_tokens", f"{request.max_tokens} does not cover the {num_new} tokens of stages"
        )
    total = num_prompt + max_context_tokens(program)
    check_limit(
        "stages" if request.stages else "max_tokens", total, limits.max_total_tokens, "total tokens"
    )
    if request.join_mode == "kv_merge":
        _check_join_ids(program, "stages")
    _check_ids("input_ids", request.input_ids, vocab_size)
    _check_stage_ids(program, vocab_size, "stages")
    _check_ids("stop_token_ids", request.sampling.stop_token_ids, vocab_size)
    end_id = request.sampling.end_id
    _check_ids("end_id", () if end_id is None else (end_id,), vocab_size)


def check_limit(field: str, value: int, limit: int, what: str) -> None:
    """Refuses `value` things of a field that may have `limit`.

    Raises:
        RequestError: Names the field, the value and the limit.
    """
    if value > limit:
        raise RequestError(field, f"{value} {what} exceed the limit of {limit}")


def _check_fan_out(
    program: Sequence[SerialStage | ParallelStage], max_fan_out: int, at: str
) -> None:
    for i, stage in enumerate(program):
        if isinstance(stage, ParallelStage):
            check_limit(f"{at}[{i}].branches", len(stage.branches), max_fan_out, "branches")
            for j, branch in enumerate(stage.branches):
                _check_fan_out(branch.program, max_fan_out, f"{at}[{i}].branches[{j}].stages")


def _check_join_ids(program: Sequence[SerialStage | ParallelStage], at: str) -> None:
    """The first token behind merged branches is drawn from one that sees them all."""
    for i, stage in enumerate(program):
        if isinstance(stage, SerialStage):
            continue
        if not stage.join_ids:
            raise RequestError(f"{at}[{i}].join_ids", "required with join_mode 'kv_merge'")
        for j, branch in enumerate(stage.branches):
            _check_join_ids(branch.program, f"{at}[{i}].branches[{j}].stages")


def _check_stage_ids(
    program: Sequence[SerialStage | ParallelStage], vocab_size: int, at: str
) -> None:
    for i, stage in enumerate(program):
        if isinstance(stage, SerialStage):
            continue
        _check_ids(f"{at}[{i}].join_ids", stage.join_ids, vocab_size)
        for j, branch in enumerate(stage.branches):
            where = f"{at}[{i}].branches[{j}]"
            _check_ids(f"{where}.header_ids", branch.header_ids, vocab_size)
            _check_stage_ids(branch.program, vocab_size, f"{where}.stages")


def _check_ids(field: str, ids: Sequence[int], vocab_size: int) -> None:
    if ids and max(ids) >= vocab_size:
        raise RequestError(field, f"token id {max(ids)} is outside the vocabulary of {vocab_size}")


def first_error(error: ValidationError) -> RequestError:
    """What is said of untrusted fields that do not fit: the first mistake, by the field's path."""
    first = error.errors(include_url=False)[0]
    path = ""
    for part in first["loc"]:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part not in ("serial", "parallel"):  # the union's tag, not a field
            path += f".{part}" if path else str(part)
    message = first["msg"].removeprefix("Value error, ")
    value = first.get("input")
    if isinstance(value, int | float | str) and first["type"] != "missing":
        message += f" (got {value!r:.80})"
    return RequestError(path or "request", message)
