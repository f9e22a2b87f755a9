r"""Formats of forks that the model writes itself: tags, given texts, policies and limits. Pure.

```
root      text <Goal> <Outline> 1: .. <Outline> 2: .. </Goal>
               ^ scope_open     ^ outline_pattern     ^ trigger: fork
branch 1  \n <Path>\n1: text </Path>
branch 2  \n <Path>\n2: text </Path>
          ^ separator  ^ text of its own
             ^ branch_header   ^ branch_end
root      [all that, in order] \n<Conclusion>\n text
                               ^ join_text
```
Tags and texts of the formats shipped: Multiverse (Infini-AI-Lab/Multiverse, served by
Swapnil-Gandhi/Multiverse-Engine), ThreadWeaver (facebookresearch/threadweaver) and Native Parallel
Reasoner (bigai-nlco/Native-Parallel-Reasoner).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations
from types import MappingProxyType
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from taper_trtllm.request import MAX_DEPTH, MAX_FAN_OUT
from taper_trtllm.tag_scanner import (
    Tag,
    TagScanner,
    TextTagScanner,
    TokenTagScanner,
    single_token,
)
from taper_trtllm.tokenizer import Tokenizer

ForkRefusalReason = Literal[
    "no_outlines", "duplicate_ids", "too_many_branches", "too_many_rounds", "no_budget"
]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


_Text = Annotated[str, Field(min_length=1)]
_PositiveInt = Annotated[int, Field(ge=1)]


class ForkLimits(_Model):
    """How far a model may fork; beyond `max_depth`, triggers are plain text.

    Attributes:
        max_branches: Of one fork.
        max_depth: Forks inside each other.
        max_rounds: Forks of one branch (or of the request itself) one after another; counted by
            branch, so that it does not depend on which branch is ahead.
        max_branch_tokens: Appended in one branch, its forks included; None for what there is.
        max_critical_tokens: Decoded on the longest path; None for what there is.
    """

    max_branches: Annotated[int, Field(ge=1, le=MAX_FAN_OUT)] = MAX_FAN_OUT
    max_depth: Annotated[int, Field(ge=1, le=MAX_DEPTH)] = 1
    max_rounds: _PositiveInt = 32
    max_branch_tokens: _PositiveInt | None = None
    max_critical_tokens: _PositiveInt | None = None


class ForkFormat(_Model):
    """How a model writes a fork.

    Attributes:
        name: What requests call it.
        trigger: Tag behind which branches fork.
        scope_open: Tag that opens the list of outlines; the last one before the trigger counts.
        outline_pattern: Regular expression of one outline; group 1 is its id.
        branch_end: Tag that ends a branch.
        separator_first: Text between the trigger and the header of a branch; also before the first
            branch in the joined text.
        separator_next: Text before the header of every further branch in the joined text.
        branch_header: Text that a branch is given to begin with; ``{id}`` is its outline's id.
        join_text: Text given behind the last branch.
        forced_close: Text given to a branch that ended without `branch_end`.
        on_no_outlines: A trigger without outlines: decode on serially, or finish the branch (of the
            request itself: the request). So for the next two.
        on_duplicate_ids: Outlines with equal ids: the first of each, all of them, or no fork.
        on_too_many: More outlines than branches are allowed: the first ones, or no fork.
        limits: How far it may go.
        trained_join: How the training joins branches: at consecutive positions, each branch seeing
            those before it (``concat``), or at overlapping ones, computed without its siblings
            (``kv_merge``).
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=64)]
    trigger: _Text
    scope_open: _Text
    outline_pattern: str
    branch_end: _Text
    separator_first: str
    separator_next: str
    branch_header: str
    join_text: str
    forced_close: str
    on_no_outlines: Literal["serial", "finish"] = "serial"
    on_duplicate_ids: Literal["first", "all", "serial", "finish"] = "first"
    on_too_many: Literal["first", "serial", "finish"] = "serial"
    limits: ForkLimits = ForkLimits()
    trained_join: Literal["concat", "kv_merge"]

    @field_validator("outline_pattern")
    @classmethod
    def _has_an_id(cls, pattern: str) -> str:
        try:
            num_groups = re.compile(pattern).groups
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"not a regular expression ({error})") from None
        if num_groups == 0:
            raise ValueError("needs a group around the id")
        return pattern

    @field_validator("branch_header")
    @classmethod
    def _shows_the_id(cls, header: str) -> str:
        if "{id}" not in header:
            raise ValueError("must contain {id}")
        return header

    @model_validator(mode="after")
    def _tags_are_distinct(self) -> ForkFormat:
        # Else the beginning of a text would not tell which of two tags it ends with.
        for a, b in permutations(("trigger", "scope_open", "branch_end"), 2):
            if getattr(self, a) in getattr(self, b):
                raise ValueError(f"{a} must not be a part of {b}")
        return self

    def outline_ids(self, text: str) -> tuple[str, ...]:
        """Ids of the outlines in the text of a scope, as they stand; those without id are left out.

        An id that the pattern lets be empty counts as none.
        """
        found = (match[1] for match in re.finditer(self.outline_pattern, text))
        return tuple(outline_id for outline_id in found if outline_id)


def _outline_pattern(tag: str) -> str:
    return rf"{tag}\s*(\d+(?:\.\d+)*)\s*:"


MULTIVERSE = ForkFormat(
    name="multiverse",
    trigger="</Goal>",
    scope_open="<Goal>",
    outline_pattern=_outline_pattern("<Outline>"),
    branch_end="</Path>",
    separator_first="\n",
    separator_next="\n",
    branch_header="<Path>\n{id}:",
    join_text="\n<Conclusion>\n",
    forced_close="\n</Path>",
    on_duplicate_ids="all",
    limits=ForkLimits(max_depth=MAX_DEPTH),
    trained_join="kv_merge",
)
THREADWEAVER = ForkFormat(
    name="threadweaver",
    trigger="</Outlines>",
    scope_open="<Outlines>",
    outline_pattern=_outline_pattern("<Outline>"),
    branch_end="</Thread>",
    separator_first="\n",
    separator_next="",
    branch_header="<Thread>\n{id}:",
    join_text="\n",
    forced_close="\n</Thread>",
    trained_join="concat",
)
THREADWEAVER_CONCLUSION = THREADWEAVER.model_copy(
    update={"name": "threadweaver-conclusion", "join_text": "\n<Conclusion>\n"}
)
NPR = ForkFormat(
    name="npr",
    trigger="</guideline>",
    scope_open="<guideline>",
    outline_pattern=_outline_pattern("<plan>"),
    branch_end="</step>",
    separator_first="\n",
    separator_next="\n",
    branch_header="<step>\n{id}:",
    join_text="\n<takeaway>\n",
    forced_close="\n</step>",
    on_no_outlines="finish",
    on_duplicate_ids="all",
    on_too_many="finish",
    limits=ForkLimits(max_branches=5),
    trained_join="kv_merge",
)
FORMATS: Mapping[str, ForkFormat] = MappingProxyType(
    {each.name: each for each in (MULTIVERSE, THREADWEAVER, THREADWEAVER_CONCLUSION, NPR)}
)


# --------------------------------------------------------------------------------------- policies


@dataclass(frozen=True, slots=True)
class Refusal:
    """A fork that does not happen.

    Attributes:
        reason: Why.
        finish: The branch ends; else it decodes on serially.
    """

    reason: ForkRefusalReason
    finish: bool


def choose_branches(
    fork_format: ForkFormat, outline_ids: Sequence[str], max_branches: int
) -> tuple[str, ...] | Refusal:
    """Which outlines become branches, in order.

    Args:
        fork_format: Its policies and its own limit apply.
        outline_ids: As a `Sighting` has them.
        max_branches: What the server and the request allow besides; with none, nothing forks.
    """
    if not outline_ids:
        return Refusal("no_outlines", fork_format.on_no_outlines == "finish")
    chosen = tuple(outline_ids)
    distinct = tuple(dict.fromkeys(chosen))
    if len(distinct) < len(chosen):
        if fork_format.on_duplicate_ids in ("serial", "finish"):
            return Refusal("duplicate_ids", fork_format.on_duplicate_ids == "finish")
        if fork_format.on_duplicate_ids == "first":
            chosen = distinct
    limit = min(fork_format.limits.max_branches, max_branches)
    if len(chosen) > limit:
        if fork_format.on_too_many != "first" or limit < 1:
            return Refusal("too_many_branches", fork_format.on_too_many == "finish")
        chosen = chosen[:limit]
    return chosen


# -------------------------------------------------------------------------------- with a tokenizer


class BoundForkFormat:
    """A format in the tokens of one model.

    Token mode, where `trigger`, `scope_open` and `branch_end` are each one token of their own: the
    same tags spelled in other tokens are plain text, as for the models trained so. Text mode, for
    all other tokenizers: decoded text is searched; generated tokens are never encoded again.

    Attributes:
        format: The format.
        tag_ids: In token mode, the tokens that can change the state of a branch; None in text mode,
            where every token can. Scanners must be pushed all tokens in both, for the outlines.
    """

    def __init__(self, fork_format: ForkFormat, tokenizer: Tokenizer) -> None:
        self.format = fork_format
        self._tokenizer = tokenizer
        self._texts = {
            fork_format.scope_open: Tag.SCOPE_OPEN,
            fork_format.trigger: Tag.TRIGGER,
            fork_format.branch_end: Tag.BRANCH_END,
        }
        found = {single_token(tokenizer, text): tag for text, tag in self._texts.items()}
        self._ids = {i: tag for i, tag in found.items() if i is not None}
        self.tag_ids = frozenset(self._ids) if len(self._ids) == len(self._texts) else None
        # Few texts, encoded at every fork and join; bounded, since ids are the model's.
        self._encode = lru_cache(maxsize=1024)(self._encode_text)

    def scanner(self, is_branch: bool, may_fork: bool) -> TagScanner:
        """A scanner for one serial stretch.

        Args:
            is_branch: `branch_end` counts: not in the text of the request itself.
            may_fork: `trigger` counts: not where no fork is allowed.
        """
        watched = {Tag.BRANCH_END} if is_branch else set()
        if may_fork:
            watched |= {Tag.SCOPE_OPEN, Tag.TRIGGER}
        if self.tag_ids is not None or not watched:
            ids = {i: tag for i, tag in self._ids.items() if tag in watched}
            return TokenTagScanner(ids, self.format.outline_ids, self._tokenizer)
        texts = {text: tag for text, tag in self._texts.items() if tag in watched}
        return TextTagScanner(texts, self.format.outline_ids, self._tokenizer)

    def branch_header_ids(self, outline_id: str, tail: str = "") -> tuple[int, ...]:
        """What a branch is given behind the fork; what `tail` already has of it is left out."""
        return self._encode(self._header(self.format.separator_first, outline_id, tail))

    def joined_header_ids(self, outline_id: str, tail: str = "") -> tuple[int, ...]:
        """What stands in the joined text before a branch but the first, behind `tail`."""
        return self._encode(self._header(self.format.separator_next, outline_id, tail))

    def join_ids(self, tail: str = "") -> tuple[int, ...]:
        """The join text, behind the `tail` of the last branch."""
        return self._encode(_without_overlap(self.format.join_text, tail))

    def forced_close_ids(self) -> tuple[int, ...]:
        """The text that ends a branch without its end tag."""
        return self._encode(self.format.forced_close)

    def _header(self, separator: str, outline_id: str, tail: str) -> str:
        header = self.format.branch_header.replace("{id}", outline_id)
        return _without_overlap(separator + header, tail)

    def _encode_text(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text, add_special_tokens=False)) if text else ()


def _without_overlap(text: str, tail: str) -> str:
    """What is left to give of a text behind a tail that has all of it or ends in its beginning."""
    if tail.startswith(text):
        return ""
    sizes = range(min(len(text), len(tail)), 0, -1)
    return text[next((size for size in sizes if tail.endswith(text[:size])), 0) :]
