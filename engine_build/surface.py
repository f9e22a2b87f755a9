r"""Reads the API surface of nanobind bindings: from type stubs, or from an imported module.

Both come out as the records of a contract, so that one comparison serves both. The forms were
checked against nanobind 2.4, 2.8 and 3.1: `__nb_signature__` holds (signature, docstring, defaults)
for each overload, with `\0`, `\1`, ... in the signature where a default stands.
"""

from __future__ import annotations

import ast
import enum
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from engine_build.contract import (
    ClassRecord,
    Default,
    EnumDefault,
    EnumRecord,
    ObjectDefault,
    Parameter,
    Property,
    Signature,
    UnknownDefault,
)


@dataclass(frozen=True)
class Surface:
    """What bindings were seen to offer; `dynamic_attributes` stays None where it cannot be seen."""

    enums: dict[str, EnumRecord] = field(default_factory=dict)
    classes: dict[str, ClassRecord] = field(default_factory=dict)


# ---- types


def short_type(node: ast.expr | None) -> str:
    """An annotation in the contract's short form."""
    match node:
        case ast.BinOp(op=ast.BitOr()):
            return _short_union([short_type(member) for member in _union(node)])
        case ast.Subscript(value=value, slice=item):
            return _short_generic(short_type(value), item)
        case ast.Constant(value=None):
            return "None"
        case ast.Constant(value=str(text)):
            return short_type(ast.parse(text, mode="eval").body)
        case ast.Attribute(attr=name) | ast.Name(id=name):
            names = {"Sequence": "list", "List": "list", "PathLike": "Path", "Tensor": "object"}
            return names.get(name, name)
        case _:
            return "object"


def _union(node: ast.expr) -> list[ast.expr]:
    if isinstance(node, ast.BinOp):
        return [*_union(node.left), *_union(node.right)]
    return [node]


def _short_union(parts: list[str]) -> str:
    # A duration may also be given as float seconds, a path as str: one form for each.
    for wide, also in (("timedelta", "float"), ("Path", "str")):
        if wide in parts and also in parts:
            parts.remove(also)
    return " | ".join(sorted(dict.fromkeys(parts), key=lambda part: part == "None"))


def _short_generic(name: str, item: ast.expr) -> str:
    if name == "Optional":
        return _short_union([short_type(item), "None"])
    return f"list[{short_type(item)}]" if name == "list" else "object"


# ---- signatures


def _default_of(node: ast.expr, values: tuple[Any, ...]) -> Default:
    match node:
        case ast.Subscript(value=ast.Name(id="_"), slice=ast.Constant(value=int(index))):
            return _recorded(values[index])
        case ast.Constant(value=None | bool() | int() | float() | str() as value):
            return value
        case ast.Attribute(value=ast.Name(id=name) | ast.Attribute(attr=name), attr=member):
            return EnumDefault(enum=name, member=member)
        case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)):
            return ObjectDefault(class_name=name)
        case ast.Dict(keys=[]):
            return ObjectDefault(class_name="dict")
        case _:
            return UnknownDefault()


def _recorded(value: Any) -> Default:
    if isinstance(value, enum.Enum):
        return EnumDefault(enum=type(value).__name__, member=value.name)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return ObjectDefault(class_name=type(value).__name__)


def _signature(
    function: ast.FunctionDef, values: tuple[Any, ...] = (), bound: bool = True
) -> Signature:
    """The signature of a parsed function; `values` are what `_[n]` stands for as a default."""
    arguments = function.args
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(arguments.defaults))
    defaults += arguments.defaults
    kinds = ["positional_only"] * len(arguments.posonlyargs)
    kinds += ["positional_or_keyword"] * len(arguments.args)
    rows = list(zip(positional, kinds, defaults, strict=True))[1 if bound else 0 :]
    rows += [
        (argument, "keyword_only", default)
        for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    ]
    return Signature(
        parameters=tuple(
            Parameter.model_validate(
                {
                    "name": argument.arg,
                    "kind": kind,
                    "required": default is None,
                    **({} if default is None else {"default": _default_of(default, values)}),
                    "type": short_type(argument.annotation),
                }
            )
            for argument, kind, default in rows
        ),
        returns=short_type(function.returns),
    )


# ---- stubs


def read_stub(path: Path) -> Surface:
    """The surface that a type stub of a module declares, sub-modules beside it included.

    Raises:
        SyntaxError: It is not Python.
    """
    surface = Surface()
    _read_stub(path, "", surface)
    siblings = path.parent if path.name == "__init__.pyi" else path.with_suffix("")
    for child in sorted([*siblings.glob("*.pyi"), *siblings.glob("*/__init__.pyi")]):
        if child != path:
            name = child.parent.name if child.name == "__init__.pyi" else child.stem
            _read_stub(child, f"{name}.", surface)
    return surface


def _read_stub(path: Path, prefix: str, surface: Surface) -> None:
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef):
            _read_class(node, prefix, surface)


def _read_class(node: ast.ClassDef, prefix: str, surface: Surface) -> None:
    name = prefix + node.name
    if any(short_type(base).endswith("Enum") for base in node.bases):
        members = [t.id for s in node.body if isinstance(s, ast.Assign) for t in s.targets]  # type: ignore[attr-defined]
        surface.enums[name] = EnumRecord(members=tuple(members))
        return
    properties: dict[str, Property] = {}
    methods: dict[str, tuple[Signature, ...]] = {}
    attributes: dict[str, str | int | float | None] = {}
    for item in node.body:
        if isinstance(item, ast.ClassDef):
            _read_class(item, f"{name}.", surface)
        elif isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            value = item.value.value if isinstance(item.value, ast.Constant) else None
            attributes[item.target.id] = value if isinstance(value, str | int | float) else None
        elif isinstance(item, ast.FunctionDef):
            marks = {ast.unparse(mark).rpartition(".")[2] for mark in item.decorator_list}
            if "setter" in marks:
                properties[item.name] = properties[item.name].model_copy(update={"writable": True})
            elif "property" in marks:
                properties[item.name] = Property(writable=False, type=short_type(item.returns))
            else:
                signature = _signature(item, bound="staticmethod" not in marks)
                methods[item.name] = (*methods.get(item.name, ()), signature)
    constructors = methods.pop("__init__", ())
    surface.classes[name] = ClassRecord(
        constructible=bool(constructors),
        constructors=constructors,
        attributes=attributes,
        properties=properties,
        methods=methods,
    )


# ---- imported modules


def read_module(module: ModuleType, names: Iterable[str]) -> Surface:
    """The surface of an imported module, for those of `names` that it has."""
    surface = Surface()
    for name in names:
        found: Any = module
        for part in name.split("."):
            found = getattr(found, part, None)
        if isinstance(found, type) and issubclass(found, enum.Enum):
            surface.enums[name] = EnumRecord(members=tuple(found.__members__))
        elif isinstance(found, type):
            surface.classes[name] = _class_record(found)
    return surface


def _class_record(cls: type) -> ClassRecord:
    members: dict[str, Any] = {}
    for base in cls.__mro__[-2::-1]:  # without object
        members.update(vars(base))
    properties, methods, attributes = {}, {}, {}
    for name, member in members.items():
        if isinstance(member, property):
            returns = [s.returns for s in _nanobind_signatures(member.fget)] or ["object"]
            properties[name] = Property(writable=member.fset is not None, type=returns[0])
        elif hasattr(member, "__nb_signature__"):
            methods[name] = _nanobind_signatures(member)
        elif isinstance(member, str | int | float) and not name.startswith("__"):
            attributes[name] = member
    constructors = methods.pop("__init__", ())
    return ClassRecord(
        constructible=bool(constructors),
        constructors=constructors,
        dynamic_attributes=cls.__dictoffset__ != 0,
        attributes=attributes,
        properties=properties,
        methods=methods,
    )


def _nanobind_signatures(function: Callable[..., Any] | None) -> tuple[Signature, ...]:
    signatures = []
    for text, _, values in getattr(function, "__nb_signature__", ()):
        node = ast.parse(_as_python(text)).body[0]
        assert isinstance(node, ast.FunctionDef)
        signatures.append(_signature(node, values or ()))
    return tuple(signatures)


def _as_python(text: str) -> str:
    """A nanobind signature as a Python function; C++ names of unbound types become `object`."""
    text = re.sub(r"^def \(", "def _(", text)
    text = re.sub(r"\\(\d+)", r"_[\1]", text).replace("->", "\0")
    while (bare := re.sub(r"<[^<>]*>", "", text)) != text:
        text = bare
    return re.sub(r"\w+(?:::\w+)+", "object", text).replace("\0", "->") + ": ..."
