"""The latency profiles that ship with the project, in `perf/profiles`."""

from __future__ import annotations

from pathlib import Path

from taper_trtllm.profile import LatencyProfile, ProfileError, load_profile

_DIRECTORY = Path(__file__).parent / "profiles"

PROFILES = {path.stem: path for path in sorted(_DIRECTORY.glob("*.json"))}
"""Files by name."""


def named_profile(name: str) -> LatencyProfile:
    """A shipped profile, or that of a file.

    Raises:
        ProfileError: There is no such profile or file, or it is malformed.
    """
    path = PROFILES.get(name, Path(name))
    if not path.exists():
        raise ProfileError(f"{name!r} is neither a file nor one of {', '.join(PROFILES)}")
    return load_profile(path)
