"""Streaming off the step loop, against an executor that a test drives by hand."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from taper_trtllm.batch import StepRecord
from taper_trtllm.metrics import MetricChange
from taper_trtllm.output import BranchOutput, RequestOutput
from taper_trtllm.request import ForkJoinRequest
from taper_trtllm.response_stream import ResponseStreamer, merge_outputs

WAIT_S = 30.0  # ends a test that would hang


class HandDrivenExecutor:
    num_free_blocks = 1

    def __init__(self) -> None:
        self.emit: dict[str, Callable[[RequestOutput], None]] = {}
        self.running: dict[str, bool] = {}
        self.cancelled = threading.Event()

    def submit(
        self, request: ForkJoinRequest, on_output: Callable[[RequestOutput], None] | None = None
    ) -> None:
        assert on_output is not None
        self.emit[request.request_id] = on_output
        self.running[request.request_id] = False

    def cancel(self, request_id: str) -> None:
        self.cancelled.set()

    def is_running(self, request_id: str) -> bool | None:
        return self.running.get(request_id)

    def add_step_observer(self, observer: Callable[[StepRecord], None]) -> None:
        pass


class RecordingSink:
    """Blocks in `send` until released, as a busy server does."""

    def __init__(self) -> None:
        self.sent: list[RequestOutput] = []
        self.entered = threading.Event()
        self.release = threading.Event()
        self.finished = threading.Event()
        self.client_is_gone = False

    def send(self, output: RequestOutput) -> None:
        self.entered.set()
        assert self.release.wait(WAIT_S)
        self.sent.append(output)
        if output.finished:
            self.finished.set()

    def is_cancelled(self) -> bool:
        return self.client_is_gone


def tokens(*ids: int, path: str = "", finish_reason: str | None = None) -> RequestOutput:
    return RequestOutput("r", (BranchOutput(path, 0, ids),), finish_reason)


@pytest.fixture
def executor() -> HandDrivenExecutor:
    return HandDrivenExecutor()


@pytest.fixture
def errors() -> list[str]:
    return []


@pytest.fixture
def streamer(executor: HandDrivenExecutor, errors: list[str]) -> Iterator[ResponseStreamer]:
    def ignore(change: MetricChange) -> None:
        pass

    streamer = ResponseStreamer(executor, ignore, errors.append)
    yield streamer
    streamer.close()
    assert errors == []


def open_stream(streamer: ResponseStreamer, *, streaming: bool = True) -> RecordingSink:
    sink = RecordingSink()
    request = ForkJoinRequest(request_id="r", input_ids=(1,), max_tokens=9)
    streamer.submit(request, sink, streaming=streaming)
    return sink


def test_outputs_made_during_a_send_go_into_one_response(
    streamer: ResponseStreamer, executor: HandDrivenExecutor
) -> None:
    sink = open_stream(streamer)
    executor.emit["r"](tokens(1))
    assert sink.entered.wait(WAIT_S)
    for output in (tokens(2), tokens(7, path="0.1"), tokens(3, finish_reason="completed")):
        executor.emit["r"](output)  # returns although the sender is blocked
    sink.release.set()
    assert sink.finished.wait(WAIT_S)
    assert sink.sent == [
        tokens(1),
        RequestOutput(
            "r", (BranchOutput("", 0, (2, 3)), BranchOutput("0.1", 0, (7,))), "completed"
        ),
    ]


def test_without_streaming_there_is_one_response(
    streamer: ResponseStreamer, executor: HandDrivenExecutor
) -> None:
    sink = open_stream(streamer, streaming=False)
    sink.release.set()
    executor.emit["r"](tokens(1))
    executor.emit["r"](tokens(2, finish_reason="completed"))
    assert sink.finished.wait(WAIT_S)
    assert sink.sent == [tokens(1, 2, finish_reason="completed")]


@pytest.mark.parametrize("is_running", [True, False])
def test_a_client_that_is_gone_is_noticed_without_any_output(
    streamer: ResponseStreamer, executor: HandDrivenExecutor, is_running: bool
) -> None:
    sink = open_stream(streamer)
    sink.release.set()
    executor.running["r"] = is_running
    sink.client_is_gone = True
    assert executor.cancelled.wait(WAIT_S)
    executor.emit["r"](RequestOutput("r", finish_reason="cancelled"))
    assert sink.finished.wait(WAIT_S)


def test_closing_answers_every_open_request(
    streamer: ResponseStreamer, executor: HandDrivenExecutor
) -> None:
    sink = open_stream(streamer)
    executor.emit["r"](tokens(1))
    sink.release.set()
    streamer.close()
    assert merge_outputs(sink.sent).branches == tokens(1).branches
    assert (sink.sent[-1].finish_reason, sink.sent[-1].error) == (
        "error",
        "the server is shutting down",
    )


def test_a_response_that_cannot_be_sent_cancels_the_request(
    executor: HandDrivenExecutor, errors: list[str]
) -> None:
    class BrokenSink(RecordingSink):
        def send(self, output: RequestOutput) -> None:
            raise RuntimeError("pipe closed")

    streamer = ResponseStreamer(executor, lambda change: None, errors.append)
    request = ForkJoinRequest(request_id="r", input_ids=(1,), max_tokens=9)
    streamer.submit(request, BrokenSink(), streaming=True)
    executor.emit["r"](tokens(1))
    assert executor.cancelled.wait(WAIT_S)
    executor.emit["r"](RequestOutput("r", finish_reason="cancelled"))
    streamer.close()
    assert "pipe closed" in errors[0]


def test_a_last_response_that_cannot_be_sent_becomes_an_error(
    executor: HandDrivenExecutor, errors: list[str]
) -> None:
    class UndecodableSink(RecordingSink):
        def send(self, output: RequestOutput) -> None:
            if output.error is None:
                raise ValueError("no text for this token")
            super().send(output)

    streamer = ResponseStreamer(executor, lambda change: None, errors.append)
    sink = UndecodableSink()
    sink.release.set()
    request = ForkJoinRequest(request_id="r", input_ids=(1,), max_tokens=9)
    streamer.submit(request, sink, streaming=False)
    executor.emit["r"](tokens(1, finish_reason="completed"))
    assert sink.finished.wait(WAIT_S)
    streamer.close()
    assert [output.finish_reason for output in sink.sent] == ["error"]
    assert "no text for this token" in (sink.sent[0].error or "")
    assert not executor.cancelled.is_set()


def test_a_request_that_ends_while_it_is_submitted_is_answered_once(errors: list[str]) -> None:
    sink = RecordingSink()
    sink.release.set()

    class InstantExecutor(HandDrivenExecutor):
        def submit(
            self, request: ForkJoinRequest, on_output: Callable[[RequestOutput], None] | None = None
        ) -> None:
            super().submit(request, on_output)
            self.emit["r"](tokens(1, finish_reason="completed"))
            assert sink.finished.wait(WAIT_S)

    streamer = ResponseStreamer(InstantExecutor(), lambda change: None, errors.append)
    request = ForkJoinRequest(request_id="r", input_ids=(1,), max_tokens=9)
    streamer.submit(request, sink, streaming=True)
    streamer.close()
    assert len(sink.sent) == 1
    assert errors == []
