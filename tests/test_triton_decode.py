"""The decode kernels against plain attention, interpreted, and compiled for a Hopper GPU.

With a GPU, `TRITON_INTERPRET=0 pytest tests/test_triton_decode.py` runs the compiled kernels.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip(
    "triton", reason="the Triton language is not installed (Linux: scripts/setup.sh does)"
)

from triton.runtime import interpreter

from taper_trtllm.engines.prefix_tiles import SharedPrefixes, tile_prefixes
from taper_trtllm.engines.triton_decode import (
    DecodeWorkspace,
    cascade_decode_attention,
    paged_decode_attention,
    plan_splits,
)

pytestmark = pytest.mark.filterwarnings(  # the interpreter's, thousands of them
    "ignore:Conversion of an array:DeprecationWarning"
)
INTERPRETED = os.environ["TRITON_INTERPRET"] == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
H100_SMS = 132
# Of the largest output. Weights are rounded to the KV's type, and so is the output.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@pytest.fixture(autouse=True)
def bf16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numpy has no bf16: the interpreter would multiply the bits as integers."""
    create_dot = interpreter.InterpreterBuilder.create_dot

    def in_float32(self: Any, a: Any, b: Any, *others: Any) -> Any:
        return create_dot(self, *(_to_float32(self, x) for x in (a, b)), *others)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", in_float32)


def _to_float32(builder: Any, x: Any) -> Any:
    is_bf16 = x.dtype.scalar == interpreter.tl.bfloat16
    return builder.cast_impl(x, interpreter.tl.float32) if is_bf16 else x


@dataclass
class Batch:
    """Inputs of a step and what is expected; whatever must not be read is NaN or no block."""

    queries: torch.Tensor
    layer_kv: torch.Tensor
    block_tables: torch.Tensor
    context_lens: torch.Tensor
    workspace: DecodeWorkspace
    expected: torch.Tensor

    @property
    def inputs(self) -> tuple[torch.Tensor, ...]:
        return self.queries, self.layer_kv, self.block_tables, self.context_lens

    def check(self, attended: torch.Tensor) -> None:
        assert attended.dtype == self.queries.dtype and attended.is_contiguous()
        error = (attended.double() - self.expected).abs().max() / self.expected.abs().max()
        assert error <= TOLERANCE[self.queries.dtype]


@dataclass(frozen=True)
class Shape:
    shared_heads: int
    num_kv_heads: int
    head_dim: int
    tokens_per_block: int
    num_sms: int
    dtype: torch.dtype = torch.float32

    @property
    def num_heads(self) -> int:
        return self.shared_heads * self.num_kv_heads


def make_batch(
    shape: Shape, groups: list[tuple[int, list[int]]], num_padding_rows: int = 0, seed: int = 0
) -> Batch:
    """A batch of groups, each of blocks that all its members share and of their own tokens."""
    generator = torch.Generator().manual_seed(seed)
    size = shape.tokens_per_block
    rows = [(blocks, own) for blocks, members in groups for own in members]
    lens = [blocks * size + own for blocks, own in rows] + [1] * num_padding_rows
    width = -(-max(lens) // size) + 2
    num_blocks = 1 + sum(b for b, _ in groups) + sum(-(-own // size) for _, own in rows)
    free = iter((1 + torch.randperm(num_blocks - 1, generator=generator)).tolist())
    tables = torch.full((len(lens), width), 1 << 30, dtype=torch.int32)
    tables[len(rows) :, 0] = 0
    kv = torch.full((num_blocks, size, 2, shape.num_kv_heads, shape.head_dim), torch.nan)
    kv[0, 0] = 0
    row = 0
    for blocks, members in groups:
        prefix = [next(free) for _ in range(blocks)]
        for own in members:
            ids = prefix + [next(free) for _ in range(-(-own // size))]
            tables[row, : len(ids)] = torch.tensor(ids)
            row += 1
    for table, length in zip(tables, lens, strict=True):
        tokens = torch.arange(length)
        blocks_of = table[tokens // size].long(), tokens % size
        if table[0]:
            kv[blocks_of] = torch.randn(length, *kv.shape[2:], generator=generator)
    kv = kv.to(shape.dtype)
    wide = (len(lens), shape.num_heads + 2 * shape.num_kv_heads, shape.head_dim)
    qkv = (2 * torch.randn(wide, generator=generator)).to(shape.dtype)
    queries = qkv[:, : shape.num_heads]
    workspace = DecodeWorkspace(
        len(lens), shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.num_sms, DEVICE
    )
    workspace.attended.fill_(torch.nan)
    workspace.log_sums.fill_(torch.nan)
    return Batch(
        queries=qkv.to(DEVICE)[:, : shape.num_heads],
        layer_kv=kv.to(DEVICE),
        block_tables=tables.to(DEVICE),
        context_lens=torch.tensor(lens, dtype=torch.int32, device=DEVICE),
        workspace=workspace,
        expected=reference(queries, kv, tables, lens).to(DEVICE),
    )


def reference(
    queries: torch.Tensor, layer_kv: torch.Tensor, tables: torch.Tensor, lens: list[int]
) -> torch.Tensor:
    """Attention row by row, in float64."""
    rows = []
    for query, table, length in zip(queries, tables, lens, strict=True):
        num_blocks = -(-length // layer_kv.shape[1])
        context = layer_kv[table[:num_blocks].long()].flatten(0, 1)[:length].double()
        keys, values = context.transpose(0, 1).transpose(1, 2)  # [kv heads, length, head_dim]
        shared = query.double().view(len(keys), -1, query.shape[-1])
        weights = (shared @ keys.mT / query.shape[-1] ** 0.5).softmax(-1)
        rows.append((weights @ values).flatten(0, 1))
    return torch.stack(rows)


def shared_prefixes(batch: Batch, groups: list[tuple[int, int]]) -> SharedPrefixes:
    """On the device, for groups of (rows, tokens of their prefix)."""
    tiled = tile_prefixes(groups, len(batch.queries), batch.workspace.rows_per_tile)
    return SharedPrefixes(*(torch.from_numpy(array).to(DEVICE) for array in tiled))


shapes = st.builds(
    Shape,
    shared_heads=st.sampled_from([1, 2, 5, 8]),
    num_kv_heads=st.sampled_from([1, 2]),
    head_dim=st.sampled_from([32, 64, 128]),
    tokens_per_block=st.sampled_from([4, 16, 32, 64]),
    num_sms=st.sampled_from([1, 8]),
)
lengths = st.integers(1, 300)


# ------------------------------------------------------------------ results


@settings(max_examples=10, deadline=None)
@given(shapes, st.lists(lengths, min_size=1, max_size=4), st.integers(0, 1), st.integers(0, 99))
def test_decode_is_attention_to_the_whole_context(shape, lens, num_padding_rows, seed):
    batch = make_batch(shape, [(0, [length]) for length in lens], num_padding_rows, seed)
    batch.check(paged_decode_attention(*batch.inputs, workspace=batch.workspace))


@settings(max_examples=6, deadline=None)
@given(
    shapes,
    st.lists(
        st.tuples(st.integers(0, 6), st.lists(st.integers(1, 150), min_size=1, max_size=3)),
        min_size=1,
        max_size=2,
    ),
    st.integers(0, 1),
    st.integers(0, 99),
)
def test_a_shared_prefix_changes_nothing(shape, groups, num_padding_rows, seed):
    batch = make_batch(shape, groups, num_padding_rows, seed)
    prefixes = shared_prefixes(
        batch, [(len(own), blocks * shape.tokens_per_block) for blocks, own in groups]
    )
    batch.check(cascade_decode_attention(*batch.inputs, prefixes, workspace=batch.workspace))


def test_a_group_may_be_more_than_a_tile():
    batch = make_batch(Shape(32, 1, 32, 16, 1), [(1, [5, 1, 9]), (9, [1, 40, 17, 2])])
    assert batch.workspace.rows_per_tile == 2
    prefixes = shared_prefixes(batch, [(3, 16), (4, 144)])
    batch.check(cascade_decode_attention(*batch.inputs, prefixes, workspace=batch.workspace))


def test_splits_of_a_long_context_are_longer():
    batch = make_batch(Shape(2, 1, 32, 64, 8), [(0, [2200])])
    splits = batch.workspace.splits(1)
    assert splits.num_splits * splits.min_tokens < 2200
    batch.check(paged_decode_attention(*batch.inputs, workspace=batch.workspace))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    groups = [(4, [1, 100, 30]), (0, [200])]
    batch = make_batch(Shape(8, 1, 128, 32, 8, dtype), groups)
    batch.check(paged_decode_attention(*batch.inputs, workspace=batch.workspace))
    prefixes = shared_prefixes(batch, [(3, 128)])
    batch.check(cascade_decode_attention(*batch.inputs, prefixes, workspace=batch.workspace))


def test_the_result_is_where_it_is_asked_for():
    batch = make_batch(Shape(2, 1, 32, 16, 1), [(0, [20])])
    out = torch.full(batch.queries.shape, torch.nan, device=DEVICE)
    assert paged_decode_attention(*batch.inputs, workspace=batch.workspace, out=out) is out
    batch.check(out)


# ------------------------------------------------------------------ plans


@pytest.mark.parametrize(
    ("num_rows", "context", "num_programs"),
    [
        (1, 2048, 8 * 32),
        (1, 32768, 8 * 64),
        (8, 2048, 8 * 8 * 8),
        (64, 2048, 64 * 8),
        (64, 32768, 64 * 8 * 8),
    ],
)
def test_splits_fill_an_h100_and_no_more(num_rows, context, num_programs):
    splits = plan_splits(num_rows, num_kv_heads=8, num_sms=H100_SMS)
    num_splits = min(-(-context // splits.min_tokens), splits.num_splits)
    assert num_rows * 8 * num_splits == num_programs
    assert num_programs >= H100_SMS


@given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(0, 9)), max_size=8),
    st.integers(0, 5),
    st.integers(1, 8),
)
def test_every_row_is_in_one_tile(groups, num_others, rows_per_tile):
    num_rows = sum(size for size, _ in groups) + num_others
    tiles, prefix_lens = tile_prefixes(groups, num_rows, rows_per_tile)
    assert tiles.shape == (num_rows, 3) and tiles.dtype == prefix_lens.dtype == np.int32
    covered = [row for first, size, _ in tiles for row in range(first, first + size)]
    assert covered == list(range(num_rows))
    for first, size, prefix_len in tiles:
        assert size <= rows_per_tile
        assert (prefix_lens[first : first + size] == prefix_len).all()
    expected = [prefix if size > 1 else 0 for size, prefix in groups for _ in range(size)]
    assert prefix_lens.tolist() == expected + [0] * num_others


@pytest.mark.parametrize(
    ("shape", "named"),
    [((8, 4, 48), "head_dim"), ((8, 3, 64), "num_heads"), ((8, 4, 8), "head_dim")],
)
def test_a_shape_that_does_not_fit_is_refused(shape, named):
    with pytest.raises(ValueError, match=named):
        DecodeWorkspace(4, *shape, H100_SMS, DEVICE)


# ------------------------------------------------------------------ compiled


def test_compiled_for_hopper(tmp_path):
    """What Qwen3-32B in bf16 launches: tensor cores, loads ahead, no register spilled."""
    script = Path(__file__).with_name("compile_triton_decode.py")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    command = [sys.executable, script, "64", "8", "128"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    launches = json.loads(result.stdout)
    for launch in launches:
        assert launch["STACK"] == launch["LOCAL"] == 0, launch
        assert launch["shared_bytes"] <= 227 << 10, launch
        if launch["kernel"] == "attend_split":
            assert launch["mma"] and launch["async_copies"], launch
    plain, cascade = ["attend_split", "merge_splits"], ["attend_split", "attend_split"]
    steps = [launch["kernel"] for launch in launches]
    assert steps == 2 * [*plain, *cascade, "merge_splits"]
