"""Decode in fixed shapes on a CPU: what a GPU runs, but for the capture.

With a GPU, `TRITON_INTERPRET=0 pytest tests/test_bucket_runner.py` runs it there, from CUDA graphs.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import torch
from reference_attention import ReferenceAttention
from test_torch_engine import (
    CONFIG,
    GREEDY,
    MODEL,
    RandomFamilies,
    decode,
    generate,
    hugging_face_model,
    oracle,
    prompt,
)
from transformers import Qwen3ForCausalLM

from taper_trtllm.engines import bucket_batch, create_engine
from taper_trtllm.engines.base import Engine, PrefillChunk, SequenceParams, StepPlan
from taper_trtllm.engines.checkpoint import open_checkpoint
from taper_trtllm.engines.torch_engine import TorchEngine
from taper_trtllm.request import SamplingParams

__all__ = ["oracle"]


@pytest.mark.parametrize("shares", [False, True])
@pytest.mark.parametrize("seed", range(2))
def test_random_families_equal_unbatched_generation(
    oracle: Qwen3ForCausalLM, monkeypatch: pytest.MonkeyPatch, seed: int, shares: bool
) -> None:
    monkeypatch.setattr(bucket_batch, "_MIN_SAVED_TOKENS", 0)
    attention = ReferenceAttention()
    config = CONFIG.model_copy(update={"prefix_sharing_attention": shares})
    engine = TorchEngine(config, attention)
    families = RandomFamilies(engine, seed)
    families.run()

    assert engine.num_free_blocks == CONFIG.num_kv_blocks
    assert families.num_joined > 3 and families.num_preempted > 10
    assert attention.widths <= set(engine.capabilities.width_buckets or ())
    assert len(attention.widths) > 3
    assert (attention.num_shared == attention.rows_per_tile) == shares
    for context, drawn in filter(lambda run: run[1], families.runs):
        assert drawn == generate(oracle, context, len(drawn))


SAMPLING = [
    SamplingParams(),
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.7, top_k=20),
    SamplingParams(temperature=1.3, top_p=0.8),
    SamplingParams(temperature=1.1, top_k=200, top_p=0.9),
]


def tokens_of(engine: Engine, num_steps: int = 16) -> dict[int, list[int]]:
    """Greedy and sampled; decode alone, chunks alone, both; copies of tails."""
    rng = random.Random(1)
    drawn: dict[int, list[int]] = {}
    for i, sampling in enumerate(SAMPLING):
        engine.add_sequence(i, i, prompt(rng, 20 + 9 * i), SequenceParams(sampling, seed=i))
    engine.step(StepPlan(prefill=tuple(PrefillChunk(i, 7, sample=False) for i in range(5))))
    for step in range(num_steps):
        live = [*range(5), *(child for child in range(5, 8) if step > 8)]
        if step == 8:
            for child in range(5, 8):
                params = SequenceParams(SAMPLING[child - 4], seed=child)
                engine.fork_sequence(2, child, engine.num_computed_tokens(2), (), params)
        pending = {i: engine.num_tokens(i) - engine.num_computed_tokens(i) for i in live}
        chosen = [i for i in live if pending[i] == 1 and (step > 12 or rng.random() < 0.7)]
        chunks = tuple(
            PrefillChunk(i, min(n, 11), sample=n <= 11) for i, n in pending.items() if n > 1
        )
        if chosen or chunks:
            result = engine.step(StepPlan(decode=tuple(chosen), prefill=chunks))
            for i, tokens in result.tokens.items():
                drawn.setdefault(i, []).extend(tokens)
    return drawn


def test_tokens_equal_those_of_flat_batches() -> None:
    attention = ReferenceAttention()
    tokens = tokens_of(TorchEngine(CONFIG, attention))
    assert tokens == tokens_of(create_engine(CONFIG))
    assert min(map(len, tokens.values())) > 4 and len(tokens) == 8
    assert {4, 8} <= attention.widths


INTERPRETED = os.environ["TRITON_INTERPRET"] == "1"


@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")  # interpreter
@pytest.mark.parametrize("shares", [True] if INTERPRETED else [False, True])  # it is slow
def test_tokens_with_the_kernels_equal_those_of_flat_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shares: bool
) -> None:
    pytest.importorskip("triton")
    from taper_trtllm.engines.triton_attention import TritonAttention

    monkeypatch.setattr(bucket_batch, "_MIN_SAVED_TOKENS", 0)
    narrow = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = hugging_face_model(MODEL.model_copy(update=narrow))
    model.save_pretrained(tmp_path)
    flat = CONFIG.model_copy(update={"model_dir": tmp_path, "max_batch_size": 16})
    config = flat.model_copy(update={"prefix_sharing_attention": shares})
    if INTERPRETED:
        shape = open_checkpoint(tmp_path).config
        attention = TritonAttention(shape, 16, num_sms=1, device=torch.device("cpu"))
        engine: Engine = TorchEngine(config, attention)
    else:
        engine = create_engine(config.model_copy(update={"device": "cuda"}))
    assert tokens_of(engine, 11) == tokens_of(create_engine(flat), 11)


def test_padding_is_seen_by_nobody() -> None:
    """Three sequences at the width of four; the fourth row writes to no block that has an owner."""
    attention = ReferenceAttention()
    engine = TorchEngine(CONFIG, attention)
    rng = random.Random(2)
    for i in range(3):
        engine.add_sequence(i, i, prompt(rng, 17), GREEDY)
        engine.step(StepPlan(prefill=(PrefillChunk(i, 17, sample=True),)))
    kv = engine._kv.layers
    before = [layer.clone() for layer in kv]
    decode(engine, 0, 1, 2)
    assert attention.widths == {4}
    changed = {
        int(block)
        for old, new in zip(before, kv, strict=True)
        for block in torch.nonzero((old != new).flatten(1).any(1))
    }
    tails = {engine._sequences[i].table.block_ids[-1] for i in range(3)}
    assert changed - {0} == tails


def test_buckets_end_at_the_largest_batch() -> None:
    assert bucket_batch.width_buckets(5) == (1, 2, 4, 5)
    assert bucket_batch.width_buckets(64)[-2:] == (48, 64)
    assert bucket_batch.width_buckets(1100)[-4:] == (512, 768, 1024, 1100)
