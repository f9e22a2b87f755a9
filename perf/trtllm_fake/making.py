"""Makes many instances of a strict class fast."""

from __future__ import annotations

from typing import Any

from perf.trtllm_fake import strict


class Maker:
    """Makes instances of one class: the first is checked by `strict.create`, the rest are trusted.

    Args:
        cls: A class of `strict.build_module`, or a subclass.
    """

    __slots__ = ("_checked", "_cls")

    def __init__(self, cls: type) -> None:
        self._cls = cls
        self._checked = False

    def __call__(self, **values: Any) -> Any:
        """An instance with these properties; always the same ones."""
        if not self._checked:
            self._checked = True
            return strict.create(self._cls, **values)
        instance: Any = object.__new__(self._cls)
        instance._values = values
        return instance
