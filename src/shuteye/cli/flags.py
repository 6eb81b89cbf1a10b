"""Turns the fields of a configuration dataclass into flags, each with its help and environment variable.

Knows nothing of what the fields mean; their help is given.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from cyclopts import Group, Parameter, Token

from shuteye.cli.sizes import format_size, parse_integer, parse_size

ENV_PREFIX = "SHUTEYE_"
URL_VARIABLE, TIMEOUT_VARIABLE = f"{ENV_PREFIX}URL", f"{ENV_PREFIX}TIMEOUT_S"
"""Read by the commands that talk to a server; their other variables are also flags of `serve`."""


@dataclass(frozen=True, slots=True)
class Flag:
    """What a field needs to be a flag, besides its type and default.

    Attributes:
        help: one or two sentences for `--help`.
        size: accept 512MiB, 2GiB, 1e9 or bytes.
        env: environment variables, the first one wins; by default `SHUTEYE_` and the field's name.
        positional: may be given without its name.
        alias: another name of the flag.
    """

    help: str
    size: bool = False
    env: tuple[str, ...] = field(default=())
    positional: bool = False
    alias: str | None = None


def flags_of(config: type[Any], flags: Mapping[str, Flag], group: Group) -> list[inspect.Parameter]:
    """The parameters of a command that takes every field of `config`.

    Raises:
        KeyError: a field has no `Flag`: nothing of a configuration is out of reach or unexplained.
    """
    hints = get_type_hints(config)
    return [_parameter(one, hints[one.name], flags[one.name], group) for one in fields(config)]


def _parameter(one: Field[Any], hint: Any, flag: Flag, group: Group) -> inspect.Parameter:
    default = one.default_factory() if one.default_factory is not MISSING else one.default
    details = Parameter(
        help=flag.help,
        alias=flag.alias,
        group=group,
        env_var=flag.env or f"{ENV_PREFIX}{one.name.upper()}",
        converter=size_converter if flag.size else integer_converter if _is_integer(hint) else None,
        show_default=_shown_default(flag, default),
        metavar="SIZE" if flag.size else None,
        consume_multiple=True if _is_tuple(hint) else None,
        negative_iterable="" if _is_tuple(hint) else None,
    )
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD if flag.positional else inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(one.name, kind, default=default, annotation=Annotated[hint, details])


def _is_tuple(hint: Any) -> bool:
    return getattr(hint, "__origin__", None) is tuple


def _is_integer(hint: Any) -> bool:
    return hint is int or int in get_args(hint)


def size_converter(_type: Any, tokens: Sequence[Token]) -> int:
    """What cyclopts calls for a size."""
    return parse_size(tokens[0].value)


def integer_converter(hint: Any, tokens: Sequence[Token]) -> int:
    """What cyclopts calls for an integer, or for one of a few; its own converter rounds what is none.

    Raises:
        ValueError: it is none, or none of those.
    """
    number = parse_integer(tokens[0].value)
    if get_origin(hint) is Literal and number not in get_args(hint):
        raise ValueError(f"{number} is none of {', '.join(map(str, get_args(hint)))}.")
    return number


INTEGER = Parameter(converter=integer_converter)
"""To be added to the annotation of a flag that is an integer, where it is not made by `flags_of`."""


def _shown_default(flag: Flag, default: Any) -> Callable[[Any], str] | bool | None:
    """How `--help` shows a default: none for None and (), sizes with units, paths without this machine's home."""
    if default is None or default == ():
        return False
    if flag.size:
        return format_size
    if isinstance(default, Path) and default.is_relative_to(Path.home()):
        return lambda path: f"~/{path.relative_to(Path.home())}"
    return None
