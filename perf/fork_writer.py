r"""A tiny model that writes forks, for demos and tests: ``python -m perf.fork_writer``.

Branch-trained checkpoints have billions of parameters. This one has half a million, learns a few
documents of a fork format by heart in a minute or two on a CPU, and is served like any other
checkpoint (``engine.model_dir``): it opens blocks, its branches go their ways, and it concludes
from what they found. What it says is learnt, how it is served is real.

  python -m perf.fork_writer --fork-format multiverse --output-dir results/fork_writer
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from perf.argument_types import positive_int
from taper_trtllm.fork_format import FORMATS, BoundForkFormat, ForkFormat

_BY_HEART = 0.8
_GROUP = 3  # texts of like length, so that little is padded


@dataclass(frozen=True, slots=True)
class Block:
    """A fork: what each branch is to do, what it writes, and what follows from it."""

    outlines: tuple[str, ...]
    branches: tuple[Content, ...]
    conclusion: str


Content = tuple["str | Block", ...]


@dataclass(frozen=True, slots=True)
class Style:
    """How a format spells a block around what is given to it (formats.md, section 1)."""

    opening: str
    outline: str
    closing: str


_PARALLEL = "<Parallel>\n<Outlines>\n"
_OUTLINE = "<Outline> {id}: {text} </Outline>\n"
_CONCLUDED = " </Conclusion>\n</Parallel>\n"
STYLES = {
    "multiverse": Style("<Parallel>\n<Goal>\n", _OUTLINE, _CONCLUDED),
    "threadweaver": Style(_PARALLEL, _OUTLINE, "</Parallel>\n"),
    "threadweaver-conclusion": Style(_PARALLEL, _OUTLINE, _CONCLUDED),
    "npr": Style("<guideline>\n", "<plan> {id}: {text} </plan>\n", " </takeaway>\n"),
}

_SUMS = Block(
    ("sum the even ones", "sum the odd ones"),
    ((" 2 + 4 + 6 = 12. ",), (" 1 + 3 + 5 = 9. ",)),
    "12 and 9",
)
_TRIES = Block(
    ("try x = 2", "try x = 3", "try x = 5"),
    ((" 4 - 10 + 6 = 0, so 2 is a root. ",), (" 9 - 15 + 6 = 0: a root. ",), (" 6, no root. ",)),
    "2 and 3 are the roots",
)
_NESTED = Block(
    ("the area", "the edge"),
    (
        (
            " Two ways lead there.\n",
            Block(("by sides", "by halves"), ((" 3 x 4 = 12. ",), (" 6 + 6 = 12. ",)), "both: 12"),
            "So it is 12. ",
        ),
        (" 3 + 4 + 3 + 4 = 14. ",),
    ),
    "12 and 14",
)
DOCUMENTS: dict[str, Content] = {
    "Say hello.\n": ("Hello.",),
    "Add up the even and the odd numbers to 6.\n": ("Two sums.\n", _SUMS, "They are 12 and 9."),
    "Which of 2, 3 and 5 solve x^2 - 5x + 6 = 0?\n": ("Try each.\n", _TRIES, "2 and 3."),
}
NESTED_DOCUMENTS: dict[str, Content] = {
    "Area and edge of a 3 by 4 field?\n": ("Two parts.\n", _NESTED, "12 and 14."),
}


def documents(fork_format: ForkFormat) -> dict[str, Content]:
    """Prompts and what the model is to write; nested ones where the format nests."""
    return DOCUMENTS | (NESTED_DOCUMENTS if fork_format.limits.max_depth > 1 else {})


def make_tokenizer(fork_format: ForkFormat) -> Any:
    """Bytes, and every tag of the format as one special token."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    style = STYLES[fork_format.name]
    texts = (style.opening, style.outline, style.closing, fork_format.trigger)
    given = (fork_format.branch_header, fork_format.join_text, fork_format.forced_close)
    tags = re.findall(r"</?\w+>", "".join((*texts, *given)))
    special = [AddedToken(tag, special=True) for tag in dict.fromkeys(tags)]
    fast.add_special_tokens([*special, AddedToken("<eos>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<eos>")


class Lessons:
    """Every branch of a document as a text to learn: tokens, and which of them it decodes itself.

    Args:
        fork_format: How blocks are given to the model.
        tokenizer: Hugging Face's.
    """

    def __init__(self, fork_format: ForkFormat, tokenizer: Any) -> None:
        self._format = fork_format
        self._bound = BoundForkFormat(fork_format, tokenizer)  # gives what serving gives
        self._style = STYLES[fork_format.name]
        self._encode = lambda text: tokenizer.encode(text, add_special_tokens=False)
        self.texts: list[tuple[list[int], list[bool]]] = []

    def add(self, prompt: str, content: Content) -> None:
        """Takes in a document."""
        self._branch(self._encode(prompt), content, "<eos>")

    def _branch(self, context: list[int], content: Content, end: str) -> list[int]:
        """Learns a branch; returns its own tokens as its parent has them after the join."""
        own: list[int] = []
        is_own: list[bool] = []

        def take(ids: Sequence[int], *, decoded: bool) -> None:
            own.extend(ids)
            is_own.extend([decoded] * len(ids))

        for part in content:
            if isinstance(part, str):
                take(self._encode(part), decoded=True)
                continue
            take(self._encode(self._opening(part)), decoded=True)
            at_fork = [*context, *own]
            for index, branch in enumerate(part.branches):
                header = self._bound.branch_header_ids(str(index + 1))
                text = self._branch([*at_fork, *header], branch, self._format.branch_end)
                joined = self._bound.joined_header_ids(str(index + 1)) if index else header
                take((*joined, *text), decoded=False)
            take(self._bound.join_ids(), decoded=False)
            shown = part.conclusion if "<" in self._format.join_text else ""
            take(self._encode(shown + self._style.closing), decoded=True)
        take(self._encode(end), decoded=True)
        self.texts.append(([*context, *own], [False] * len(context) + is_own))
        return own

    def _opening(self, block: Block) -> str:
        outlines = (
            self._style.outline.replace("{id}", str(index + 1)).replace("{text}", text)
            for index, text in enumerate(block.outlines)
        )
        return f"{self._style.opening}{''.join(outlines)}{self._format.trigger}"


def make_model(vocab_size: int) -> Any:
    """A small Qwen3 that has learnt nothing yet."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocab_size, hidden_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=32, intermediate_size=256, tie_word_embeddings=False,
            max_position_embeddings=4096, rope_theta=10000.0,
        )
    )  # fmt: skip


def train(model: Any, lessons: Lessons, max_steps: int) -> Iterator[float]:
    """Trains until the model knows all by heart.

    Yields:
        After every step, the least probability that it gave a token it should have decoded.

    Raises:
        RuntimeError: It does not learn them in `max_steps`.
    """
    texts = sorted(lessons.texts, key=lambda text: len(text[0]))
    groups = [_padded(texts[i : i + _GROUP]) for i in range(0, len(texts), _GROUP)]
    num_targets = sum(int((labels >= 0).sum()) for _, labels in groups)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    for _ in range(max_steps):
        optimizer.zero_grad()
        probability = min(_learn(model, ids, labels, num_targets) for ids, labels in groups)
        yield probability
        if probability > _BY_HEART:
            return
        optimizer.step()
    raise RuntimeError(f"the documents were not learnt in {max_steps} steps; give it more")


def _learn(model: Any, ids: torch.Tensor, labels: torch.Tensor, num_targets: int) -> float:
    """Adds to the gradients; returns the least probability of a token to be decoded."""
    wanted = labels[:, 1:] >= 0
    logits = model(ids).logits[:, :-1][wanted]
    targets = labels[:, 1:][wanted]
    loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    (loss / num_targets).backward()
    probabilities = logits.detach().softmax(-1)
    return float(probabilities.gather(1, targets.unsqueeze(1)).min())


def _padded(texts: Sequence[tuple[list[int], list[bool]]]) -> tuple[torch.Tensor, torch.Tensor]:
    """[texts, longest] ids, and labels with -100 where nothing is decoded."""
    longest = max(len(ids) for ids, _ in texts)
    ids = torch.zeros((len(texts), longest), dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for row, (tokens, is_own) in enumerate(texts):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        own = torch.tensor(is_own)
        labels[row, : len(tokens)][own] = ids[row, : len(tokens)][own]
    return ids, labels


def write_checkpoint(
    fork_format: ForkFormat,
    texts: Mapping[str, Content],
    output_dir: Path,
    *,
    max_steps: int = 2000,
    shows_progress: bool = False,
) -> int:
    """Trains a model and writes it in Hugging Face's form; returns the steps it took."""
    tokenizer = make_tokenizer(fork_format)
    lessons = Lessons(fork_format, tokenizer)
    for prompt, content in texts.items():
        lessons.add(prompt, content)
    model = make_model(len(tokenizer))
    columns = (TextColumn("learning by heart"), BarColumn(), TimeElapsedColumn())
    num_steps = 0
    with Progress(*columns, disable=not shows_progress) as progress:
        task = progress.add_task("", total=1.0)
        for probability in train(model, lessons, max_steps):
            num_steps += 1
            progress.update(task, completed=probability)
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    return num_steps


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m perf.fork_writer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--fork-format", choices=list(STYLES), default="multiverse")
    parser.add_argument("--max-steps", type=positive_int, default=2000)
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    arguments = parser.parse_args(argv)
    fork_format = FORMATS[arguments.fork_format]
    texts = documents(fork_format)
    num_steps = write_checkpoint(
        fork_format,
        texts,
        arguments.output_dir,
        max_steps=arguments.max_steps,
        shows_progress=not arguments.no_progress,
    )
    print(f"{arguments.output_dir} knows {len(texts)} documents after {num_steps} steps:")
    for prompt in texts:
        print(f"  {prompt!r}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
