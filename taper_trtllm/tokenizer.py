"""Text to token ids and back: requests that come as text, and branches that stream as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from taper_trtllm.config import EngineConfig
from taper_trtllm.request import (
    Branch,
    ForkJoinRequest,
    ParallelStage,
    RequestError,
    SerialStage,
)

_REPLACEMENT = "\ufffd"  # what an incomplete UTF-8 sequence decodes to
_MAX_CHARACTER_TOKENS = 4  # a character is at most four bytes, a token at least one
_MAX_HELD_TOKENS = 16  # more can only be bytes that are not text


class Tokenizer(Protocol):
    """What serving needs of a tokenizer."""

    end_id: int | None
    """Token that ends a text, unless the request names another; None if there is none."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a text; with the model's own prefix for the beginning of a prompt."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of the ids; special tokens are left out, unless that is switched off."""


class ByteTokenizer:
    """UTF-8 bytes, for the random model: id = byte; ids above 255 stand for no text."""

    end_id: int | None = None

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """The text's bytes."""
        return list(text.encode())

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The bytes among the ids, as UTF-8; there are no special tokens."""
        return bytes(i for i in token_ids if i < 256).decode(errors="replace")


class HuggingFaceTokenizer:
    """The tokenizer of a checkpoint directory."""

    def __init__(self, model_dir: str) -> None:
        """Reads the directory; nothing is downloaded.

        Raises:
            OSError: It holds no tokenizer.
        """
        from transformers import AutoTokenizer  # the extra `tokenizer`; byte ids need none

        self._tokenizer: Any = AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
        self.end_id: int | None = self._tokenizer.eos_token_id

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """See `Tokenizer.encode`."""
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens))

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """See `Tokenizer.decode`."""
        text: str = self._tokenizer.decode(
            list(token_ids),
            skip_special_tokens=skip_special_tokens,
            clean_up_tokenization_spaces=False,
        )
        return text


def load_tokenizer(config: EngineConfig) -> Tokenizer | None:
    """The tokenizer of the served model; None if its checkpoint comes without one."""
    if config.model_dir is None:
        return ByteTokenizer() if config.kind == "torch" else None
    if not (config.model_dir / "tokenizer_config.json").exists():
        return None
    return HuggingFaceTokenizer(str(config.model_dir))


class IncrementalDecoder:
    """Text of a growing list of tokens, piece by piece; the pieces add up to the whole text.

    ```
    window  [ context | new ]     context: tokens before the last cut between characters
    ```
    New tokens are decoded together with some before them, because what a token adds can depend on
    the one before (spaces). A character is held back while its bytes are incomplete.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._window: list[int] = []
        self._num_context_tokens = 0
        self._num_sent_characters = 0  # of the window's text

    def push(self, token_ids: Sequence[int], *, last: bool) -> str:
        """Adds tokens and returns the text that is complete; all that is left if `last`."""
        self._window += token_ids
        text = self._decode(len(self._window))
        cut = len(self._window) if last else self._last_cut(text)
        end = len(text) if cut == len(self._window) else len(text.rstrip(_REPLACEMENT))
        piece = text[self._num_sent_characters : end]
        self._num_sent_characters = max(self._num_sent_characters, end)
        if cut > self._num_context_tokens:
            self._move_context(cut, text)
        return piece

    def _last_cut(self, text: str) -> int:
        """The last place between tokens of the window that is not inside a character."""
        end = len(self._window)
        if not text.endswith(_REPLACEMENT):
            return end
        for cut in range(end - 1, max(self._num_context_tokens, end - _MAX_CHARACTER_TOKENS), -1):
            if not self._decode(cut).endswith(_REPLACEMENT):
                return cut
        num_held = end - self._num_context_tokens
        return end if num_held > _MAX_HELD_TOKENS else self._num_context_tokens

    def _move_context(self, cut: int, text: str) -> None:
        num_behind = self._num_sent_characters - len(
            text if cut == len(self._window) else self._decode(cut)
        )
        del self._window[: self._num_context_tokens]
        self._num_context_tokens = cut - self._num_context_tokens
        self._num_sent_characters = len(self._decode(self._num_context_tokens)) + num_behind

    def _decode(self, end: int) -> str:
        return self._tokenizer.decode(
            self._window[:end], skip_special_tokens=self._skip_special_tokens
        )


def encode_text(
    tokenizer: Tokenizer | None, field: str, text: str, *, is_prompt: bool
) -> list[int]:
    """Token ids of a text in a request.

    Raises:
        RequestError: Names `field`; the model has no tokenizer, or it is not valid text.
    """
    if tokenizer is None:
        raise RequestError(field, "the served model has no tokenizer; send token ids")
    if any("\ud800" <= character <= "\udfff" for character in text):  # JSON lets these through
        raise RequestError(field, "not valid Unicode (a surrogate without its pair)")
    return tokenizer.encode(text, add_special_tokens=is_prompt)


def resolve_texts(request: ForkJoinRequest, tokenizer: Tokenizer | None) -> ForkJoinRequest:
    """Replaces every `header_text` and `join_text` by its ids.

    Raises:
        RequestError: Names the field; ids and text are both given, or there is no tokenizer.
    """
    stages = tuple(
        _resolve_stage(stage, tokenizer, f"stages[{i}]") for i, stage in enumerate(request.stages)
    )
    return request.model_copy(update={"stages": stages})


def _resolve_stage(
    stage: SerialStage | ParallelStage, tokenizer: Tokenizer | None, at: str
) -> SerialStage | ParallelStage:
    if isinstance(stage, SerialStage):
        return stage
    branches = tuple(
        _resolve_branch(branch, tokenizer, f"{at}.branches[{i}]")
        for i, branch in enumerate(stage.branches)
    )
    join_ids = _resolve_ids(stage.join_ids, stage.join_text, tokenizer, f"{at}.join_text")
    return stage.model_copy(update={"branches": branches, "join_ids": join_ids, "join_text": None})


def _resolve_branch(branch: Branch, tokenizer: Tokenizer | None, at: str) -> Branch:
    header_ids = _resolve_ids(branch.header_ids, branch.header_text, tokenizer, f"{at}.header_text")
    stages = branch.stages and tuple(
        _resolve_stage(stage, tokenizer, f"{at}.stages[{i}]")
        for i, stage in enumerate(branch.stages)
    )
    return branch.model_copy(
        update={"header_ids": header_ids, "header_text": None, "stages": stages}
    )


def _resolve_ids(
    ids: tuple[int, ...], text: str | None, tokenizer: Tokenizer | None, field: str
) -> tuple[int, ...]:
    if text is None:
        return ids
    if ids:
        raise RequestError(field, f"give {field.rpartition('.')[2]} or the ids, not both")
    return tuple(encode_text(tokenizer, field, text, is_prompt=False))
