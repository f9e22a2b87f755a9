"""A request inside the fake runtime: what was asked, how far it is.

Follows `LlmRequest` (batch_manager/llmRequest.h and llmRequest.cpp): context position and chunk
size, what a response holds, what cancelling does to tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from perf.trtllm_fake.block_tree import (
    DEFAULT_RETENTION,
    BlockCounts,
    BlockSequence,
    Retention,
    TokenBlocks,
)


class State(Enum):
    """Where a request is."""

    CONTEXT = "context"
    GENERATION = "generation"
    COMPLETE = "complete"


class Finish(Enum):
    """Why a request ended; names as in `FinishReason`."""

    NOT_FINISHED = "not_finished"
    END_ID = "end_id"
    STOP_WORDS = "stop_words"
    LENGTH = "length"
    TIMED_OUT = "timed_out"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn, with the executor's defaults filled in.

    Attributes:
        greedy: Take the best token; the default without top_k and top_p.
        temperature: Used if not greedy.
        top_k: 0 for all.
        top_p: 1 for all.
        seed: Draws depend on it and on the position *in the request*: the state begins anew with
            every request.
        min_tokens: The end token is not drawn before so many tokens.
    """

    greedy: bool = True
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    min_tokens: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Submission:
    """What a client asked for.

    Attributes:
        token_ids: Prompt; not copied, not to be changed.
        max_new_tokens: Tokens to generate at most.
        streaming: A response per step instead of one at the end.
        exclude_input: Without streaming, leave out the prompt.
        return_all_generated: With streaming, repeat all tokens so far in every response.
        return_perf_metrics: Add metrics to responses.
        client_id: Copied to responses.
        priority: Higher is admitted first.
        end_id: Ends the request and is not part of its output; None or -1 for none.
        stop_words: Token sequences that end the request and are part of its output.
        sampling: How to draw.
        retention: Of KV blocks.
        lora_id: Part of every block's key.
        cache_salt_id: The same.
        allotted_s: Time after admission at which the request is ended.
    """

    token_ids: Sequence[int]
    max_new_tokens: int
    streaming: bool = False
    exclude_input: bool = False
    return_all_generated: bool = False
    return_perf_metrics: bool = False
    client_id: int | None = None
    priority: float = 0.5
    end_id: int | None = None
    stop_words: tuple[tuple[int, ...], ...] = ()
    sampling: Sampling = Sampling()
    retention: Retention = DEFAULT_RETENTION
    lora_id: int | None = None
    cache_salt_id: int | None = None
    allotted_s: float | None = None


@dataclass(slots=True, eq=False)
class ActiveRequest:
    """A request that was fetched.

    Attributes:
        request_id: Its id.
        asked: What was asked for.
        text: Prompt and all tokens drawn; cancelling does not shorten it.
        prompt_len: Tokens of the prompt.
        max_new_tokens: As asked, but for the limit of the sequence length.
        fetched_s: When it was fetched.
        state: Where it is.
        position: Prompt tokens that are computed or were found.
        num_reused: Prompt tokens that were found; set with the first chunk.
        chunk_size: Prompt tokens of the next or running context step.
        sequence: Its blocks, from the launch of its first step to its end.
        counts: What its prompt took in blocks.
        num_visible: Tokens that the client may see, prompt included; the prompt's after a cancel.
        num_sent: Tokens up to which responses were made.
        finish: Why it ended.
        decoding_iter: Steps that drew a token for it.
        first_scheduled_s: Launch of its first step.
        first_token_s: When its first token was there.
        last_token_s: When it ended by itself.
        first_iter: Number of the step that drew the first token.
        last_iter: Number of the step that ended it.
        iter: Number of the latest step that drew a token.
    """

    request_id: int
    asked: Submission
    text: TokenBlocks
    prompt_len: int
    max_new_tokens: int
    fetched_s: float
    state: State = State.CONTEXT
    position: int = 0
    num_reused: int = 0
    chunk_size: int = 0
    sequence: BlockSequence | None = None
    counts: BlockCounts = field(default_factory=BlockCounts)
    num_visible: int = 0
    num_sent: int = 0
    finish: Finish = Finish.NOT_FINISHED
    decoding_iter: int = 0
    first_scheduled_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None
    first_iter: int | None = None
    last_iter: int | None = None
    iter: int | None = None
    _stop_tails: frozenset[int] = field(default_factory=frozenset)

    def __post_init__(self) -> None:
        self.chunk_size = self.prompt_len
        self.num_visible = self.num_sent = self.prompt_len
        self._stop_tails = frozenset(word[-1] for word in self.asked.stop_words if word)

    @property
    def priority(self) -> float:
        """As asked."""
        return self.asked.priority

    @property
    def num_tokens(self) -> int:
        """Prompt and drawn tokens."""
        return len(self.text.tokens)

    @property
    def num_generated(self) -> int:
        """Tokens that the client may see, without the prompt."""
        return self.num_visible - self.prompt_len

    @property
    def tokens_per_step(self) -> float:
        """Tokens that the client may see per step that drew one."""
        return self.num_generated / self.decoding_iter if self.decoding_iter else 0.0

    @property
    def is_finished(self) -> bool:
        """It will not run again."""
        return self.state is State.COMPLETE

    @property
    def is_first_chunk(self) -> bool:
        """No context step was launched yet."""
        return self.position == self.num_reused

    @property
    def remaining_context(self) -> int:
        """Prompt tokens that are not computed, as far as is known."""
        return self.prompt_len - self.position

    def set_chunk_size(self, num_tokens: int) -> None:
        """At most what remains."""
        self.chunk_size = min(num_tokens, self.remaining_context)

    def set_reused(self, num_tokens: int, tokens_per_block: int) -> None:
        """Moves the first chunk behind the tokens that were found.

        The chunk keeps its size; unless it reaches the end, it is cut to a block boundary.
        """
        self.num_reused = num_tokens
        if num_tokens == 0:
            return
        chunk_size = self.chunk_size
        if num_tokens + chunk_size < self.prompt_len:
            end = (num_tokens + chunk_size) // tokens_per_block * tokens_per_block
            chunk_size = end - num_tokens
        self.position = num_tokens
        self.set_chunk_size(chunk_size)

    @property
    def banned_id(self) -> int | None:
        """The end token, as long as it must not be drawn."""
        asked = self.asked
        return asked.end_id if self.num_generated < asked.sampling.min_tokens else None

    def take_token(self, token: int) -> None:
        """Adds a drawn token, or ends the request, or both.

        An end token is not added (TopK and TopP sampling kernels: the sequence length is not
        increased); a stop word is.
        """
        asked = self.asked
        self.decoding_iter += 1
        if token == asked.end_id:
            self.finish = Finish.END_ID
            return
        self.text.tokens.append(token)
        self.num_visible += 1
        if token in self._stop_tails and self._ends_with_stop_word():
            self.finish = Finish.STOP_WORDS
        elif self.num_generated >= self.max_new_tokens:
            self.finish = Finish.LENGTH

    def end_early(self, finish: Finish) -> None:
        """Cancels: nothing that was generated is visible any more."""
        self.finish = finish
        self.state = State.COMPLETE
        self.num_visible = self.prompt_len

    def timed_out(self, now_s: float) -> bool:
        """Its allotted time is over."""
        allotted_s = self.asked.allotted_s
        return allotted_s is not None and now_s - self.fetched_s >= allotted_s

    def take_output(self) -> list[int] | None:
        """Tokens of the next response; None if there is none now (`createResult`)."""
        asked = self.asked
        has_new = asked.streaming and self.num_visible > self.num_sent
        if not has_new and self.state is not State.COMPLETE:
            return None
        if not asked.streaming:
            start = self.prompt_len if asked.exclude_input else 0
        elif asked.return_all_generated:
            start = self.prompt_len
        else:
            start = self.num_sent
        self.num_sent = self.num_visible
        return self.text.tokens[start : self.num_visible].tolist()

    def _ends_with_stop_word(self) -> bool:
        tokens = self.text.tokens
        return any(
            len(tokens) >= len(word) and tuple(tokens[-len(word) :]) == word
            for word in self.asked.stop_words
            if word
        )
