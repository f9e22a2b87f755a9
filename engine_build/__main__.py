"""`python -m engine_build`: prepare an engine for serving."""

from __future__ import annotations

import argparse
import sys

from engine_build import build, calibrate, verify
from engine_build.contract import ContractError
from taper_trtllm.config import ConfigError
from taper_trtllm.engines.base import WorkerRank
from taper_trtllm.profile import ProfileError


def main(argv: list[str] | None = None) -> int:
    """Runs a sub-command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="engine_build", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    build.add_parser(commands)
    calibrate.add_parser(commands)
    verify.add_parser(commands)
    arguments = parser.parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except WorkerRank as rank:  # under mpirun, all ranks but the leader
        rank.work()
        return 0
    except (ConfigError, ContractError, ProfileError) as error:
        print(f"engine_build {arguments.command}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
