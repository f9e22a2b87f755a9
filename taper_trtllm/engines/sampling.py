"""Drawing tokens: greedy, temperature, top-k, top-p.

A draw at a position of a sequence depends on the sequence's seed, the position and the logits, on
nothing else: not on the batch, not on how often the sequence was left out of a step. Noise is a
hash, the same on every device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from taper_trtllm.engines.base import SequenceParams

# Dividing logits by less than this leaves one candidate and may overflow.
_GREEDY_BELOW_TEMPERATURE = 1e-5
_UINT32, _UINT64 = (1 << 32) - 1, (1 << 64) - 1


def greedy_tokens(logits: torch.Tensor) -> torch.Tensor:
    """[rows] the best token of every row."""
    if logits.device.type == "cpu":
        return torch.from_numpy(logits.numpy().argmax(axis=-1))  # torch's is 8 times slower
    return logits.argmax(dim=-1)


def draw_tokens(
    logits: torch.Tensor, params: Sequence[SequenceParams], positions: Sequence[int]
) -> list[int]:
    """Draws one token for every row.

    Args:
        logits: [rows, vocab], float32.
        params: Of each row's sequence.
        positions: The position that each drawn token will have.

    Returns:
        [rows] token ids.
    """
    tokens = greedy_tokens(logits)
    draws = plan_draws(params, positions, logits.shape[-1], torch.from_numpy)
    if draws is not None:
        draw_into(tokens, logits, draws)
    return tokens.tolist()


@dataclass(frozen=True, slots=True)
class Draws:
    """The rows of a batch that are not greedy, and all that a device needs to draw for them.

    Attributes:
        rows: int32 [n] their rows; those with top-k or top-p first. On the device, as `columns`.
        columns: int32 [5, n]: bits of temperature and of top-p, top-k, two words of the seed.
        num_filtered: Rows with top-k or top-p.
        most_candidates: Largest top-k of them.
    """

    rows: torch.Tensor
    columns: torch.Tensor
    num_filtered: int
    most_candidates: int


def plan_draws(
    params: Sequence[SequenceParams],
    positions: Sequence[int],
    vocab_size: int,
    send: Callable[[npt.NDArray[np.int32]], torch.Tensor],
) -> Draws | None:
    """What drawing takes beyond the best token; None if all rows are greedy.

    Args:
        params: See `draw_tokens`.
        positions: See there.
        vocab_size: Tokens.
        send: Brings an array to the device.
    """
    rows = [i for i, p in enumerate(params) if p.sampling.temperature >= _GREEDY_BELOW_TEMPERATURE]
    if not rows:
        return None
    rows.sort(key=lambda i: not _is_filtered(params[i]))
    sampling = [params[i].sampling for i in rows]
    seeds = [_mix(params[i].seed, positions[i]) for i in rows]
    top_k = [min(s.top_k or vocab_size, vocab_size) for s in sampling]
    # Rounding may bring the sum to 1 early; without top-p nothing is dropped for it.
    top_p = [s.top_p if s.top_p < 1 else np.inf for s in sampling]
    columns = np.empty((5, len(rows)), dtype=np.int32)
    columns[:2].view(np.float32)[:] = [s.temperature for s in sampling], top_p
    columns[2] = top_k
    columns[3:].view(np.uint32)[:] = [x & _UINT32 for x in seeds], [x >> 32 for x in seeds]
    num_filtered = sum(_is_filtered(params[i]) for i in rows)
    most_candidates = max(top_k[:num_filtered], default=0)
    on_device = send(np.array(rows, dtype=np.int32)), send(columns)
    return Draws(*on_device, num_filtered, most_candidates)


def draw_into(tokens: torch.Tensor, logits: torch.Tensor, draws: Draws) -> None:
    """Replaces the tokens of the rows that are not greedy; the host waits for nothing.

    Args:
        tokens: int64 [rows of the batch].
        logits: [rows of the batch, vocab], float32.
        draws: Who draws how.
    """
    temperature, top_p = draws.columns[:2].view(torch.float32).unsqueeze(-1)
    scores = logits.index_select(0, draws.rows) / temperature
    if num := draws.num_filtered:
        top_k = draws.columns[2, :num].unsqueeze(-1)
        excluded = _excluded(scores[:num], top_k, top_p[:num], draws.most_candidates)
        scores[:num].masked_fill_(excluded, -torch.inf)
    scores += _gumbel_noise(draws.columns[3:], scores.shape[-1])
    tokens.index_copy_(0, draws.rows.long(), greedy_tokens(scores))


def _is_filtered(params: SequenceParams) -> bool:
    return bool(params.sampling.top_k) or params.sampling.top_p < 1


def _excluded(
    logits: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, most_candidates: int
) -> torch.Tensor:
    """[rows, vocab] what top-k, then top-p, excludes."""
    values = logits.topk(most_candidates, dim=-1).values  # descending
    ranks = torch.arange(most_candidates, device=logits.device)
    values = values.masked_fill(ranks >= top_k, -torch.inf)
    probabilities = values.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities  # mass of the better candidates
    dropped = (before >= top_p) & (ranks > 0)
    threshold = values.masked_fill(dropped | (values == -torch.inf), torch.inf)
    return logits < threshold.amin(dim=-1, keepdim=True)


def _gumbel_noise(seeds: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """[rows, vocab] noise that turns argmax into a draw.

    Compared with inverting the cumulative distribution, rounding differences between batches
    change a draw only where the two best scores nearly tie.

    Args:
        seeds: int32 [2, rows] two words.
        vocab_size: Tokens.
    """
    low, high = (seeds.long() & _UINT32).unsqueeze(-1)
    # A hash of 32 bits (https://github.com/skeeto/hash-prospector); products fit into 63 bits.
    x = torch.arange(vocab_size, device=seeds.device) ^ low
    x = (x ^ (x >> 16)).mul_(0x21F0AAAD).bitwise_and_(_UINT32).bitwise_xor_(high)
    x = (x ^ (x >> 15)).mul_(0x735A2D97).bitwise_and_(_UINT32)
    uniform = (x ^ (x >> 15)).float().add_(0.5).mul_(2.0**-32)
    # What wins is close to 0, where floats are dense.
    noise: torch.Tensor = uniform.neg_().log1p_().neg_().log_().neg_()
    return noise


def _mix(seed: int, position: int) -> int:
    """Hashes a sequence's seed and a position to 64 bits (splitmix64)."""
    x = (seed + (position + 1) * 0x9E3779B97F4A7C15) & _UINT64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _UINT64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _UINT64
    return x ^ (x >> 31)
