"""The client on the command line: ``python -m taper_trtllm.client``."""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live

from taper_trtllm.client.errors import TaperClientError
from taper_trtllm.client.events import Tokens
from taper_trtllm.client.program import RequestOptions, branch
from taper_trtllm.client.sync import Stream, TaperClient
from taper_trtllm.client.viewer import RequestView
from taper_trtllm.request import RequestError

_RECORD_WIDTH = 120
_REFRESH_PER_SECOND = 12


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--url", default="localhost:8001", help="gRPC endpoint (%(default)s)")
    common.add_argument("--model", default="taper", help="model name (%(default)s)")
    for name, kind, text in (
        ("temperature", float, "0 is greedy, the default"),
        ("top-k", int, "draw from the k likeliest"),
        ("top-p", float, "draw from the likeliest that have this probability together"),
        ("seed", int, "of the draws"),
        ("slo-ttft-ms", float, "objective: time to first token"),
        ("slo-tpot-ms", float, "objective: time per output token"),
        ("deadline-s", float, "cancel after so long"),
    ):
        common.add_argument(f"--{name}", type=kind, metavar="N", help=text)

    parser = argparse.ArgumentParser(
        prog="python -m taper_trtllm.client", description="Talk to a server (scripts/serve.sh)."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    generate = commands.add_parser(
        "generate", parents=[common], help="decode behind a prompt, printed as it comes"
    )
    generate.add_argument("prompt", help="text; - reads standard input")
    generate.add_argument(
        "--max-tokens", type=int, default=128, metavar="N", help="at most (%(default)s)"
    )
    generate.add_argument("--json", action="store_true", help="print the whole result as JSON")

    demo = commands.add_parser(
        "demo", parents=[common], help="watch the branches of a request decode, in columns"
    )
    demo.add_argument(
        "--prompt", default="What should a city do against heat?", help="text (%(default)s)"
    )
    demo.add_argument(
        "--branches", type=int, default=4, metavar="N", help="how many to fork (%(default)s)"
    )
    demo.add_argument(
        "--max-tokens", type=int, metavar="N",
        help="of each branch (64); with --fork-format, of the whole request (1024)",
    )  # fmt: skip
    demo.add_argument("--fork-format", metavar="NAME", help="let the model write forks itself")
    demo.add_argument("--show-ids", action="store_true", help="token ids in place of text")
    demo.add_argument("--record", type=Path, metavar="FILE.svg", help="save the last picture")
    return parser


def _options(arguments: argparse.Namespace) -> RequestOptions:
    given: Any = {
        name: value
        for name in RequestOptions.__annotations__
        if (value := getattr(arguments, name, None)) is not None
    }
    options: RequestOptions = given
    return options


def _generate(client: TaperClient, arguments: argparse.Namespace) -> None:
    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    with client.stream(prompt, arguments.max_tokens, **_options(arguments)) as stream:
        for event in stream:
            if isinstance(event, Tokens) and not arguments.json:
                print(event.text, end="", flush=True)
        result = stream.result()
    print(json.dumps(dataclasses.asdict(result)) if arguments.json else "")


def _demo(client: TaperClient, arguments: argparse.Namespace) -> None:
    console = Console()
    view = RequestView(arguments.prompt, show_ids=arguments.show_ids)
    with _demo_stream(client, arguments) as stream:
        if console.is_terminal:
            with Live(
                view, console=console, refresh_per_second=_REFRESH_PER_SECOND, transient=True
            ):
                _watch(stream, view)
        else:
            _watch(stream, view)
    view.is_live = False
    console.print(view)
    if arguments.record is not None:
        recorder = Console(record=True, width=_RECORD_WIDTH, file=io.StringIO())
        recorder.print(view)
        recorder.save_svg(str(arguments.record), title="taper_trtllm")
        console.print(f"picture: {arguments.record}")


def _demo_stream(client: TaperClient, arguments: argparse.Namespace) -> Stream:
    options, fork_format = _options(arguments), arguments.fork_format
    max_tokens = arguments.max_tokens
    if max_tokens is None:
        max_tokens = 64 if fork_format is None else 1024
    if fork_format is not None:
        return client.stream(arguments.prompt, max_tokens, fork_format=fork_format, **options)
    branches = [branch(f"\n{i}. ", max_tokens) for i in range(1, arguments.branches + 1)]
    program = client.fork_join(arguments.prompt).serial(32)
    return program.parallel(branches, join="\nIn short: ").serial(32).stream(**options)


def _watch(stream: Stream, view: RequestView) -> None:
    for event in stream:
        view.add(event)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; the exit status is 1 if the request failed."""
    arguments = _parser().parse_args(argv)
    run = {"generate": _generate, "demo": _demo}[arguments.command]
    try:
        with TaperClient(arguments.url, arguments.model) as client:
            run(client, arguments)
    except (RequestError, TaperClientError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
