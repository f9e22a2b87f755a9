"""Where the ``nvidia-pytriton`` wheel keeps a real `tritonserver`, and what its stub needs."""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path


class TritonServerError(RuntimeError):
    """The server cannot be started, or it has died; carries the tail of its log."""


def find_installation() -> tuple[Path, Path]:
    """The wheel's tritonserver directory and the stub for this interpreter.

    Raises:
        TritonServerError: The wheel is not installed or has no stub for this Python.
    """
    triton = Path(sysconfig.get_path("purelib")) / "pytriton" / "tritonserver"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = triton / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not (triton / "bin" / "tritonserver").exists():
        raise TritonServerError(
            f"tritonserver is not installed for {sys.executable}; "
            "install the extra: pip install 'taper-trtllm[triton]'"
        )
    if not stub.exists():
        raise TritonServerError(f"nvidia-pytriton has no Python stub for Python {version}")
    return triton, stub


def libpython_dir() -> Path:
    """Directory of the shared libpython that the stub is linked to but does not bring.

    Raises:
        TritonServerError: This interpreter was built without one.
    """
    name = f"libpython{sys.version_info.major}.{sys.version_info.minor}.so.1.0"
    candidates = [Path(sysconfig.get_config_var("LIBDIR") or ""), Path(sys.base_prefix) / "lib"]
    candidates.append(candidates[0] / (sysconfig.get_config_var("MULTIARCH") or ""))
    for directory in candidates:
        if (directory / name).exists():
            return directory
    raise TritonServerError(
        f"{name} not found beside {sys.executable}: the Triton Python backend needs a Python "
        "with a shared libpython (--enable-shared)"
    )
