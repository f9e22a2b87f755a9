"""Drawing tokens: greedy, temperature, top-k, top-p.

A draw at a position of a sequence depends on the sequence's seed, the position and the logits, on
nothing else: not on the batch, not on how often the sequence was left out of a step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from taper_trtllm.engines.base import SequenceParams

# Dividing logits by less than this leaves one candidate and may overflow.
_GREEDY_BELOW_TEMPERATURE = 1e-5
_UINT64 = (1 << 64) - 1


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
    tokens = _argmax(logits)
    rows = [i for i, p in enumerate(params) if p.sampling.temperature >= _GREEDY_BELOW_TEMPERATURE]
    if rows:
        chosen = [params[i] for i in rows]
        scaled = logits[rows] / _column([p.sampling.temperature for p in chosen], logits)
        scores = _filter(scaled, chosen) + _gumbel_noise(
            scaled, [_mix(p.seed, positions[i]) for i, p in zip(rows, chosen, strict=True)]
        )
        for row, token in zip(rows, _argmax(scores), strict=True):
            tokens[row] = token
    return tokens


def _argmax(scores: torch.Tensor) -> list[int]:
    if scores.device.type == "cpu":
        tokens: list[int] = scores.numpy().argmax(axis=-1).tolist()  # torch's is 8 times slower
    else:
        tokens = scores.argmax(dim=-1).tolist()
    return tokens


def _filter(logits: torch.Tensor, params: Sequence[SequenceParams]) -> torch.Tensor:
    """Sets to -inf what top-k, then top-p, excludes."""
    rows = [i for i, p in enumerate(params) if p.sampling.top_k or p.sampling.top_p < 1]
    if not rows:
        return logits
    vocab = logits.shape[-1]
    top_k = [min(params[i].sampling.top_k or vocab, vocab) for i in rows]
    selected = logits[rows]
    values = selected.topk(max(top_k), dim=-1).values  # descending
    ranks = torch.arange(max(top_k), device=logits.device)
    values = values.masked_fill(ranks >= _column(top_k, logits), -torch.inf)
    probabilities = values.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities  # mass of the better candidates
    # Rounding may bring the sum to 1 early; without top-p nothing is dropped for it.
    limits = [p if (p := params[i].sampling.top_p) < 1 else torch.inf for i in rows]
    dropped = (before >= _column(limits, logits)) & (ranks > 0)
    threshold = values.masked_fill(dropped | (values == -torch.inf), torch.inf)
    threshold = threshold.amin(dim=-1, keepdim=True)
    filtered = logits.clone()
    filtered[rows] = selected.masked_fill(selected < threshold, -torch.inf)
    return filtered


def _gumbel_noise(like: torch.Tensor, seeds: Sequence[int]) -> torch.Tensor:
    """Noise that turns argmax into a draw; each row has a generator of its own.

    Compared with inverting the cumulative distribution, rounding differences between batches
    change a draw only where the two best scores nearly tie.
    """
    noise = torch.empty_like(like)
    generator = torch.Generator(device=like.device)
    for row, seed in zip(noise, seeds, strict=True):
        row.exponential_(generator=generator.manual_seed(seed))
    return noise.log_().neg_()


def _mix(seed: int, position: int) -> int:
    """Hashes a sequence's seed and a position to a generator's seed (splitmix64)."""
    x = (seed + (position + 1) * 0x9E3779B97F4A7C15) & _UINT64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _UINT64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _UINT64
    return x ^ (x >> 31)


def _column(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).unsqueeze(1)
