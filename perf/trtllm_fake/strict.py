"""Classes that take and give exactly what the recorded contract of TensorRT-LLM says.

`build_module` makes one class per record: a wrong keyword, a missing argument, a value of the
wrong type, a write to a read-only property or an unknown attribute fails as with the real
bindings. Methods check their arguments against the recorded overloads and then call the method of
the same name with one leading underscore, by keyword: a subclass gives `enqueue_request` its
behaviour as `_enqueue_request(self, request)`, `__enter__` as `_enter(self)`, and `_init` is
called, if there is one, once the arguments of the constructor were checked.

Behaves as nanobind does: arguments are copied in, and a default that its own type refuses is no
default. Where versions of nanobind differ (2.4, 2.8 and 3.1 were tried) it takes what all take:
a required argument or a property is not set to None. Stricter in three points, where the real
class silently does what is hardly meant: a duration is a timedelta (a float would be taken as
seconds), a constructor-only argument of a class with dynamic attributes cannot be assigned, and a
property that was given no value cannot be read.
"""

from __future__ import annotations

import ast
import copy
import datetime
import enum
import functools
import numbers
import os
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

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

_PLAIN: dict[str, type | tuple[type, ...]] = {
    "int": numbers.Integral,
    "float": numbers.Real,
    "bool": bool,
    "str": str,
    "bytes": bytes,
    "dict": dict,
    "timedelta": datetime.timedelta,
    "Path": (str, os.PathLike),
}


class Strict:
    """Base of the built classes."""

    __slots__ = ("_values",)
    _values: dict[str, Any]


def build_module(contract: Contract) -> SimpleNamespace:
    """Everything that the contract records, under its names, with sub-modules as namespaces."""
    module = SimpleNamespace()
    names: dict[str, Any] = {}
    for name, members in ((n, r.members) for n, r in contract.enums.items()):
        names[name] = enum.Enum(name, members, module=contract.module, start=0)
    for name, record in contract.classes.items():
        short = name.rpartition(".")[2]
        names[short] = _build_class(short, record, contract.module, names)
    for name in sorted([*contract.enums, *contract.classes]):  # an outer class before its inner
        *outer, short = name.split(".")
        parent: Any = module
        for part in outer:
            if not hasattr(parent, part):
                setattr(parent, part, SimpleNamespace())
            parent = getattr(parent, part)
        setattr(parent, short, names[short])
    return module


def create(cls: type, **fields: Any) -> Any:
    """An instance as the runtime makes them: the named properties set, no constructor called.

    Raises:
        TypeError: No such property, or not a value of its type.
    """
    instance: Any = object.__new__(cls)
    instance._values = {}
    for name, value in fields.items():
        setter = getattr(vars(_built(cls)).get(name), "strict_set", None)
        if setter is None:
            raise TypeError(f"{cls.__name__} has no property {name!r}")
        setter(instance, value)
    return instance


def _built(cls: type) -> type:
    return next(base for base in cls.__mro__ if Strict in base.__bases__)


# ---- classes


def _build_class(name: str, record: ClassRecord, module: str, names: dict[str, Any]) -> type:
    slots = ("__dict__",) if record.dynamic_attributes else ()
    members: dict[str, Any] = {"__slots__": slots, "__module__": module, "__init__": _no_init}
    if record.constructors:
        members["__init__"] = _method("__init__", record.constructors, names)
    members.update(record.attributes)
    for attribute, recorded in record.properties.items():
        members[attribute] = _StrictProperty(f"{name}.{attribute}", recorded, names)
    for method, overloads in record.methods.items():
        members[method] = _method(method, overloads, names)
    if record.dynamic_attributes:
        taken = {p.name for c in record.constructors for p in c.parameters}
        members["__setattr__"] = _refuse(taken - record.properties.keys())
    return type(name, (Strict,), members)


def _no_init(self: Strict, *args: Any, **kwargs: Any) -> None:
    raise TypeError(f"{type(self).__name__}: no constructor defined")


def _refuse(constructor_only: set[str]) -> Callable[[Strict, str, Any], None]:
    def __setattr__(self: Strict, name: str, value: Any) -> None:
        if name in constructor_only:
            raise AttributeError(
                f"{type(self).__name__}.{name} can only be given to the constructor; the real "
                "class would accept this assignment and ignore it"
            )
        object.__setattr__(self, name, value)

    return __setattr__


class _StrictProperty(property):
    """A property over `_values`; `strict_set` also sets a read-only one, for the runtime."""

    def __init__(self, where: str, record: Property, names: dict[str, Any]) -> None:
        name = where.rpartition(".")[2]
        key = record.argument or name

        def fget(self: Strict) -> Any:
            value = self._values.get(key)
            if value is None and record.initial is not None:
                return record.initial
            if key not in self._values:
                raise AttributeError(f"{where} was given no value")
            return value

        def fset(self: Strict, value: Any) -> None:
            if value is None and not record.takes_none:
                raise TypeError(f"{where} cannot be set to None")
            strict_set(self, value)

        def strict_set(self: Strict, value: Any) -> None:
            if not _accepts(record.type, value, names):
                raise TypeError(f"{where} is {record.type}, got {value!r}")
            self._values[key] = value

        fget.__nb_signature__ = ((f"def (self) -> {record.type}", None, None),)  # type: ignore[attr-defined]
        super().__init__(fget, fset if record.writable else None)
        self.strict_set = strict_set


def _method(name: str, overloads: Sequence[Signature], names: dict[str, Any]) -> Any:
    inner = "_" + name.strip("_")

    def method(self: Strict, *args: Any, **kwargs: Any) -> Any:
        called = type(self).__name__ if name == "__init__" else f"{type(self).__name__}.{name}"
        arguments = _bind(called, overloads, args, kwargs, names)
        implementation = getattr(type(self), inner, None)
        if name == "__init__":
            self._values = arguments
        elif implementation is None:
            raise NotImplementedError(f"{called} has no behaviour here")
        return implementation(self, **arguments) if implementation else None

    method.__name__ = name
    method.__nb_signature__ = tuple(_nanobind_form(name, o, names) for o in overloads)  # type: ignore[attr-defined]
    return method


def _nanobind_form(
    name: str, signature: Signature, names: dict[str, Any]
) -> tuple[str, None, tuple[Any, ...]]:
    """The signature as nanobind carries it, so that tools that read the real one read this."""
    texts = ["self"]
    defaults: list[Any] = []
    kind = "positional_or_keyword"
    for parameter in signature.parameters:
        if parameter.kind == "keyword_only" != kind:
            texts.append("*")
        kind = parameter.kind
        text = f"{parameter.name}: {parameter.type}"
        if not parameter.required:
            text += f" = \\{len(defaults)}"
            defaults.append(_default(parameter.default, names))
        texts.append(text)
        if kind == "positional_only":
            texts.append("/")
    return f"def {name}({', '.join(texts)}) -> {signature.returns}", None, tuple(defaults)


# ---- arguments


def _bind(
    called: str,
    overloads: Sequence[Signature],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    names: dict[str, Any],
) -> dict[str, Any]:
    """The arguments by name, by the first overload that takes them.

    Raises:
        TypeError: None does.
    """
    reasons = []
    for overload in overloads:
        try:
            return _bind_one(overload.parameters, args, kwargs, names)
        except TypeError as error:
            reasons.append(str(error))
    raise TypeError(f"{called}(): incompatible arguments: " + "; or: ".join(reasons))


def _bind_one(
    parameters: Sequence[Parameter],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    names: dict[str, Any],
) -> dict[str, Any]:
    positional = [p for p in parameters if p.kind != "keyword_only"]
    if len(args) > len(positional):
        raise TypeError(f"{len(positional)} positional arguments at most, got {len(args)}")
    given = {p.name: value for p, value in zip(positional, args, strict=False)}
    by_name = {p.name for p in parameters if p.kind != "positional_only"}
    for name, value in kwargs.items():
        if name not in by_name:
            raise TypeError(f"unknown argument {name!r}")
        if name in given:
            raise TypeError(f"argument {name!r} given twice")
        given[name] = value
    bound = {}
    for parameter in parameters:
        if parameter.name in given:
            value = given[parameter.name]
        elif parameter.required:
            raise TypeError(f"missing argument {parameter.name!r}")
        else:
            value = _default(parameter.default, names)
        accepted = parameter.type.removesuffix(" | None") if parameter.required else parameter.type
        if not _accepts(accepted, value, names):
            what = f"got {value!r}" if parameter.name in given else f"and not its default {value!r}"
            raise TypeError(f"argument {parameter.name!r} is {accepted}, {what}")
        bound[parameter.name] = _copy(value)
    return bound


def _default(default: Default, names: dict[str, Any]) -> Any:
    match default:
        case ObjectDefault(class_name="dict"):
            return {}
        case ObjectDefault(class_name=name):
            return names[name]()
        case EnumDefault(enum=name, member=member):
            return names[name][member]
        case UnknownDefault():
            return None
        case _:
            return default


def _copy(value: Any) -> Any:
    """A copy of what C++ would have copied; other objects are shared."""
    if isinstance(value, Strict):
        copied = copy.copy(value)
        copied._values = {name: _copy(item) for name, item in value._values.items()}
        return copied
    if isinstance(value, list | tuple):
        return list(value) if _are_ints(value) else [_copy(item) for item in value]
    return value


def _are_ints(value: Sequence[Any]) -> bool:
    """All are of type int; as fast as long prompts need."""
    return set(map(type, value)) == {int}


def _accepts(type_text: str, value: Any, names: dict[str, Any]) -> bool:
    return _matches(_parsed(type_text), value, names)


@functools.cache
def _parsed(type_text: str) -> ast.expr:
    return ast.parse(type_text, mode="eval").body


def _matches(node: ast.expr, value: Any, names: dict[str, Any]) -> bool:
    match node:
        case ast.BinOp(left=left, right=right):
            return _matches(left, value, names) or _matches(right, value, names)
        case ast.Constant(value=None):
            return value is None
        case ast.Subscript(slice=item):
            if not isinstance(value, Sequence) or isinstance(value, str | bytes):
                return False
            if isinstance(item, ast.Name) and item.id == "int" and _are_ints(value):
                return True
            return all(_matches(item, part, names) for part in value)
        case ast.Name(id="object") if value is None:
            return True
        case ast.Name(id=name):
            # A class that is not recorded cannot be checked.
            return isinstance(value, _PLAIN.get(name) or names.get(name, object))
    raise AssertionError(f"type {ast.unparse(node)} is not in the contract's form")
