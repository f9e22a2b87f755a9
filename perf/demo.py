"""A model that writes forks, served and watched: `scripts/demo.sh`.

Teaches a tiny model a few documents (`fork_writer.py`), measures it, serves it on a real Triton
server, and shows in columns how its branches decode.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path

import yaml
from rich.console import Console

from perf.fork_writer import STYLES, documents, write_checkpoint
from perf.host_time import HostTimeError, calibrate
from taper_trtllm.client.__main__ import main as client
from taper_trtllm.fork_format import FORMATS
from taper_trtllm.triton_install import TritonServerError
from taper_trtllm.triton_server import TritonServer

_MAX_TOKENS = 1200


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/demo.sh", description="Watch a model fork by itself, on a real server."
    )
    parser.add_argument("--fork-format", choices=list(STYLES), default="multiverse")
    parser.add_argument("--prompt", help="one that it has learnt (all of them, one by one)")
    parser.add_argument("--output-dir", type=Path, default=Path("results/demo"))
    parser.add_argument(
        "--record", type=Path, metavar="FILE.svg", help="save a picture of the last one"
    )
    return parser


def _prompts(arguments: argparse.Namespace) -> list[str]:
    """What the model is asked: all that it has learnt, or one of them."""
    known = [*documents(FORMATS[arguments.fork_format])]
    if arguments.prompt is None:
        return known
    prompt = arguments.prompt.rstrip("\n") + "\n"
    if prompt not in known:
        texts = ", ".join(repr(text.rstrip("\n")) for text in known)
        raise SystemExit(f"error: --prompt: the model has learnt {texts} and nothing else")
    return [prompt]


def _prepare(arguments: argparse.Namespace, console: Console) -> Path:
    """The configuration of the learnt model; what is there already is kept."""
    directory: Path = arguments.output_dir / arguments.fork_format
    config, profile = directory / "config.yaml", directory / "profile.json"
    if profile.exists():
        return config
    fork_format = FORMATS[arguments.fork_format]
    console.print("a tiny model learns a few documents by heart (the first time: a minute or two)")
    write_checkpoint(fork_format, documents(fork_format), directory / "model", shows_progress=True)
    engine = {"model_dir": "model", "max_seq_len": 4096, "num_kv_blocks": 1024}
    limits = {"max_total_tokens": 4096}
    serving = {"engine": engine, "limits": limits, "profile": profile.name}
    config.write_text(yaml.safe_dump(serving))
    calibrate(profile, config)
    return config


def main() -> int:
    """Runs the command line; the exit status is 1 if a request failed."""
    arguments, console = _parser().parse_args(), Console()
    *others, last = _prompts(arguments)
    options = ["--fork-format", arguments.fork_format, "--max-tokens", str(_MAX_TOKENS)]
    record = ["--record", str(arguments.record)] if arguments.record else []
    try:
        with TritonServer(_prepare(arguments, console)) as server:
            command = ["demo", "--url", server.grpc_url, *options, "--prompt"]
            return max(
                *(client([*command, prompt]) for prompt in others),
                client([*command, last, *record]),
                0,
            )
    except (OSError, HostTimeError, TritonServerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
