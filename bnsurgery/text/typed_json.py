"""Read untrusted JSON into frozen dataclasses."""

import json
import types
import typing
from contextlib import suppress
from dataclasses import fields, is_dataclass
from typing import Any

from bnsurgery.errors import CheckpointError, printable, shown


def loads(text: str) -> Any:
    """Like `json.loads`, but without what readers could understand differently: repeated names, NaN and infinity.

    Raises:
        ValueError: the text is not JSON, repeats a name, holds NaN or infinity, or is nested or written too long.
    """
    try:
        return json.loads(text, object_pairs_hook=_once, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name occurs twice in an object")
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def parse(expected: Any, value: Any, where: str) -> Any:
    """Check `value`, which `loads` gave, against the type `expected`, and build dataclasses and tuples from it.

    Args:
        expected: a dataclass, str, int, float, bool, None, a union, or a tuple or dict of these.
        where: the value's name in messages.

    Raises:
        CheckpointError: a field is missing, unknown, of the wrong type or refused by its dataclass.
    """
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if origin in (types.UnionType, typing.Union):
        options = [option for option in arguments if (value is None) == (option is type(None))]
        for option in options[:-1]:
            with suppress(CheckpointError):
                return parse(option, value, where)
        if options:
            return parse(options[-1], value, where)
    elif isinstance(expected, type) and is_dataclass(expected) and isinstance(value, dict):
        hints = typing.get_type_hints(expected)
        names = {f.name for f in fields(expected)}
        if set(value) != names:
            raise CheckpointError(f"{where}: fields missing or unknown: {shown(sorted(set(value) ^ names)[:5])}")
        values = {name: parse(hints[name], value[name], f"{where}.{name}") for name in names}
        try:
            return expected(**values)
        except ValueError as error:
            raise CheckpointError(f"{where}: {error}. The file is damaged or forged.") from None
    elif origin is tuple and isinstance(value, list):
        return tuple(parse(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    elif origin is dict and isinstance(value, dict):
        return {key: parse(arguments[1], item, f"{where}.{printable(key)}") for key, item in value.items()}
    elif expected is type(None) and value is None:
        return None
    elif expected in (str, int, float, bool) and type(value) is expected:
        return value
    elif expected is float and type(value) is int and abs(value) < 2**53:
        return float(value)
    raise CheckpointError(f"{where}: got {shown(value)}, expected {getattr(expected, '__name__', expected)}")
