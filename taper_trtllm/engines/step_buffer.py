"""What a step needs on the device, collected on the host and sent in one copy."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch

_ALIGNMENT = 4  # ints: kernels are compiled for pointers to multiples of 16 bytes


class StepBuffer:
    """Int32 arrays that stand one behind the other, on the host and on the device.

    The same shapes in the same order have the same addresses, so that CUDA graphs may read them.
    A host array may be written again when the device has finished the step that it was sent for.

    Args:
        capacity: Ints.
        device: Where they go.
    """

    def __init__(self, capacity: int, device: torch.device) -> None:
        # Copies from pinned memory do not make the host wait.
        self._host = torch.zeros(capacity, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._ints = torch.zeros(capacity, dtype=torch.int32, device=device)
        self._array = self._host.numpy()
        self._num_used = 0

    @property
    def capacity(self) -> int:
        """Ints."""
        return len(self._array)

    def clear(self) -> None:
        """Begins a step."""
        self._num_used = 0

    def take(self, *shape: int) -> tuple[npt.NDArray[np.int32], torch.Tensor]:
        """The next array: to be written on the host, to be read on the device after `send`."""
        start, end = self._num_used, self._num_used + math.prod(shape)
        self._num_used = aligned(end)
        return self._array[start:end].reshape(shape), self._ints[start:end].view(shape)

    def put(self, array: npt.NDArray[np.int32]) -> torch.Tensor:
        """The next array, written."""
        host, on_device = self.take(*array.shape)
        host[:] = array
        return on_device

    def send(self) -> None:
        """Copies what was taken."""
        used = self._num_used
        self._ints[:used].copy_(self._host[:used], non_blocking=True)


def aligned(num_ints: int) -> int:
    """Ints that an array takes."""
    return -(-num_ints // _ALIGNMENT) * _ALIGNMENT
