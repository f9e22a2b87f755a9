"""The recorded API of TensorRT-LLM's executor bindings: all that this repository relies on.

TensorRT-LLM cannot be installed everywhere, so its API is written down as data, read from its
public sources (each class names the file and commit). `perf/trtllm_fake/strict.py` builds strict
stand-ins from the record; `python -m engine_build verify` compares it with an installed
TensorRT-LLM and, where all agrees, marks it confirmed.

Types are written in one short form: `int`, `float`, `bool`, `str`, `bytes`, `timedelta`, `Path`
(a str or os.PathLike), `list[X]` (any sequence), `X | None`, a recorded class or enum, and
`object` for what is not compared.
"""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

DEFAULT_PATH = Path(__file__).resolve().parents[1] / "tests" / "contracts" / "trtllm_1_2_1.json"

_LINE = 160  # of the JSON: an argument, its note included


class ContractError(ValueError):
    """A contract that cannot be used, with the reason."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class ObjectDefault(_Record):
    """A default that is a fresh object of a class made without arguments."""

    class_name: str = Field(alias="class")


class EnumDefault(_Record):
    """A default that is a member of an enum."""

    enum: str
    member: str


class UnknownDefault(_Record):
    """A default that exists, but whose value the source does not tell."""

    unknown: Literal[True] = True


Default: TypeAlias = bool | int | float | str | ObjectDefault | EnumDefault | UnknownDefault | None


class Parameter(_Record):
    """One argument.

    Attributes:
        name: Of the argument; a positional-only one is compared without it.
        kind: How it may be passed.
        required: Without a default in the signature.
        default: As in the signature. The bindings may refuse their own default: a None where
            `type` has no None makes the argument required in fact.
        type: What is accepted; None for a required argument by some versions of nanobind only.
        note: What a caller must know beside that.
    """

    name: str
    kind: Literal["positional_only", "positional_or_keyword", "keyword_only"]
    required: bool
    default: Default = None
    type: str
    note: str | None = None


class Signature(_Record):
    """Arguments, without self, and what comes back."""

    parameters: tuple[Parameter, ...] = ()
    returns: str = "None"


class Property(_Record):
    """A property of an instance.

    Attributes:
        writable: It has a setter.
        type: What the getter returns.
        takes_none: The setter accepts None; others refuse it, whatever the type, at least with
            some versions of nanobind.
        argument: The constructor argument it reads back, where that has another name.
        initial: The value where the constructor was not given one, or None.
        note: What a caller must know beside that.
    """

    writable: bool
    type: str
    takes_none: bool = False
    argument: str | None = None
    initial: Default = None
    note: str | None = None


class ClassRecord(_Record):
    """One class.

    Attributes:
        source: Key of `Contract.sources`.
        constructible: From Python; results are made by the runtime only.
        constructors: Overloads, in order.
        dynamic_attributes: Instances accept unknown attributes (silently); None: not known.
        attributes: Class attributes and their values; None: not known.
        properties: By name.
        methods: Overloads by name, in order.
    """

    source: str = ""
    constructible: bool
    constructors: tuple[Signature, ...] = ()
    dynamic_attributes: bool | None = None
    attributes: dict[str, str | int | float | None] = {}
    properties: dict[str, Property] = {}
    methods: dict[str, tuple[Signature, ...]] = {}


class EnumRecord(_Record):
    """One enum: its members, in order."""

    source: str = ""
    members: tuple[str, ...]


class Source(_Record):
    """The public file that was read."""

    path: str
    commit: str


class Confirmation(_Record):
    """When, against which version and by which checks the record was found to hold."""

    on: datetime.date
    version: str
    how: tuple[str, ...]


class Contract(_Record):
    """The recorded API; a dotted name is a class in a class or in a sub-module."""

    schema_version: Literal[1]
    package: str
    version: str
    module: str
    status: Literal["unconfirmed", "confirmed"]
    confirmed: Confirmation | None
    sources: dict[str, Source]
    enums: dict[str, EnumRecord]
    classes: dict[str, ClassRecord]

    @model_validator(mode="after")
    def _check_references(self) -> Contract:
        if (self.status == "confirmed") != (self.confirmed is not None):
            raise ValueError("status: must be 'confirmed' exactly where `confirmed` says how")
        sources = {name: enum.source for name, enum in self.enums.items()}
        sources |= {name: record.source for name, record in self.classes.items()}
        for name, source in sources.items():
            if source not in self.sources:
                raise ValueError(f"{name}.source: {source!r} is not in sources")
        for name, record in self.classes.items():
            for parameter in (p for c in record.constructors for p in c.parameters):
                self._check_default(f"{name}.{parameter.name}", parameter.default)
        return self

    def _check_default(self, where: str, default: Default) -> None:
        if isinstance(default, ObjectDefault) and default.class_name not in {*self.classes, "dict"}:
            raise ValueError(f"{where}: default of unrecorded class {default.class_name!r}")
        if isinstance(default, EnumDefault) and (
            default.enum not in self.enums or default.member not in self.enums[default.enum].members
        ):
            raise ValueError(f"{where}: no recorded {default.enum}.{default.member}")

    def save(self, path: Path) -> None:
        """Writes it as JSON, one argument or property a line."""
        content = self.model_dump(mode="json", by_alias=True, exclude_unset=True)
        path.write_text(_to_json(content) + "\n")


def load_contract(path: Path | None = None) -> Contract:
    """Reads a contract; without a path the recorded one of the repository.

    Raises:
        ContractError: The file is missing or not a contract.
    """
    path = path or DEFAULT_PATH
    try:
        return Contract.model_validate_json(path.read_text())
    except OSError as error:
        raise ContractError(f"contract: {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ContractError(f"contract: {path}: not a text file") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "file"
        raise ContractError(f"contract: {path}: {where}: {first['msg']}") from error


def _to_json(value: Any, indent: int = 0) -> str:
    """JSON with everything that fits on a line on one line."""
    line = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, dict | list) or not value or indent + len(line) <= _LINE:
        return line
    pad = " " * (indent + 1)
    if isinstance(value, dict):
        parts = [f"{pad}{json.dumps(k)}: {_to_json(v, indent + 1)}" for k, v in value.items()]
        return "{\n" + ",\n".join(parts) + "\n" + " " * indent + "}"
    parts = [pad + _to_json(item, indent + 1) for item in value]
    return "[\n" + ",\n".join(parts) + "\n" + " " * indent + "]"
