"""The values of a command: flags made of config dataclasses, then environment variables, then the file of `--config`.

What nobody reads is refused in a file, and warned of in the environment.
"""

from __future__ import annotations

import difflib
import inspect
import json
import tomllib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from cyclopts import App, Argument, ArgumentCollection, CycloptsError, Group, Parameter, Token
from cyclopts.config import Dict

from shuteye.cli.quantities import format_size, parse_integer, parse_size
from shuteye.typed_fields import MISFIT, Kind, kind_of

CONFIG_FLAG = "--config"
TEST_PREFIX = "SHUTEYE_TEST_"
"""Of the variables that the project's own tests read."""


class Settings:
    """Fills what flags and environment left unset from a file, and remembers what gave each value."""

    def __init__(self) -> None:
        self._origins: dict[str, str] = {}

    def __call__(self, app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
        """What cyclopts calls once it has read flags and environment."""
        path = _config_path(arguments)
        if path is not None:
            table = _table(path, commands, _types(arguments))
            Dict(_nested(commands, table), source=str(path))(app, commands, arguments)
        for argument in arguments:
            if argument.tokens:
                self._origins[argument.field_info.name] = _origin(argument.name, argument.tokens[-1], path)

    def explained(self, message: str, param: str | None) -> str:
        """`message` about the value of `param`, beginning with where that value was given."""
        origin = self._origins.get(param or "")
        return message if origin is None else f"{origin}: {message}"


def _config_path(arguments: ArgumentCollection) -> Path | None:
    tokens = next((one.tokens for one in arguments if CONFIG_FLAG in one.names), None)
    return Path(tokens[-1].value) if tokens else None


def _origin(name: str, token: Token, path: Path | None) -> str:
    if token.source == "cli":
        return token.keyword or name.removeprefix("--").upper()
    return str(token.keyword) if token.source == "env" else f"{name.removeprefix('--')} in {path}"


# --- the file -----------------------------------------------------------------------------------


def _types(arguments: ArgumentCollection) -> Mapping[str, Kind]:
    """The keys that a table may have, as flags are written, and what each must be."""
    return {one.name.removeprefix("--"): _type(one) for one in arguments if CONFIG_FLAG not in one.names}


def _type(argument: Argument) -> Kind:
    if argument.parameter.converter is size_converter:
        return replace(kind_of(float | str), expected='a number of bytes, or a text such as "512MiB"')
    kinds = [one for one in get_args(argument.hint) if one is not NoneType]
    hint = kinds[0] if NoneType in get_args(argument.hint) and len(kinds) == 1 else argument.hint  # no TOML is None
    if hint is Path:
        return kind_of(str)
    if hint is bool:
        return replace(kind_of(bool), expected="true or false")
    return kind_of(str | hint) if get_origin(hint) is tuple else kind_of(hint)


def _table(path: Path, commands: tuple[str, ...], types: Mapping[str, Kind]) -> Mapping[str, Any]:
    """The table of this command in the file.

    Raises:
        CycloptsError: the file cannot be read, lacks the table, or has anything that nobody reads or of another type.
    """
    document, name = _document(path), commands[-1]
    for key, value in document.items():
        if key != name:
            raise CycloptsError(msg=_unknown_table(path, key, value, name, types.keys()))
    if name not in document:
        raise CycloptsError(msg=f"{path} has no table [{name}]; put the settings under that line.")
    table = document[name]
    if not isinstance(table, dict):
        raise CycloptsError(msg=f"{name} in {path} must be a table: write [{name}], and its keys below.")
    seen: dict[str, str] = {}
    for key, value in table.items():
        flag = key.replace("_", "-")
        if flag not in types:
            raise CycloptsError(msg=f"{path} has an unknown key {key!r} in [{name}]{_nearest(flag, types)}.")
        if flag in seen:
            raise CycloptsError(msg=f"{path} sets {seen[flag]!r} and {key!r} in [{name}], which are the same key.")
        seen[flag] = key
        if type(value) not in types[flag].plain and types[flag].fitted(value) is MISFIT:
            expected, shown = types[flag].expected, _shown(flag, value)
            raise CycloptsError(msg=f"{path}: {key} in [{name}] must be {expected}, got {shown}.")
    return table


def _shown(flag: str, value: object) -> str:
    """A value as TOML has it, roughly; of a secret only its type."""
    return f"an {type(value).__name__}" if flag.endswith("api-key") else json.dumps(value, default=str)


def _document(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CycloptsError(msg=f"{CONFIG_FLAG} {path} is not a file.")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # not TOML, or not even text
        raise CycloptsError(msg=f"{path} cannot be read as TOML: {error}.") from error


def _unknown_table(path: Path, key: str, value: object, name: str, keys: Collection[str]) -> str:
    if isinstance(value, dict):
        return f"{path} has an unknown table [{key}]; the one that is read is [{name}]."
    if key.replace("_", "-") in keys:
        return f"{path} sets {key!r} outside of a table; put it below a line [{name}]."
    return f"{path} has an unknown key {key!r} outside of a table; settings belong below a line [{name}]."


def _nested(commands: tuple[str, ...], table: Mapping[str, Any]) -> dict[str, Any]:
    nested: Mapping[str, Any] = table
    for command in reversed(commands):
        nested = {command: nested}
    return dict(nested)


def _nearest(name: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(name, sorted(known), n=1)
    return f"; the nearest is {found[0]!r}" if found else "; see `shuteye serve --help`"


# --- the environment ----------------------------------------------------------------------------


def unread_variables(environment: Iterable[str], known: frozenset[str]) -> list[str]:
    """One line for each variable that looks like one of ours and that no command reads."""
    unread = (name for name in sorted(environment) if name.startswith(ENV_PREFIX) and name not in known)
    return [
        f"The environment variable {name} is not one of shuteye's and has no effect{_nearest(name, known)}."
        for name in unread
        if not name.startswith(TEST_PREFIX)
    ]


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
        converter: makes the value of what was given, where the field's type alone does not say how.
        metavar: what stands for the value in `--help`.
    """

    help: str
    size: bool = False
    env: tuple[str, ...] = field(default=())
    positional: bool = False
    alias: str | None = None
    converter: Callable[[Any, Sequence[Token]], Any] | None = None
    metavar: str | None = None


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
        converter=flag.converter or _converter(flag, hint),
        show_default=_shown_default(flag, default),
        metavar="SIZE" if flag.size else flag.metavar,
        consume_multiple=True if _is_tuple(hint) else None,
        negative_iterable="" if _is_tuple(hint) else None,
    )
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD if flag.positional else inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(one.name, kind, default=default, annotation=Annotated[hint, details])


def _converter(flag: Flag, hint: Any) -> Callable[[Any, Sequence[Token]], Any] | None:
    if flag.size:
        return size_converter
    return integer_converter if _is_integer(hint) else None


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
