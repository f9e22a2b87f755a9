"""A model that writes forks, learnt by heart, behind a real Triton server, with our client."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import yaml
from conftest import SERVING, write_config
from serving import is_idle, wait_until

from perf.fork_writer import STYLES, Block, Content, write_checkpoint
from taper_trtllm.client import (
    BranchFinished,
    BranchStarted,
    Event,
    Finished,
    ForkRefused,
    Generation,
    Joined,
    RequestError,
    StageStarted,
    TaperClient,
    Tokens,
)
from taper_trtllm.config import load_config
from taper_trtllm.fork_format import MULTIVERSE
from taper_trtllm.triton_server import TritonServer

INNER = Block(("a", "b"), ((" 12.",), (" 7.",)), "19")
OUTER = Block(("left", "right"), ((" See:\n", INNER, "so 19. "), (" 14. ",)), "19, 14")
PROMPT = "Both?\n"
CONTENT: Content = ("Two.\n", OUTER, "Done.")
STYLE = STYLES["multiverse"]


def stretches(path: str, content: Content, end: str) -> dict[tuple[str, int], str]:
    """What each branch decodes in each of its serial stages."""
    texts, text, stage = {}, "", 0
    for part in content:
        if isinstance(part, str):
            text += part
            continue
        outlines = (
            STYLE.outline.format(id=i, text=outline) for i, outline in enumerate(part.outlines, 1)
        )
        texts[path, stage] = f"{text}{STYLE.opening}{''.join(outlines)}{MULTIVERSE.trigger}"
        for index, branch in enumerate(part.branches):
            below = f"{path}.{stage + 1}.{index}" if path else f"{stage + 1}.{index}"
            texts |= stretches(below, branch, MULTIVERSE.branch_end)
        text, stage = part.conclusion + STYLE.closing, stage + 2
    texts[path, stage] = text + end
    return texts


EXPECTED = stretches("", CONTENT, "<eos>")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    directory = tmp_path_factory.mktemp("forks")
    write_checkpoint(MULTIVERSE, {PROMPT: CONTENT}, directory / "model")
    mine = {"mine": {"base": "multiverse", "limits": {"max_branches": 1}}}
    (directory / "formats.yaml").write_text(yaml.safe_dump(mine))
    engine = {"model_dir": "model", "num_kv_blocks": 512, "max_seq_len": 2048}
    limits = {"max_total_tokens": 2048}
    path = write_config(
        directory, {**SERVING, "engine": engine, "limits": limits, "fork_formats": "formats.yaml"}
    )
    with TritonServer(path) as running:
        running.config = load_config(path)
        yield running
        running.check_alive()


def events_of(client: TaperClient, **options) -> tuple[list[Event], Generation]:
    fields = {"max_tokens": 1200, "fork_format": "multiverse", **options}
    with client.stream(PROMPT, **fields) as stream:
        events = list(stream)
    assert isinstance(events[-1], Finished)
    return events[:-1], events[-1].generation


def texts_of(generation: Generation) -> dict[tuple[str, int], str]:
    return {
        (path, stage.stage_index): stage.text
        for path, branch in generation.branches.items()
        for stage in branch.stages
    }


def test_a_model_forks_nests_and_joins(server: TritonServer) -> None:
    with TaperClient(server.grpc_url) as client:
        events, generation = events_of(client)
    assert texts_of(generation) == EXPECTED
    assert generation.finish_reason == "completed"
    assert (generation.metrics.join_mode, generation.metrics.join_is_as_trained) == (
        "concat",
        False,
    )
    assert generation.metrics.num_forks == 2
    begun = [e.branch_path for e in events if isinstance(e, BranchStarted)]
    assert begun[:2] == ["1.0", "1.1"] and sorted(begun[2:]) == ["1.0.1.0", "1.0.1.1"]
    assert {e.text for e in events if isinstance(e, BranchStarted)} == {
        "\n<Path>\n1:", "\n<Path>\n2:"
    }  # fmt: skip
    ended = [e.branch_path for e in events if isinstance(e, BranchFinished)]
    assert sorted(ended) == sorted(begun)
    assert [(e.branch_path, e.text) for e in events if isinstance(e, Joined)] == [
        ("1.0", "\n<Conclusion>\n"), ("", "\n<Conclusion>\n")
    ]  # fmt: skip
    assert sum(isinstance(e, StageStarted) for e in events) == 2
    watched = [e.progress for e in events if isinstance(e, Tokens) and e.progress]
    assert max(p.width for p in watched) >= 2
    assert all(1 <= p.width <= p.batch_width and p.step_ms > 0 for p in watched)


def test_kv_is_merged_as_the_format_was_trained(server: TritonServer) -> None:
    """This model has learnt plain positions: behind a merge it may stray, before it does not."""
    with TaperClient(server.grpc_url) as client:
        events, generation = events_of(client, join_mode="kv_merge")
        with pytest.raises(RequestError, match="join_mode"):
            client.generate(PROMPT, 8, join_mode="sideways")  # type: ignore[typeddict-item]
    texts, before = texts_of(generation), [key for key in EXPECTED if key[1] == 0]
    assert len(before) == 5 and all(texts[key] == EXPECTED[key] for key in before)
    metrics = generation.metrics
    assert (metrics.join_mode, metrics.join_is_as_trained) == ("kv_merge", True)
    joins = [e.text for e in events if isinstance(e, Joined)]
    assert joins == ["\n<Conclusion>\n"] * 2
    assert metrics.num_recomputed_tokens == 0


def test_many_at_once_say_the_same_and_leave_nothing(server: TritonServer) -> None:
    with TaperClient(server.grpc_url) as client, ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda _: events_of(client)[1], range(24)))
    assert all(texts_of(answer) == EXPECTED for answer in answers)
    wait_until(server, lambda page: is_idle(page, server.config))


def test_a_fork_without_room_goes_on_serially(server: TritonServer) -> None:
    serial = len(EXPECTED["", 0].replace("<Parallel>", "#").replace("<Goal>", "#"))
    with TaperClient(server.grpc_url) as client:
        events, generation = events_of(client, max_tokens=serial + 10)
        refused = [e.reason for e in events if isinstance(e, ForkRefused)]
        assert set(refused) == {"no_budget"}
        assert generation.branches.keys() == {""} and generation.metrics.num_forks == 0
        assert generation.branches[""].finish_reason == "length"
        events, generation = events_of(client, fork_format="mine", max_tokens=300)
        refused = [e.reason for e in events if isinstance(e, ForkRefused)]
        assert refused[0] == "too_many_branches" and generation.finish_reason == "completed"


def test_leaving_amid_branches_ends_the_family(server: TritonServer) -> None:
    with TaperClient(server.grpc_url) as client:
        with client.stream(PROMPT, max_tokens=1200, fork_format="multiverse") as stream:
            for event in stream:
                if isinstance(event, Tokens) and event.branch_path == "1.0":
                    break
        with pytest.raises(RequestError, match=r"fork_format: 'none' is not one of mine, multi"):
            client.generate(PROMPT, 9, fork_format="none")
        assert texts_of(events_of(client)[1]) == EXPECTED
    wait_until(server, lambda page: is_idle(page, server.config))
