"""What to ask for: options of a request, and fork-join programs, built step by step.

Programs are immutable: every step returns a new one, so that a common beginning can be shared.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

from pydantic import ValidationError

from taper_trtllm.client.wire import OPTION_NAMES
from taper_trtllm.request import (
    JoinMode,
    ParallelStage,
    RequestError,
    SerialStage,
    first_error,
)

if TYPE_CHECKING:
    from typing_extensions import Self

TextOrIds = str | Sequence[int]

_TENSOR_OF_OPTION = {option: tensor for tensor, option in OPTION_NAMES.items()}
_NOT_TENSORS = {"request_id", "deadline_s"}


class RequestOptions(TypedDict, total=False):
    """Options of every request; what is left out is the server's default.

    Attributes:
        temperature: 0 is greedy, the default.
        top_k: Draw from the k likeliest; 0 for all.
        top_p: Draw from the likeliest that have this probability together.
        seed: Of the draws; each branch draws from a seed of its own.
        end_id: Token that ends a stage, in place of the tokenizer's.
        stop_token_ids: Further ones.
        ignore_eos: `end_id` ends nothing.
        slo_ttft_ms: Objective: time to first token; so for the next two.
        slo_tpot_ms: Time per output token.
        slo_stretch: End-to-end latency over critical-path tokens times `slo_tpot_ms`.
        cache_salt_id: KV is shared among requests with the same one only.
        join_mode: ``concat`` (the default) or ``kv_merge``; see `ForkJoinRequest`.
        request_id: Must not be in use; a random one by default.
        deadline_s: After so long the request is cancelled and `DeadlineExceededError` raised.
    """

    temperature: float
    top_k: int
    top_p: float
    seed: int
    end_id: int
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    slo_ttft_ms: float
    slo_tpot_ms: float
    slo_stretch: float
    cache_salt_id: int
    join_mode: JoinMode
    request_id: str
    deadline_s: float


@dataclass(frozen=True, kw_only=True)
class Program:
    """Stages, in order.

    Attributes:
        stages: So far.
    """

    stages: tuple[SerialStage | ParallelStage, ...] = ()

    def serial(self, max_tokens: int) -> Self:
        """Then decode up to `max_tokens` tokens, or to a stop token.

        Raises:
            RequestError: `max_tokens` is not a positive integer.
        """
        return self._then(SerialStage, max_tokens=max_tokens)

    def parallel(
        self,
        branches: Sequence[BranchProgram],
        *,
        join: TextOrIds = "",
        allow_branch_cancel: bool = False,
    ) -> Self:
        """Then fork branches from all text so far, and join their texts, in order.

        Args:
            branches: Made by `branch`.
            join: Put behind the joined texts.
            allow_branch_cancel: Branches may be withdrawn while they run; the join then goes on
                without them (`AsyncStream.cancel_branch`).

        Raises:
            RequestError: There is no branch, or too many; or one of them is empty.
        """
        return self._then(
            ParallelStage,
            branches=[{**_text_or_ids("header", b.header), "stages": b.stages} for b in branches],
            **_text_or_ids("join", join),
            allow_branch_cancel=allow_branch_cancel,
        )

    def stages_json(self) -> str:
        """The `stages` tensor."""
        return json.dumps([stage.model_dump(exclude_none=True) for stage in self.stages])

    def _then(self, kind: type[SerialStage | ParallelStage], **fields: Any) -> Self:
        try:
            stage = kind(**fields)
        except ValidationError as error:
            raise first_error(error) from None
        return dataclasses.replace(self, stages=(*self.stages, stage))


@dataclass(frozen=True, kw_only=True)
class BranchProgram(Program):
    """One branch: its header, then its stages."""

    header: TextOrIds = ""


def branch(header: TextOrIds = "", max_tokens: int | None = None) -> BranchProgram:
    """A branch that begins with `header`.

    Args:
        header: Text or token ids, put before what the branch decodes.
        max_tokens: Short for ``branch(header).serial(max_tokens)``.
    """
    empty = BranchProgram(header=header)
    return empty if max_tokens is None else empty.serial(max_tokens)


def request_tensors(prompt: TextOrIds, options: RequestOptions) -> dict[str, Any]:
    """Tensors of a prompt and its options, by name; see `wire.input_tensors`.

    Raises:
        TypeError: There is no such option.
        RequestError: One that is not a tensor cannot be used.
    """
    unknown = options.keys() - RequestOptions.__annotations__.keys()
    if unknown:
        raise TypeError(f"no such option: {', '.join(sorted(unknown))}")
    request_id, deadline_s = options.get("request_id"), options.get("deadline_s")
    if request_id is not None and not _is_text(request_id):
        raise RequestError("request_id", f"must be text (got {request_id!r:.80})")
    if deadline_s is not None and not _is_number(deadline_s):
        raise RequestError("deadline_s", f"must be a number (got {deadline_s!r:.80})")
    tensors = {
        _TENSOR_OF_OPTION.get(name, name): value
        for name, value in options.items()
        if name not in _NOT_TENSORS
    }
    return {("text_input" if isinstance(prompt, str) else "input_ids"): prompt, **tensors}


def _is_text(value: object) -> bool:
    """Whether it can be sent as UTF-8."""
    return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not math.isnan(value)


def _text_or_ids(name: str, value: TextOrIds) -> dict[str, Any]:
    if isinstance(value, str):
        return {f"{name}_text": value} if value else {}
    return {f"{name}_ids": tuple(value)}
