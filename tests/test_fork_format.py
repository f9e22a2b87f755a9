"""Documents that a model could have written, in several tokenizers, split in every way."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as FastTokenizer
from transformers import PreTrainedTokenizerFast

from taper_trtllm.fork_format import (
    FORMATS,
    MULTIVERSE,
    NPR,
    THREADWEAVER,
    BoundForkFormat,
    ForkFormat,
    Refusal,
    choose_branches,
)
from taper_trtllm.fork_format_file import ForkFormatError, load_fork_formats, parse_fork_formats
from taper_trtllm.tag_scanner import Sighting, TagScanner
from taper_trtllm.tokenizer import (
    ByteTokenizer,
    HuggingFaceTokenizer,
    IncrementalDecoder,
    Tokenizer,
)

SHIPPED = list(FORMATS.values())

# --------------------------------------------------------------------------------- tokenizers


class PieceTokenizer:
    """Tokens are any pieces of bytes, so that a text can be split everywhere; encodes bytes.

    `atoms` are texts that are always one token, as added special tokens are.
    """

    end_id: int | None = None

    def __init__(self, atoms: Sequence[str] = ()) -> None:
        self._pieces: list[bytes] = []
        self._ids: dict[bytes, int] = {}
        self._atoms = re.compile("|".join(map(re.escape, atoms)) or r"(?!)")

    def ids_of(self, pieces: Sequence[bytes]) -> list[int]:
        for piece in pieces:
            if piece not in self._ids:
                self._ids[piece] = len(self._pieces)
                self._pieces.append(piece)
        return [self._ids[piece] for piece in pieces]

    def split(self, text: str, cut: Callable[[bytes], list[bytes]]) -> list[int]:
        """Ids of a text whose parts between atoms are cut as asked."""
        pieces: list[bytes] = []
        at = 0
        for atom in self._atoms.finditer(text):
            pieces += [*cut(text[at : atom.start()].encode()), atom[0].encode()]
            at = atom.end()
        return self.ids_of([*pieces, *cut(text[at:].encode())])

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return self.split(text, lambda part: [part[i : i + 1] for i in range(len(part))])

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        assert not skip_special_tokens
        return b"".join(self._pieces[i] for i in token_ids).decode(errors="replace")


def tags_of(fork_format: ForkFormat) -> tuple[str, str, str]:
    return (fork_format.scope_open, fork_format.trigger, fork_format.branch_end)


def outline_tag(fork_format: ForkFormat) -> str:
    return "<plan>" if fork_format is NPR else "<Outline>"


def cut_at(
    rng: random.Random, mean_size: float, max_size: int | None = None
) -> Callable[[bytes], list[bytes]]:
    """Cuts after each byte with the same probability, and at the maximal size."""

    def cut(part: bytes) -> list[bytes]:
        pieces: list[bytes] = []
        for i in range(len(part)):
            if not pieces or len(pieces[-1]) == max_size or rng.random() < 1 / mean_size:
                pieces.append(b"")
            pieces[-1] += part[i : i + 1]
        return pieces

    return cut


# ------------------------------------------------------- a model that knows what it wants to write


@dataclass
class Fork:
    """A block: its outlines and what each branch writes."""

    outline_ids: tuple[str, ...]
    branches: list[list[str | Fork]]


Content = list["str | Fork"]


def render(fork_format: ForkFormat, content: Content) -> str:
    """The document as the format's training data has it."""
    return "".join(
        part if isinstance(part, str) else _render_fork(fork_format, part) for part in content
    )


def _render_fork(f: ForkFormat, fork: Fork) -> str:
    tag = outline_tag(f)
    outlines = "".join(f"{tag} {i}: é{i}\n" for i in fork.outline_ids)
    text = f"{f.scope_open}\n{outlines}{f.trigger}"
    for k, (outline_id, branch) in enumerate(zip(fork.outline_ids, fork.branches, strict=True)):
        text += f.separator_next if k else f.separator_first
        text += f.branch_header.replace("{id}", outline_id) + render(f, branch) + f.branch_end
    return text + f.join_text


class Writer:
    """Serves a document as the executor would: forks, branches with headers, joins.

    The model writes on along the document from where its context ends, in tokens that do not care
    where a stretch ends: the last one of a stretch may hold the beginning of the text that is given
    next.
    """

    def __init__(self, bound: BoundForkFormat, encode: Callable[[str], list[int]]) -> None:
        self.bound = bound
        self.encode = encode
        self.num_tails = 0

    def write(self, document: str, tokenizer: Tokenizer) -> tuple[Content, list[int]]:
        """The structure found and the tokens of the joined context."""
        self.document, self.tokenizer = document, tokenizer
        content, token_ids, end, _ = self._branch(0, depth=0)
        assert end == len(document)
        return content, token_ids

    def _branch(self, at: int, depth: int) -> tuple[Content, list[int], int, str]:
        content: Content = []
        token_ids: list[int] = []
        begun = ""  # text behind a join that its last branch wrote
        while True:
            scanner = self.bound.scanner(depth > 0, depth < self.bound.format.limits.max_depth)
            written, sighting = self._stretch(scanner, at)
            token_ids += written
            text = self.tokenizer.decode(written, skip_special_tokens=False)
            tail = sighting.tail if sighting else ""
            text = text.removesuffix(tail)
            self.num_tails += tail != ""
            at += len(text)
            assert self.document[:at].endswith(text)
            text = begun + text
            if sighting is None:
                return [*content, text], token_ids, at, ""
            if sighting.kind == "branch_end":
                end_tag = self.bound.format.branch_end
                assert text.endswith(end_tag)
                return [*content, text.removesuffix(end_tag)], token_ids, at, tail
            before, scope_open, _ = text.rpartition(self.bound.format.scope_open)
            assert scope_open and text.endswith(self.bound.format.trigger)
            fork, joined_ids, at, begun = self._fork(sighting, at, depth)
            content += [before, fork]
            token_ids += joined_ids

    def _stretch(self, scanner: TagScanner, at: int) -> tuple[list[int], Sighting | None]:
        written = []
        for token_id in self.encode(self.document[at:]):
            written.append(token_id)
            if sighting := scanner.push(token_id):
                return written, sighting
        return written, None

    def _fork(self, sighting: Sighting, at: int, depth: int) -> tuple[Fork, list[int], int, str]:
        f = self.bound.format
        branches, joined_ids, tail = [], [], sighting.tail
        for k, outline_id in enumerate(sighting.outline_ids):
            header = f.branch_header.replace("{id}", outline_id)
            header = (f.separator_next if k else f.separator_first) + header
            assert self.document.startswith(header, at)
            forked_ids = self.bound.branch_header_ids(outline_id, sighting.tail)
            if k:  # what a branch begins with is the same for all, whatever it follows in the end
                forked = self.tokenizer.decode(forked_ids, skip_special_tokens=False)
                whole = f.separator_first + f.branch_header.replace("{id}", outline_id)
                assert sighting.tail + forked == whole
                joined_ids += self.bound.joined_header_ids(outline_id, tail)
            else:
                joined_ids += forked_ids
            branch, branch_ids, at, tail = self._branch(at + len(header), depth + 1)
            branches.append(branch)
            joined_ids += branch_ids
        assert self.document.startswith(f.join_text, at)
        joined_ids += self.bound.join_ids(tail)
        begun = tail.removeprefix(f.join_text) if tail.startswith(f.join_text) else ""
        at += len(f.join_text + begun)
        return Fork(sighting.outline_ids, branches), joined_ids, at, begun


def check_written(
    bound: BoundForkFormat,
    content: Content,
    tokenizer: Tokenizer,
    encode: Callable[[str], list[int]],
) -> Writer:
    document = render(bound.format, content)
    writer = Writer(bound, encode)
    found, token_ids = writer.write(document, tokenizer)
    assert found == content
    assert tokenizer.decode(token_ids, skip_special_tokens=False) == document
    return writer


@st.composite
def documents(draw: st.DrawFn, f: ForkFormat) -> Content:
    """Nested forks, with text that nearly is a tag, and tags where they mean nothing."""
    broken = [tag[:cut] + end for tag in tags_of(f) for cut in (1, 3, len(tag) - 1) for end in " é"]
    words = st.sampled_from(["a", "\n", "é", "東", "🦊", "1:", " ", *broken])

    def text(stray: Sequence[str]) -> str:
        return "".join(draw(st.lists(words | st.sampled_from(["", *stray]), max_size=6)))

    def content(depth: int) -> Content:
        may_fork = depth < f.limits.max_depth
        stray = () if depth else (f.branch_end,)
        if not may_fork:
            stray = (f.scope_open, f.trigger)
        num_forks = draw(st.integers(0, 2)) if may_fork else 0
        parts: Content = [text(stray)]
        for _ in range(num_forks):
            ids = draw(
                st.lists(st.sampled_from(["1", "2", "1.2", "10.3.4"]), min_size=1, max_size=3)
            )
            branches = [content(depth + 1) for _ in ids]
            parts += [Fork(tuple(ids), branches), "</Parallel>" + text(stray)]
        return parts

    return content(0)


@pytest.mark.parametrize("fork_format", SHIPPED, ids=lambda f: f.name)
@pytest.mark.parametrize("has_tag_tokens", [True, False], ids=["token", "text"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_document_is_read_back_however_it_is_split(fork_format, has_tag_tokens, data):
    content = data.draw(documents(fork_format))
    tokenizer = PieceTokenizer(tags_of(fork_format) if has_tag_tokens else ())
    bound = BoundForkFormat(fork_format, tokenizer)
    assert (bound.tag_ids is not None) is has_tag_tokens
    rng = random.Random(data.draw(st.integers(0, 2**32)))
    cut = cut_at(rng, data.draw(st.sampled_from([1, 2, 5, 8])), max_size=8)
    check_written(bound, content, tokenizer, lambda text: tokenizer.split(text, cut))


SMALL = [
    "Think é",
    Fork(
        ("1", "2"),
        [["東 2+4=6 ", Fork(("1.1", "1.2"), [["a"], [""]]), "so"], [" 1+3=4\n"]],
    ),
    "6 and 4 </Conclusion>",
]


def test_tokens_of_every_size_from_every_offset():
    tokenizer = PieceTokenizer()
    bound = BoundForkFormat(MULTIVERSE, tokenizer)
    num_tails = 0
    # Longer ones could reach over all of `</Path>` and into what a branch writes.
    for size, offset in itertools.product(range(1, 10), range(1, 10)):

        def encode(text: str, size: int = size, offset: int = offset) -> list[int]:
            part = text.encode()
            ends = range(offset, len(part) + size, size)
            pieces = [part[:offset], *(part[end : end + size] for end in ends)]
            return tokenizer.ids_of([piece for piece in pieces if piece])

        num_tails += check_written(bound, SMALL, tokenizer, encode).num_tails
    assert num_tails > 100


# ------------------------------------------------------------------------- Hugging Face tokenizers


def hugging_face(tmp_path, special_tokens: Sequence[str], num_merged: int) -> HuggingFaceTokenizer:
    """A byte-level BPE that merges across everything, as no regular expression parts its words."""
    fast = FastTokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + num_merged,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    lines = [
        line
        for f in SHIPPED
        for tag in tags_of(f)
        for line in (f"{tag}\n", f".{tag}\n<", f"{tag}\n<", f"{tag}")
    ]
    fast.train_from_iterator(lines * 3, trainer)
    fast.add_special_tokens([AddedToken(token, special=True) for token in special_tokens])
    PreTrainedTokenizerFast(tokenizer_object=fast).save_pretrained(tmp_path)
    return HuggingFaceTokenizer(str(tmp_path))


@pytest.mark.parametrize("fork_format", SHIPPED, ids=lambda f: f.name)
@pytest.mark.parametrize("is_special", [True, False], ids=["token", "text"])
def test_a_checkpoint_tokenizer(fork_format, is_special, tmp_path):
    tags = tags_of(fork_format) if is_special else ()
    tokenizer = hugging_face(tmp_path, tags, num_merged=0 if is_special else 200)
    bound = BoundForkFormat(fork_format, tokenizer)
    branches: list[Content] = [["東 4 fails "], [" 9 fits\n"]]
    content: Content = ["é", Fork(("1", "2"), branches), "so", Fork(("2",), [["b"]]), ""]

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    writer = check_written(bound, content, tokenizer, encode)
    if is_special:
        assert bound.tag_ids == {tokenizer.encode(t, add_special_tokens=False)[0] for t in tags}
        assert writer.num_tails == 0
    else:
        assert bound.tag_ids is None
        assert writer.num_tails > 0, "no token reached over a tag"


def test_a_tag_that_other_tokens_contain_is_searched_in_text(tmp_path):
    tokenizer = hugging_face(tmp_path, (), num_merged=200)
    ids = tokenizer.encode("</Goal>\n", add_special_tokens=False)
    assert len(ids) == 1 and len(tokenizer.encode("</Goal>", add_special_tokens=False)) == 1
    bound = BoundForkFormat(MULTIVERSE, tokenizer)
    assert bound.tag_ids is None
    scanner = bound.scanner(False, True)
    assert scanner.push(ids[0]) == Sighting("fork", (), "\n")
    assert bound.branch_header_ids("1", "\n") == tuple(
        tokenizer.encode("<Path>\n1:", add_special_tokens=False)
    )


# ------------------------------------------------------------------------------- named documents

MULTIVERSE_TEXT = (
    "<Parallel>\n<Goal>\n<Outline> 1: sum evens </Outline>\n<Outline> 2: sum odds </Outline>\n"
    "</Goal>"
)
THREADWEAVER_TEXT = (
    "<Parallel> so <Outlines>\n<Outline>1: try x=2</Outline>\n<Outline>2: try x=3</Outline>\n"
    "</Outlines>"
)
NPR_TEXT = "<guideline>\n<plan>\n1: factor</plan>\n<plan> 2 : graph</plan>\n</guideline>"


def sightings(scanner: TagScanner, token_ids: Sequence[int]) -> list[Sighting]:
    """What is seen in a stretch where every fork is refused."""
    found = []
    for token_id in token_ids:
        if sighting := scanner.push(token_id):
            found.append(sighting)
            if sighting.kind == "branch_end":
                break
    return found


def push_text(scanner: TagScanner, text: str) -> Sighting | None:
    """Pushes bytes up to the first sighting."""
    return next(filter(None, map(scanner.push, text.encode())), None)


@pytest.mark.parametrize(
    ("fork_format", "text", "header", "joined", "join"),
    [
        (MULTIVERSE, MULTIVERSE_TEXT, "\n<Path>\n2:", "\n<Path>\n2:", "\n<Conclusion>\n"),
        (THREADWEAVER, THREADWEAVER_TEXT, "\n<Thread>\n2:", "<Thread>\n2:", "\n"),
        (NPR, NPR_TEXT, "\n<step>\n2:", "\n<step>\n2:", "\n<takeaway>\n"),
    ],
    ids=lambda value: value.name if isinstance(value, ForkFormat) else "",
)
def test_what_the_papers_write(fork_format, text, header, joined, join):
    bound = BoundForkFormat(fork_format, ByteTokenizer())
    scanner = bound.scanner(False, True)
    assert push_text(scanner, text[:-1]) is None
    sighting = push_text(scanner, text[-1])
    assert sighting == Sighting("fork", ("1", "2"))
    assert bytes(bound.branch_header_ids("2")).decode() == header
    assert bytes(bound.joined_header_ids("2")).decode() == joined
    assert bytes(bound.join_ids()).decode() == join
    assert bytes(bound.forced_close_ids()).decode() == "\n" + fork_format.branch_end
    branch = bound.scanner(True, False)
    assert push_text(branch, f" 4 {text} {fork_format.branch_end}") == Sighting("branch_end")


def test_only_the_last_scope_before_the_trigger_counts():
    def outlines(text: str) -> tuple[str, ...]:
        sighting = push_text(
            BoundForkFormat(MULTIVERSE, ByteTokenizer()).scanner(False, True), text
        )
        assert sighting is not None and sighting.kind == "fork"
        return sighting.outline_ids

    one, two = "<Outline> 1: a", "<Outline>2.1:"
    assert outlines(f"<Goal>{one}<Goal>{two}</Goal>") == ("2.1",)
    assert outlines(f"{one}<Goal></Goal>") == ()
    assert outlines(f"<Goal{one}</Goal>") == ()
    assert outlines(f"<Goal>{one}{one}<Outline>:<Outline> x: 3:</Goal>") == ("1", "1")


@pytest.mark.parametrize("tags", [tags_of(MULTIVERSE), ()], ids=["token", "text"])
def test_a_scope_is_used_once_and_a_refused_fork_goes_on(tags):
    tokenizer = PieceTokenizer(tags)
    scanner = BoundForkFormat(MULTIVERSE, tokenizer).scanner(True, True)
    text = "<Goal><Outline>1:</Goal></Goal>é<Goal><Outline>2:</Goal></Path>"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert sightings(scanner, ids) == [
        Sighting("fork", ("1",)),
        Sighting("fork", ()),
        Sighting("fork", ("2",)),
        Sighting("branch_end"),
    ]


def test_several_tags_in_one_token_are_told_one_by_one():
    tokenizer = PieceTokenizer()
    scanner = BoundForkFormat(MULTIVERSE, tokenizer).scanner(True, True)
    pieces = [b"<Goal><Outline>1:</Goal>\n</Path>\n", b"x"]
    assert [scanner.push(i) for i in tokenizer.ids_of(pieces)] == [
        Sighting("fork", ("1",), "\n</Path>\n"),
        Sighting("branch_end", (), "\nx"),
    ]


def test_a_tag_is_seen_although_its_token_ends_inside_a_character():
    tokenizer = PieceTokenizer()
    scanner = BoundForkFormat(MULTIVERSE, tokenizer).scanner(True, True)
    fox = "🦊".encode()
    pieces = [fox[:1], fox[1:3], fox[3:] + b"</Pa", b"th>\n" + fox[:2], fox[2:]]
    sightings = [scanner.push(i) for i in tokenizer.ids_of(pieces)]
    assert sightings == [None, None, None, Sighting("branch_end", (), "\n"), None]


@given(st.text("aé東🦊\n", max_size=4), st.randoms(use_true_random=False))
def test_text_of_tokens_that_end_inside_characters_adds_up(text: str, rng: random.Random):
    tokenizer = PieceTokenizer()
    ids = tokenizer.split(text, cut_at(rng, 2))
    decoder = IncrementalDecoder(tokenizer, skip_special_tokens=False)
    streamed = ""
    while ids:
        size = rng.randrange(1, 4)
        streamed += decoder.push(ids[:size], last=False)
        ids = ids[size:]
        assert text.startswith(streamed)
    assert streamed + decoder.push((), last=True) == text


@pytest.mark.parametrize("tags", [tags_of(MULTIVERSE), ()], ids=["token", "text"])
def test_the_work_for_a_token_does_not_grow_with_the_text(tags):
    num_decoded = 0

    class Counting(PieceTokenizer):
        def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
            nonlocal num_decoded
            num_decoded += len(token_ids)
            return super().decode(token_ids, skip_special_tokens=skip_special_tokens)

    tokenizer = Counting(tags)
    scanner = BoundForkFormat(MULTIVERSE, tokenizer).scanner(True, True)
    ids = tokenizer.encode(
        "東</Goal" * 200 + "<Goal>" + "<Outline>1:é" * 200, add_special_tokens=False
    )
    num_decoded = 0
    assert sightings(scanner, ids) == [] and num_decoded < 10 * len(ids)
    (trigger,) = sightings(scanner, tokenizer.encode("</Goal>", add_special_tokens=False))
    assert trigger.outline_ids == ("1",) * 200 and num_decoded < 11 * len(ids)


@pytest.mark.parametrize(
    ("tail", "expected"),
    [
        ("", "\n<Path>\n7:"),
        ("\n", "<Path>\n7:"),
        (" \n", "<Path>\n7:"),
        ("\n<Pat", "h>\n7:"),
        ("\n<Path>\n7:", ""),
        ("\n<Path>\n7: x", ""),
        ("x\n<Path>\n7: x", "\n<Path>\n7:"),
        ("<Path>", "\n<Path>\n7:"),
    ],
)
def test_a_header_leaves_out_what_the_model_wrote_of_it(tail, expected):
    bound = BoundForkFormat(MULTIVERSE, ByteTokenizer())
    assert bytes(bound.branch_header_ids("7", tail)).decode() == expected
    assert bound.join_ids("\n<Conclusion>\n") == ()


# ----------------------------------------------------------------------------------------- fuzzing


def sightings_of(f: ForkFormat, text: str, is_branch: bool, may_fork: bool) -> list[Sighting]:
    """What a look at the whole text finds."""
    tags = [f.branch_end] * is_branch + [f.trigger, f.scope_open] * may_fork
    found, scope = [], None
    for match in re.finditer("|".join(map(re.escape, tags)) or r"(?!)", text):
        if match[0] == f.branch_end:
            return [*found, Sighting("branch_end")]
        elif match[0] == f.scope_open:
            scope = match.end()
        else:
            outlines = "" if scope is None else text[scope : match.start()]
            ids = re.findall(outline_tag(f) + r"\s*([\d.]+)\s*:", outlines)
            found.append(Sighting("fork", tuple(ids)))
            scope = None
    return found


def soups(f: ForkFormat, num_soups: int) -> Iterator[tuple[random.Random, str]]:
    rng = random.Random(f.name)
    outline = outline_tag(f)
    words = [*tags_of(f), f"{outline}1:", f"{outline} 2 :", outline, "3:", "<", "/", ">", "é", "\n"]
    words += [tag[:cut] for tag in tags_of(f) for cut in (2, -1)] + [t[2:] for t in tags_of(f)]
    for _ in range(num_soups):
        yield rng, "".join(rng.choices(words, k=rng.randrange(1, 25)))


@pytest.mark.parametrize("fork_format", [MULTIVERSE, THREADWEAVER, NPR], ids=lambda f: f.name)
def test_tag_soup_is_read_as_the_whole_text_would_be(fork_format):
    num_forks = num_refused = 0
    for rng, text in soups(fork_format, 3400):
        is_branch, may_fork = rng.random() < 0.5, rng.random() < 0.8
        tokenizer = PieceTokenizer(tags_of(fork_format) if rng.random() < 0.5 else ())
        bound = BoundForkFormat(fork_format, tokenizer)
        scanner = bound.scanner(is_branch, may_fork)
        cut = cut_at(rng, rng.choice([1, 2, 4]), max_size=4)  # no token has two tags
        ids = tokenizer.split(text, cut)
        found = sightings(scanner, ids)
        plain = [Sighting(s.kind, s.outline_ids) for s in found]
        assert plain == sightings_of(fork_format, text, is_branch, may_fork), text
        for sighting in found:
            if sighting.kind == "fork":
                choice = choose_branches(fork_format, sighting.outline_ids, rng.randrange(4))
                num_forks += not isinstance(choice, Refusal)
                num_refused += isinstance(choice, Refusal) and choice.reason != ""
                assert choice
    assert num_forks > 50 and num_refused > 50


# ---------------------------------------------------------------------------------------- policies


def with_fields(**fields) -> ForkFormat:
    return ForkFormat.model_validate({**MULTIVERSE.model_dump(), **fields})


@pytest.mark.parametrize("finish", [True, False])
def test_refusals_follow_the_policies(finish):
    policy = "finish" if finish else "serial"
    f = with_fields(
        on_no_outlines=policy,
        on_duplicate_ids=policy,
        on_too_many=policy,
        limits={"max_branches": 2},
    )
    assert choose_branches(f, ("2", "1"), 9) == ("2", "1")
    assert choose_branches(f, (), 9) == Refusal("no_outlines", finish)
    assert choose_branches(f, ("1", "1"), 9) == Refusal("duplicate_ids", finish)
    assert choose_branches(f, ("1", "2", "3"), 9) == Refusal("too_many_branches", finish)
    assert choose_branches(f, ("1", "2"), 1) == Refusal("too_many_branches", finish)


def test_outlines_that_are_too_many_or_equal_can_be_left_out():
    f = with_fields(on_duplicate_ids="first", on_too_many="first", limits={"max_branches": 3})
    assert choose_branches(f, ("3", "1", "3", "2", "1"), 9) == ("3", "1", "2")
    assert choose_branches(f, ("3", "1", "3", "2", "4"), 9) == ("3", "1", "2")
    assert choose_branches(f, ("3", "1", "2"), 1) == ("3",)
    assert choose_branches(f, ("3", "1"), 0) == Refusal("too_many_branches", False)
    every = with_fields(on_duplicate_ids="all")
    assert choose_branches(every, ("1", "1", "2"), 9) == ("1", "1", "2")


def test_the_shipped_formats_keep_to_their_engines():
    assert choose_branches(NPR, (), 9) == Refusal("no_outlines", True)
    assert choose_branches(NPR, tuple("123456"), 9) == Refusal("too_many_branches", True)
    assert choose_branches(MULTIVERSE, tuple("11"), 9) == ("1", "1")
    assert choose_branches(THREADWEAVER, tuple("11"), 9) == ("1",)
    assert {name: f.limits.max_depth for name, f in FORMATS.items()} == {
        "multiverse": 3,
        "threadweaver": 1,
        "threadweaver-conclusion": 1,
        "npr": 1,
    }


# -------------------------------------------------------------------------------- formats of a file

FIELDS = MULTIVERSE.model_dump(exclude={"name"})
BAD = [
    (None, "fork formats: must map names"),
    ([FIELDS], "fork formats: must map names"),
    ({"mine": 3}, "mine: must map fields"),
    ({"mine": {}}, r"mine\.trigger: Field required; .*mine\.branch_end: Field required"),
    ({"mine": {"base": "npc"}}, r"mine\.base: 'npc' is not one of multiverse, "),
    ({"mine": {"base": ["npr"]}}, r"mine\.base: \['npr'\] is not one of"),
    ({"mine": {"base": "npr", "name": "x"}}, r"mine\.name: a format is named by its key"),
    ({"no spaces": {"base": "npr"}}, r"no spaces\.name: String should match"),
    ({7: {"base": "npr"}}, r"7\.name: Input should be a valid string"),
    ({"mine": {"base": "npr", "triger": "x"}}, r"mine\.triger: Extra inputs"),
    ({"mine": {"base": "npr", "trigger": ""}}, r"mine\.trigger: .*at least 1"),
    ({"mine": {"base": "npr", "limits": {"max_depth": 4}}}, r"mine\.limits\.max_depth: .*than or"),
    ({"mine": {"base": "npr", "limits": 4}}, r"mine\.limits: "),
    ({"mine": {"base": "npr", "outline_pattern": "("}}, r"mine\.outline_pattern: .*not a regular"),
    ({"mine": {"base": "npr", "outline_pattern": "a"}}, r"mine\.outline_pattern: .*needs a group"),
    ({"mine": {"base": "npr", "branch_header": "<p>"}}, r"mine\.branch_header: .*contain \{id\}"),
    ({"mine": {"base": "npr", "on_too_many": "last"}}, r"mine\.on_too_many: .*'first'"),
    (
        {"mine": {"base": "npr", "branch_end": "</guideline>!"}},
        "mine: .*trigger must not be a part",
    ),
    ({"mine": {**FIELDS, "trained_join": "copy"}}, r"mine\.trained_join: .*'kv_merge'"),
]


@pytest.mark.parametrize(("data", "message"), BAD)
def test_a_bad_field_is_named(data, message):
    with pytest.raises(ForkFormatError, match="^" + message):
        parse_fork_formats(data)


def test_formats_of_a_file(tmp_path):
    path = tmp_path / "formats.yaml"
    path.write_text(
        r"""
small:
  base: multiverse
  trigger: "⟨/計画⟩"
  limits: {max_branches: 4}
own:
  trigger: "[/plan]"
  scope_open: "[plan]"
  outline_pattern: '^- (\w+)'
  branch_end: "[/part]"
  separator_first: "\n"
  separator_next: "\n"
  branch_header: "[part {id}]"
  join_text: ""
  forced_close: "[/part]"
  trained_join: concat
""",
        encoding="utf-8",
    )
    small, own = load_fork_formats(path)
    assert small.name == "small" and own.limits.max_depth == 1
    assert small.limits == MULTIVERSE.limits.model_copy(update={"max_branches": 4})
    tokenizer = ByteTokenizer()
    bound = BoundForkFormat(own, tokenizer)
    sighting = push_text(bound.scanner(False, True), "[plan]- first\n[/plan]")
    assert sighting == Sighting("fork", ("first",))
    assert bytes(bound.branch_header_ids("{id}")) == b"\n[part {id}]"
    assert bound.join_ids() == ()
    small_scanner = BoundForkFormat(small, tokenizer).scanner(False, True)
    assert push_text(small_scanner, "<Goal><Outline>1:⟨/計画⟩") == Sighting("fork", ("1",))


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    path = tmp_path / "formats.yaml"
    with pytest.raises(ForkFormatError, match=r"cannot read .*formats\.yaml: No such file"):
        load_fork_formats(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ForkFormatError, match=r"formats\.yaml is not UTF-8 text"):
        load_fork_formats(path)
    path.write_text("a: [")
    with pytest.raises(ForkFormatError, match=r"formats\.yaml is not valid YAML"):
        load_fork_formats(path)
    path.write_text("mine: {base: npr, trigger: ''}")
    with pytest.raises(ForkFormatError, match=r"formats\.yaml: mine\.trigger: "):
        load_fork_formats(path)
