"""A toy engine whose KV knows what it was computed from, and what a request decodes on it alone.

The KV of a token is a hash of the token, its position and the sum of the KV of all that it saw. So
a position, a mask or a copy that is wrong anywhere changes what is drawn.
"""

from __future__ import annotations

from collections.abc import Container, Sequence

from toy_engine import ToyEngine, next_token

from taper_trtllm.request import ForkJoinRequest, SerialStage
from taper_trtllm.token_spans import cut


def kv_of(token: int, position: int, seen: int) -> int:
    return hash((token, position, seen))


class MergingEngine(ToyEngine):
    kv_merge = True

    def _copy_kv(self, sources, targets) -> None:
        size = self.pool.tokens_per_block
        read = [self._content[divmod(source, size)] for source in sources]
        for target, kv in zip(targets, read, strict=True):
            self._content[divmod(target, size)] = kv

    def _write(self, sequence, start, num_tokens) -> None:
        for first, last, span in cut(sequence.spans, start, start + num_tokens):
            hidden = {i for begin, end in span.hidden for i in range(begin, end)}
            for index in range(first, last):
                seen = sum(self._kv(sequence, i) for i in range(index) if i not in hidden)
                kv = kv_of(sequence.tokens[index], index - span.shift, seen)
                self._content[self._slot(sequence, index)] = kv
        self.num_computed += num_tokens

    def _draw(self, sequence) -> int:
        seed = sequence.params.seed if sequence.params.sampling.temperature else 0
        return self._say(self._kv(sequence, len(sequence.tokens) - 1), seed)

    def _say(self, kv: int, seed: int) -> int:
        return next_token([kv], seed)

    def _kv(self, sequence, index: int) -> int:
        return self._content[self._slot(sequence, index)]


class Context:
    """What a branch sees: the KV of all tokens, and the position of the next one."""

    def __init__(self, kv: Sequence[int] = (), position: int = 0) -> None:
        self.kv, self.position = [*kv], position

    def then(self, tokens: Sequence[int]) -> Context:
        kv, seen = [*self.kv], sum(self.kv)
        for index, token in enumerate(tokens):
            kv.append(kv_of(token, self.position + index, seen))
            seen += kv[-1]
        return Context(kv, self.position + len(tokens))

    def merged(self, branches: Sequence[Context]) -> Context:
        """Behind branches that went on from here, each by itself."""
        kv = [*self.kv, *(kv for branch in branches for kv in branch.kv[len(self.kv) :])]
        return Context(kv, max((b.position for b in branches), default=self.position))


def alone(
    request: ForkJoinRequest, seed_of, cancelled: Container[str] = ()
) -> dict[tuple[str, int], list[int]]:
    """Decoded tokens by (branch path, stage index), in the request's join mode."""
    outputs: dict[tuple[str, int], list[int]] = {}

    def decode(path: str, context: Context, max_tokens: int) -> list[int]:
        seed = seed_of(request, path) if request.sampling.temperature else 0
        new: list[int] = []
        while len(new) < max_tokens and not (new and new[-1] in request.sampling.stop_ids):
            new.append(next_token(context.kv[-1:], seed))
            context = context.then(new[-1:])
        return new

    def run(path: str, context: Context, program) -> tuple[Context, list[int]]:
        text: list[int] = []
        for index, stage in enumerate(program):
            if isinstance(stage, SerialStage):
                new = outputs[path, index] = decode(path, context, stage.max_tokens)
                context, text = context.then(new), text + new
                continue
            base = f"{path}.{index}" if path else str(index)
            branches, texts = [], []
            for number, branch in enumerate(stage.branches):
                if f"{base}.{number}" in cancelled:
                    continue
                begun = context.then(branch.header_ids)
                ended, own = run(f"{base}.{number}", begun, branch.program)
                branches.append(ended)
                texts += [*branch.header_ids, *own]
            merges = request.join_mode == "kv_merge"
            context = context.merged(branches) if merges else context.then(texts)
            context = context.then(stage.join_ids)
            text += [*texts, *stage.join_ids]
        return context, text

    run("", Context().then(request.input_ids), request.program)
    return outputs
