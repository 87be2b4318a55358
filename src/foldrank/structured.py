"""The door for JSON and YAML: what is read is a regular file of bounded size and depth, or one line says what is wrong.

YAML is read by the core schema of YAML 1.2 (https://yaml.org/spec/1.2.2/#103-core-schema), but numbers are decimal
alone: `no` and `1:30` are text, `010` is ten, `1e-3` is a number. A key occurs once. JSON has no NaN and no infinity.
"""

import json
import math
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

MAX_YAML_BYTES = 1 << 20
MAX_YAML_DEPTH = 40
MAX_YAML_VALUES = 20_000
"""With each alias counted as often as it is used: small files can stand for billions of values."""

MAX_JSON_BYTES = 1 << 28
"""Of a file that is read whole. The largest that are known, tokenizers of 250,000 entries, have 34 MB."""


def read_text(file: Path, max_bytes: int) -> str:
    """The text of a regular file in UTF-8, whatever the locale.

    Raises:
        ValueError: for anything else than a regular file, one that is too large, or bytes that are no UTF-8.
        OSError: where it cannot be read.
    """
    status = file.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it is no regular file")
    if status.st_size > max_bytes:
        raise ValueError(f"it has {status.st_size:,} bytes, and at most {max_bytes:,} are read")
    return file.read_bytes().decode("utf-8-sig")


def parse_json(text: str | bytes) -> Any:
    """What a JSON text holds.

    Raises:
        ValueError: for a text that is none, is nested too deep, or holds NaN or infinity.
    """
    try:
        return json.loads(text, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def read_json(file: Path, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """What a JSON file holds.

    Raises:
        ValueError: naming the file, where it cannot be read as JSON.
    """
    try:
        return parse_json(read_text(file, max_bytes))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as JSON: {_reason(error)}") from error


def read_json_table(file: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """A JSON file that holds values by name.

    Raises:
        ValueError: naming the file, where it holds anything else.
    """
    values = read_json(file, max_bytes)
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds {type(values).__name__}, not values by name")
    return values


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON that every reader takes: a number that is not finite becomes null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def parse_yaml(text: str) -> Any:
    """What a YAML text holds.

    Raises:
        ValueError: for a text that is none, is too large or nested too deep, or has a key twice.
    """
    if len(text) > MAX_YAML_BYTES:
        raise ValueError(f"it has {len(text):,} characters, and at most {MAX_YAML_BYTES:,} are read")
    try:
        _check_size(text)
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).replace('in "<unicode string>", ', "in ").split())) from error
    except UnicodeEncodeError:
        raise ValueError("it holds half a character") from None
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def read_yaml(file: Path, what: str = "settings") -> dict[str, Any]:
    """A YAML file that holds values by name; `what` it is to be, in messages.

    Raises:
        ValueError: naming the file, where it cannot be read as YAML, or holds anything else.
    """
    try:
        values = parse_yaml(read_text(file, MAX_YAML_BYTES))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as {what}: {_reason(error)}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} cannot be read as {what}: it holds {type(values).__name__}, not settings by name")
    return values


def to_yaml(value: Any) -> str:
    """YAML that readers of both versions, 1.1 and 1.2, understand alike."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


_Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's, six times as fast, where there is one


class _Loader(_Base):
    yaml_implicit_resolvers: dict = {}  # noqa: RUF012 - PyYAML's, here without those of YAML 1.1

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        names = set()
        for key, _ in node.value:
            name = self.construct_object(key, deep=True)
            if not isinstance(name, str | int | float | bool):
                raise yaml.constructor.ConstructorError(None, None, f"{name!r} cannot be a key", key.start_mark)
            if name in names:
                raise yaml.constructor.ConstructorError(None, None, f"the key {name!r} occurs twice", key.start_mark)
            names.add(name)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = {  # noqa: RUF012
        first: list(resolvers) for first, resolvers in yaml.SafeDumper.yaml_implicit_resolvers.items()
    }

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002
        return True


for _tag, _pattern, _first in (
    ("null", r"(?:~|null|Null|NULL|)", ["~", "n", "N", ""]),
    ("bool", r"(?:true|True|TRUE|false|False|FALSE)", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
):
    for _kind in (_Loader, _Dumper):
        _kind.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), _first)


def _whole(loader: yaml.SafeLoader, node: Any) -> int:
    return int(loader.construct_scalar(node))  # pyright: ignore[reportArgumentType]


def _real(loader: yaml.SafeLoader, node: Any) -> float:
    return float(str(loader.construct_scalar(node)).lower().replace(".inf", "inf").replace(".nan", "nan"))


def _text(loader: yaml.SafeLoader, node: Any) -> str:
    text = str(loader.construct_scalar(node))
    if not text.isascii() and re.search("[\ud800-\udfff]", text):
        raise yaml.constructor.ConstructorError(None, None, f"{text!r} holds half a character", node.start_mark)
    return text


_Loader.add_constructor("tag:yaml.org,2002:str", _text)
_Loader.add_constructor("tag:yaml.org,2002:int", _whole)
_Loader.add_constructor("tag:yaml.org,2002:float", _real)


def _check_size(text: str) -> None:
    """Counts values and depth before anything is built of them, which goes as deep as the text is nested."""
    open_sizes, sizes, anchors = [0], {}, []
    for event in yaml.parse(text, _Loader):
        size = 1
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise ValueError(f"the alias *{event.anchor} stands for itself, or for nothing")
            size = sizes[event.anchor]
        elif isinstance(event, yaml.CollectionStartEvent):
            open_sizes.append(0)
            anchors.append(event.anchor)
            if len(anchors) > MAX_YAML_DEPTH:
                raise ValueError(f"it is nested deeper than {MAX_YAML_DEPTH} levels")
            sizes.pop(event.anchor, None)
            continue
        elif isinstance(event, yaml.CollectionEndEvent):
            size, anchor = 1 + open_sizes.pop(), anchors.pop()
            if anchor is not None:
                sizes[anchor] = size
        elif isinstance(event, yaml.ScalarEvent):
            if event.anchor is not None:
                sizes[event.anchor] = 1
        else:
            continue
        open_sizes[-1] += size
        if sum(open_sizes) > MAX_YAML_VALUES:
            raise ValueError(f"it holds more than {MAX_YAML_VALUES:,} values")


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _finite(entry) for name, entry in value.items()}
    return [_finite(entry) for entry in value] if isinstance(value, list | tuple) else value


def _reason(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else " ".join(str(error).split())
