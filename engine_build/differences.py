"""What differs between the recorded contract and the surface of real bindings.

A difference is one line that names the class and the argument, property or member. Names, order,
kinds, defaults, types and writability must agree; properties and methods that are not recorded do
not matter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from engine_build.contract import (
    ClassRecord,
    Contract,
    Default,
    EnumDefault,
    ObjectDefault,
    Parameter,
    Property,
    Signature,
    UnknownDefault,
)
from engine_build.surface import Surface

_Item = TypeVar("_Item")


def find_differences(contract: Contract, surface: Surface) -> list[str]:
    """All that is recorded and not so in `surface`; what `surface` cannot tell is passed over."""
    lines: list[str] = []
    for name, enum, seen_enum in _pairs(contract.enums, surface.enums, "", lines):
        lines += [f"{name}.{m} is missing" for m in enum.members if m not in seen_enum.members]
        lines += [f"{name}.{m} is unrecorded" for m in seen_enum.members if m not in enum.members]
    for name, record, seen in _pairs(contract.classes, surface.classes, "", lines):
        lines += _of_class(name, record, seen)
    return lines


def _pairs(
    recorded: Mapping[str, _Item], seen: Mapping[str, _Item], prefix: str, missing: list[str]
) -> Iterator[tuple[str, _Item, _Item]]:
    for name, item in recorded.items():
        if name in seen:
            yield prefix + name, item, seen[name]
        else:
            missing.append(f"{prefix}{name} is missing")


def _of_class(name: str, record: ClassRecord, seen: ClassRecord) -> list[str]:
    lines: list[str] = []
    if record.constructible != seen.constructible:
        lines.append(f"{name} {'cannot' if record.constructible else 'can'} be constructed")
    elif record.constructible:
        lines += _of_overloads(name, record.constructors, seen.constructors)
    if seen.dynamic_attributes not in (None, record.dynamic_attributes):
        lines.append(f"{name} {'takes' if seen.dynamic_attributes else 'refuses'} new attributes")
    prefix = f"{name}."
    for where, value, other in _pairs(record.attributes, seen.attributes, prefix, lines):
        if other not in (None, value):
            lines.append(f"{where} is {other!r}, recorded {value!r}")
    for where, prop, seen_prop in _pairs(record.properties, seen.properties, prefix, lines):
        lines += _of_property(where, prop, seen_prop)
    for where, overloads, found in _pairs(record.methods, seen.methods, prefix, lines):
        lines += _of_overloads(where, overloads, found)
    return lines


def _of_property(where: str, record: Property, seen: Property) -> Iterator[str]:
    if record.writable != seen.writable:
        yield f"{where} is {'writable' if seen.writable else 'read-only'}"
    if not _same_type(record.type, seen.type):
        yield f"{where} is {seen.type}, recorded {record.type}"


def _of_overloads(
    where: str, recorded: Sequence[Signature], seen: Sequence[Signature]
) -> Iterator[str]:
    if len(recorded) != len(seen):
        yield f"{where}() has {len(seen)} overloads, recorded {len(recorded)}"
        return
    for index, (record, found) in enumerate(zip(recorded, seen, strict=True)):
        called = f"{where}()" if len(recorded) == 1 else f"{where}() overload {index + 1}"
        yield from _of_parameters(called, record.parameters, found.parameters)
        if not _same_type(record.returns, found.returns):
            yield f"{called} returns {found.returns}, recorded {record.returns}"


def _of_parameters(
    called: str, recorded: Sequence[Parameter], seen: Sequence[Parameter]
) -> Iterator[str]:
    expected, found = _by_name(recorded), _by_name(seen)
    lines: list[str] = []
    for where, record, other in _pairs(expected, found, f"{called} argument ", lines):
        if record.kind != other.kind:
            lines.append(f"{where} is {other.kind}, recorded {record.kind}")
        if record.required != other.required:
            lines.append(f"{where} {'is required' if other.required else 'has a default'}")
        elif not _same_default(record.default, other.default):
            was, now = _shown(record.default), _shown(other.default)
            lines.append(f"{where} has default {now}, recorded {was}")
        # An argument with default None shows as one that may be None, whether or not it may; a
        # required optional one shows as such in some versions of nanobind only.
        if not _same_type(record.type, other.type, ignore_none=record.default is None):
            lines.append(f"{where} is {other.type}, recorded {record.type}")
    lines += [f"{called} argument {name} is unrecorded" for name in found if name not in expected]
    if not lines and list(expected) != list(found):
        lines.append(f"{called} takes {', '.join(found)} in this order")
    yield from lines


def _by_name(parameters: Iterable[Parameter]) -> dict[str, Parameter]:
    """By name, or by place where no name can be used."""
    return {
        str(index) if p.kind == "positional_only" else p.name: p
        for index, p in enumerate(parameters)
    }


def _same_default(recorded: Default, seen: Default) -> bool:
    if isinstance(recorded, UnknownDefault) or isinstance(seen, UnknownDefault):
        return True
    return type(recorded) is type(seen) and recorded == seen


def _shown(default: Default) -> str:
    match default:
        case ObjectDefault(class_name=name):
            return f"{name}()"
        case EnumDefault(enum=name, member=member):
            return f"{name}.{member}"
        case _:
            return repr(default)


def _same_type(recorded: str, seen: str, ignore_none: bool = False) -> bool:
    bare, seen_bare = recorded.removesuffix(" | None"), seen.removesuffix(" | None")
    if "object" in (bare, seen_bare):
        return True
    if not ignore_none and (bare == recorded) != (seen_bare == seen):
        return False
    if bare.startswith("list") and seen_bare.startswith("list"):
        # Some bindings show a list without what it holds.
        return "list" in (bare, seen_bare) or _same_type(bare[5:-1], seen_bare[5:-1])
    return bare == seen_bare
