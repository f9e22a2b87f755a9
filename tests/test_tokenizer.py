from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from taper_trtllm.config import TorchEngineConfig
from taper_trtllm.request import ParallelStage, RequestError, build_request
from taper_trtllm.tokenizer import (
    ByteTokenizer,
    IncrementalDecoder,
    Tokenizer,
    load_tokenizer,
    resolve_texts,
)

TEXT = "Fork: naïve café — 東京 🦊🇩🇪 a‍b\n\n  tail"


@pytest.fixture(scope="module")
def checkpoint_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a byte-level BPE tokenizer, the kind that Qwen3 has."""
    fast = FastTokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fast.train_from_iterator([TEXT] * 4, trainer)
    directory = tmp_path_factory.mktemp("checkpoint")
    PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<|end|>").save_pretrained(directory)
    return directory


def stream(tokenizer: Tokenizer, pieces: list[list[int]]) -> list[str]:
    decoder = IncrementalDecoder(tokenizer)
    return [decoder.push(piece, last=i == len(pieces) - 1) for i, piece in enumerate(pieces)]


@given(st.text(min_size=1), st.lists(st.integers(1, 5), min_size=1))
def test_streamed_pieces_add_up_to_the_text(text: str, sizes: list[int]) -> None:
    ids = iter(ByteTokenizer().encode(text, add_special_tokens=False))
    pieces = [
        list(itertools.islice(ids, size))
        for size in itertools.islice(itertools.cycle(sizes), len(text.encode()))
    ]
    streamed = stream(ByteTokenizer(), [piece for piece in pieces if piece])
    assert "".join(streamed) == text
    assert all("\ufffd" not in piece for piece in streamed) or "\ufffd" in text


def test_checkpoint_tokenizer_round_trips_and_streams(checkpoint_dir: Path) -> None:
    tokenizer = load_tokenizer(TorchEngineConfig(model_dir=checkpoint_dir))
    assert tokenizer is not None
    ids = tokenizer.encode(TEXT, add_special_tokens=True)
    assert tokenizer.decode(ids) == TEXT
    assert "".join(stream(tokenizer, [[i] for i in ids])) == TEXT
    end = tokenizer.encode("<|end|>", add_special_tokens=False)
    assert stream(tokenizer, [ids, end])[-1] == ""
    assert tokenizer.decode([*end, *ids], skip_special_tokens=False) == "<|end|>" + TEXT
    decoder = IncrementalDecoder(tokenizer, skip_special_tokens=False)
    assert [decoder.push(part, last=False) for part in (ids, end)] == [TEXT, "<|end|>"]


def test_only_the_character_that_is_incomplete_is_held_back() -> None:
    fox = list("🦊".encode())
    pieces = [[65, fox[0]], fox[1:3], [fox[3], 66, *fox[:3]], [fox[3]]]
    assert stream(ByteTokenizer(), pieces) == ["A", "", "🦊B", "🦊"]


def test_garbage_is_not_held_back_for_ever() -> None:
    pieces = stream(ByteTokenizer(), [[0x80]] * 100)
    assert sum(map(len, pieces[:50])) >= 25


def test_texts_of_a_program_become_ids() -> None:
    inner = {"type": "parallel", "branches": [{"max_tokens": 1, "header_text": "é"}]}
    stages = [
        {
            "type": "parallel",
            "branches": [{"max_tokens": 1, "header_ids": [7]}, {"stages": [inner]}],
            "join_text": "ab",
        }
    ]
    request = build_request(request_id="r", input_ids=[1], stages=stages)
    (stage,) = resolve_texts(request, ByteTokenizer()).stages
    assert isinstance(stage, ParallelStage)
    assert (stage.join_ids, stage.join_text) == ((97, 98), None)
    assert stage.branches[0].header_ids == (7,)
    (nested,) = stage.branches[1].program
    assert isinstance(nested, ParallelStage)
    assert nested.branches[0].header_ids == (0xC3, 0xA9)


@pytest.mark.parametrize(
    ("branch", "tokenizer", "field"),
    [
        ({"header_text": "a"}, None, "stages[0].branches[1].header_text"),
        ({"header_text": "a", "header_ids": [1]}, ByteTokenizer(), "stages[0].branches[1]."),
        ({"header_text": "\ud800"}, ByteTokenizer(), "stages[0].branches[1].header_text"),
    ],
)
def test_texts_that_cannot_be_resolved_name_the_field(
    branch: dict[str, object], tokenizer: Tokenizer | None, field: str
) -> None:
    branches = [{"max_tokens": 1}, {"max_tokens": 1, **branch}]
    request = build_request(
        request_id="r", input_ids=[1], stages=[{"type": "parallel", "branches": branches}]
    )
    with pytest.raises(RequestError, match="^" + field.replace("[", r"\[").replace("]", r"\]")):
        resolve_texts(request, tokenizer)


def test_a_checkpoint_without_tokenizer_has_none(tmp_path: Path) -> None:
    assert load_tokenizer(TorchEngineConfig(model_dir=tmp_path)) is None
