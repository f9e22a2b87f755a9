"""Fork formats of one's own: a YAML file that maps their names to fields.

```yaml
short-multiverse:
  base: multiverse          # a shipped format, whose fields hold where none is given
  limits: {max_branches: 4}
```
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from taper_trtllm.config import ConfigError
from taper_trtllm.fork_format import FORMATS, ForkFormat


class ForkFormatError(ConfigError):
    """Fork formats that cannot be used, naming format and field."""


def load_fork_formats(path: str | Path) -> tuple[ForkFormat, ...]:
    """Reads a YAML file.

    Raises:
        ForkFormatError: The file is missing, not YAML, or a field is wrong.
    """
    import yaml  # the extra `config`; the core works without it

    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ForkFormatError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ForkFormatError(f"{path} is not UTF-8 text: {error.reason}") from None
    except yaml.YAMLError as error:
        raise ForkFormatError(f"{path} is not valid YAML: {error}") from None
    try:
        return parse_fork_formats(data)
    except ForkFormatError as error:
        raise ForkFormatError(f"{path}: {error}") from None


def parse_fork_formats(data: Any) -> tuple[ForkFormat, ...]:
    """Validates formats read from YAML: names to fields, over those of a shipped `base` if named.

    Raises:
        ForkFormatError: Names the format and the field at fault.
    """
    if not isinstance(data, dict):
        raise ForkFormatError("fork formats: must map names to fields")
    return tuple(_parse_fork_format(name, fields) for name, fields in data.items())


def _parse_fork_format(name: Any, fields: Any) -> ForkFormat:
    if not isinstance(fields, dict):
        raise ForkFormatError(f"{name}: must map fields to values")
    if "name" in fields:
        raise ForkFormatError(f"{name}.name: a format is named by its key")
    try:
        return ForkFormat.model_validate({**_with_base(name, fields), "name": name})
    except ValidationError as failure:
        lines = [
            f"{'.'.join(map(str, (name, *error['loc'])))}: {error['msg']}"
            for error in failure.errors(include_url=False)
        ]
        raise ForkFormatError("; ".join(lines)) from None


def _with_base(name: Any, fields: dict[Any, Any]) -> dict[Any, Any]:
    """The fields over those of the base; limits one by one."""
    if "base" not in fields:
        return fields
    base = fields["base"]
    if not isinstance(base, str) or base not in FORMATS:
        raise ForkFormatError(f"{name}.base: {base!r:.80} is not one of {', '.join(FORMATS)}")
    values = FORMATS[base].model_dump()
    changed = {field: value for field, value in fields.items() if field != "base"}
    if isinstance(limits := fields.get("limits"), dict):
        changed["limits"] = {**values["limits"], **limits}
    return {**values, **changed}
