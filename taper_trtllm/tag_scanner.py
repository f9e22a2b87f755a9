"""Tags in what a model writes: where it forks, and where a branch ends. Pure.

A scanner belongs to one serial stretch of one branch and is pushed every token that is decoded in
it, and no given one: tags inside headers, joins and forced closes mean nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Literal, Protocol

from taper_trtllm.tokenizer import IncrementalDecoder, Tokenizer

OutlineParser = Callable[[str], tuple[str, ...]]


class Tag(Enum):
    """What a tag does."""

    SCOPE_OPEN = auto()  # outlines are read from here on
    TRIGGER = auto()
    BRANCH_END = auto()


@dataclass(frozen=True, slots=True)
class Sighting:
    """A tag was completed by the token pushed.

    Attributes:
        kind: The branch forks, or ends.
        outline_ids: For a fork: the ids between the last scope opening and the trigger, in order,
            as they stand; empty without a scope opening.
        tail: Text behind the tag in the same token, in complete characters; empty where tags are
            tokens of their own.
    """

    kind: Literal["fork", "branch_end"]
    outline_ids: tuple[str, ...] = ()
    tail: str = ""


class TagScanner(Protocol):
    """Reads one serial stretch of a branch; a stretch behind a join takes a new scanner.

    After a fork that is refused the same scanner goes on: the trigger was plain text. A branch ends
    at its first end tag, also where it wrote a block out by itself.
    """

    def push(self, token_id: int) -> Sighting | None:
        """Takes the next decoded token, in constant time but for the outlines of a fork.

        Of several tags in one token the first is told, the next one with the next token.
        """


class TokenTagScanner:
    """Where every tag is one token."""

    def __init__(
        self, tags: Mapping[int, Tag], parse_outlines: OutlineParser, tokenizer: Tokenizer
    ) -> None:
        self._tags = tags
        self._parse_outlines = parse_outlines
        self._tokenizer = tokenizer
        self._scope: list[int] | None = None  # tokens since the scope was opened

    def push(self, token_id: int) -> Sighting | None:
        """See `TagScanner.push`."""
        tag = self._tags.get(token_id)
        if tag is None:
            if self._scope is not None:
                self._scope.append(token_id)
            return None
        if tag is Tag.BRANCH_END:
            return Sighting("branch_end")
        scope, self._scope = self._scope, [] if tag is Tag.SCOPE_OPEN else None
        if tag is Tag.SCOPE_OPEN:
            return None
        text = self._tokenizer.decode(scope or (), skip_special_tokens=False)
        return Sighting("fork", self._parse_outlines(text))


class TextTagScanner:
    """Where tags are spelled in several tokens, or share tokens with other text.

    ```
    text  [ ... | scope, in pieces | unread ]      unread: may be the beginning of a tag
    ```
    """

    def __init__(
        self, tags: Mapping[str, Tag], parse_outlines: OutlineParser, tokenizer: Tokenizer
    ) -> None:
        self._tags = tags
        self._parse_outlines = parse_outlines
        self._pattern = re.compile("|".join(map(re.escape, tags)))
        self._num_kept = max(map(len, tags)) - 1  # the longest part of a tag that is not all of it
        self._decoder = IncrementalDecoder(tokenizer, skip_special_tokens=False)
        self._scope: list[str] | None = None
        self._unread = ""

    def push(self, token_id: int) -> Sighting | None:
        """See `TagScanner.push`."""
        self._unread += self._decoder.push((token_id,), last=False)
        while match := self._pattern.search(self._unread):
            self._read(match.start())
            self._unread = self._unread[len(match[0]) :]
            tag = self._tags[match[0]]
            if tag is Tag.BRANCH_END:
                return Sighting("branch_end", tail=self._unread)
            scope, self._scope = self._scope, [] if tag is Tag.SCOPE_OPEN else None
            if tag is Tag.TRIGGER:
                outline_ids = self._parse_outlines("".join(scope or ()))
                return Sighting("fork", outline_ids, self._unread)
        self._read(max(len(self._unread) - self._num_kept, 0))
        return None

    def _read(self, num_characters: int) -> None:
        """Takes text without a tag off the unread."""
        if self._scope is not None:
            self._scope.append(self._unread[:num_characters])
        self._unread = self._unread[num_characters:]


def single_token(tokenizer: Tokenizer, tag: str) -> int | None:
    """The one token that always stands for a tag; None if there is no such token.

    A tag that is an ordinary word of the vocabulary can be one token alone and part of another
    between other characters (with the line feed that follows it).
    """
    ids = tokenizer.encode(tag, add_special_tokens=False)
    if len(ids) != 1 or tokenizer.decode(ids, skip_special_tokens=False) != tag:
        return None
    for character in "\n <>.a1":
        text = character + tag + character
        if ids[0] not in tokenizer.encode(text, add_special_tokens=False):
            return None
    return ids[0]
