"""Settings from flags, environment, a TOML file and defaults, in that order, into one frozen struct.

A configuration is a frozen `msgspec.Struct` whose fields are keys, or sections that are such structs themselves.
A section `broker` with the key `port` is written `[broker] port = 1` in TOML, `KSEED_BROKER_PORT=1` in the
environment, and `{"broker.port": 1}` in `flags`. Unknown keys are errors that name the nearest known one.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

import msgspec

from shared.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PREFIX = "KSEED_"
CACHE_VARIABLE = "KSEED_CACHE"  # where `kseed fetch-model` keeps models; a key of no configuration
S = TypeVar("S", bound=msgspec.Struct)


@dataclass(frozen=True)
class _Key:
    """One key that the configuration knows. `section` is "" for a key outside every section."""

    section: str
    name: str
    type: Any

    @property
    def dotted(self) -> str:
        return f"{self.section}.{self.name}" if self.section else self.name

    @property
    def variable(self) -> str:
        return PREFIX + self.dotted.replace(".", "_").upper()


@dataclass(frozen=True)
class _Given:
    """A value that somebody gave. `place` says where, for people."""

    value: Any
    place: str
    is_text: bool = False  # from the environment, where everything is a string
    folder: Path | None = None  # relative paths start here (a TOML file's paths start at the file)


def load(
    cls: type[S],
    *,
    file: Path | None = None,
    env: Mapping[str, str],
    flags: Mapping[str, Any],
    other_sections: Collection[str] = (),
) -> S:
    """The configuration `cls`, each key from the first of: flags, environment, file, default.

    `flags` maps dotted names (`broker.port`, or `device` outside sections) to values; None means "not given".
    Sections in `other_sections` belong to another program that reads the same file or environment, and are skipped.
    A relative path in the file is relative to the file's folder. `cls` and its sections check themselves in
    `__post_init__` by raising UserError or ValueError. Raises UserError naming place, key, what was got, what is
    allowed.
    """
    sections = {field.name: part for field in msgspec.structs.fields(cls) if (part := _section(field.type))}
    keys = {key.dotted: key for key in _keys(cls, sections)}
    given: dict[str, _Given] = {}
    if file is not None:
        given.update(_from_file(file, keys, sections, other_sections))
    given.update(_from_env(env, keys, other_sections))
    for name, value in flags.items():
        if value is not None:
            given[_known(name, keys, "command line").dotted] = _Given(value, "command line")
    values = {name: _convert(keys[name], one) for name, one in given.items()}

    def build(part: type[msgspec.Struct], section: str) -> msgspec.Struct:
        names = {f"{section}.{f.name}" if section else f.name: f.name for f in msgspec.structs.fields(part)}
        arguments = {short: values[name] for name, short in names.items() if name in values}
        if not section:
            arguments.update({name: build(inner, name) for name, inner in sections.items() if is_needed(name)})
        return _construct(part, section, arguments, {n: given[n].place for n in names if n in given})

    def is_needed(section: str) -> bool:
        field = next(f for f in msgspec.structs.fields(cls) if f.name == section)
        return field.required or any(keys[name].section == section for name in values)

    result = build(cls, "")
    assert isinstance(result, cls)
    return result


def _section(kind: Any) -> type[msgspec.Struct] | None:
    """The struct that `kind` or `kind | None` names, else None."""
    options = [t for t in get_args(kind) if t is not type(None)] if _is_union(kind) else [kind]
    if len(options) == 1 and isinstance(options[0], type) and issubclass(options[0], msgspec.Struct):
        return options[0]
    return None


def _is_union(kind: Any) -> bool:
    return get_origin(kind) in (Union, UnionType)


def _keys(cls: type[msgspec.Struct], sections: Mapping[str, type[msgspec.Struct]]) -> Iterator[_Key]:
    for field in msgspec.structs.fields(cls):
        if field.name not in sections:
            yield _Key("", field.name, field.type)
    for section, part in sections.items():
        for field in msgspec.structs.fields(part):
            yield _Key(section, field.name, field.type)


def _known(name: str, keys: Mapping[str, _Key], place: str) -> _Key:
    if name in keys:
        return keys[name]
    raise UserError(f"{place}: unknown key {name!r}; {_nearest(name, keys)}")


def _nearest(name: str, known: Collection[str]) -> str:
    close = get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known are {', '.join(sorted(known))}. Remove it."


def _from_file(
    file: Path, keys: Mapping[str, _Key], sections: Collection[str], other_sections: Collection[str]
) -> Iterator[tuple[str, _Given]]:
    place = str(file)
    try:
        table = tomllib.loads(file.read_bytes().decode())
    except OSError as error:
        raise UserError(f"{place}: cannot read the configuration file: {error.strerror}. Check the path.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{place}: not valid TOML: {error}. Correct the file.") from error
    for name, value in table.items():
        if name in sections:
            if not isinstance(value, dict):
                raise UserError(f"{place}: {name} is {value!r}; it must be a section, written [{name}].")
            entries = {f"{name}.{inner}": entry for inner, entry in value.items()}
        elif name in other_sections:
            continue
        elif isinstance(value, dict) and name not in keys:
            raise UserError(f"{place}: unknown section [{name}]; {_nearest(name, [*sections, *other_sections])}")
        else:
            entries = {name: value}
        for dotted, entry in entries.items():
            yield _known(dotted, keys, place).dotted, _Given(entry, place, folder=file.parent)


def _from_env(
    env: Mapping[str, str], keys: Mapping[str, _Key], other_sections: Collection[str]
) -> Iterator[tuple[str, _Given]]:
    variables = {key.variable: key for key in keys.values()}
    skipped = tuple(f"{PREFIX}{section.upper()}_" for section in other_sections)
    for name, value in env.items():
        if name in variables:
            yield variables[name].dotted, _Given(value, f"environment variable {name}", is_text=True)
        elif name.startswith(PREFIX) and name != CACHE_VARIABLE and not name.startswith(skipped):
            raise UserError(f"environment: unknown variable {name}; {_nearest(name, variables)}")


def _convert(key: _Key, given: _Given) -> Any:
    value = given.value
    if given.is_text and _is_sequence(key.type):
        value = [part.strip() for part in value.split(",")] if value else []

    def path(kind: type, text: Any) -> Any:
        if kind is not Path:
            raise NotImplementedError(f"no conversion to {kind}")  # a mistake in `cls`, not in what was given
        if not isinstance(text, (str, Path)):
            raise TypeError(f"expected `str`, got `{type(text).__name__}`")
        expanded = Path(text).expanduser()
        return given.folder / expanded if given.folder else expanded

    try:
        return msgspec.convert(value, key.type, strict=not given.is_text, dec_hook=path)
    except msgspec.ValidationError as error:
        allowed = str(error)[:1].lower() + str(error)[1:]
        raise UserError(f"{given.place}: {key.dotted} is {given.value!r}; {allowed}. Correct the value.") from error


def _is_sequence(kind: Any) -> bool:
    options = get_args(kind) if _is_union(kind) else (kind,)
    return any((get_origin(option) or option) in (list, tuple, frozenset) for option in options)


def _construct(
    part: type[msgspec.Struct], section: str, arguments: dict[str, Any], places: Mapping[str, str]
) -> msgspec.Struct:
    for field in msgspec.structs.fields(part):
        if field.required and field.name not in arguments:
            key = _Key(section, field.name, field.type)
            where = f"under [{section}] of the configuration file" if section else "in the configuration file"
            raise UserError(
                f"{key.dotted} is missing and has no default; give it as a flag, as {key.variable}, or as "
                f"{field.name} {where}."
            )
    try:
        return part(**arguments)
    except (UserError, ValueError) as error:
        source = ", ".join(dict.fromkeys(places.values())) or "defaults"
        raise UserError(f"{source}: {f'[{section}] ' if section else ''}{error}") from error


class BrokerConfig(msgspec.Struct, frozen=True):
    """Where the MQTT broker is and how to get in. Raises UserError where the values cannot work together."""

    host: str = "localhost"
    port: int = 0  # 0 becomes 1883, or 8883 with TLS
    tls: bool = False
    ca_file: Path | None = None  # certificates to trust; None: the system's
    cert_file: Path | None = None  # this client's certificate, PEM
    key_file: Path | None = None  # and its key, PEM
    username: str | None = None
    password_file: Path | None = None  # first line is the password: not on a command line, where others can read it
    keepalive_s: int = 300
    reconnect_longest_s: float = 60.0  # between two attempts; it takes a few failures to get there

    def __post_init__(self) -> None:
        """Fill in the port and check the values."""
        if not self.host or any(c.isspace() or c == "/" for c in self.host):
            raise UserError(f"host is {self.host!r}; give a name or an address alone, such as broker.example.org.")
        if not 0 <= self.port <= 65535:
            raise UserError(f"port is {self.port}; allowed are 1 to 65535, usual are 1883 and, with tls, 8883.")
        if not 1 <= self.keepalive_s <= 65535:
            raise UserError(f"keepalive_s is {self.keepalive_s}; allowed are 1 to 65535 seconds.")
        if not 1.0 <= self.reconnect_longest_s <= 3600.0:
            raise UserError(f"reconnect_longest_s is {self.reconnect_longest_s}; allowed are 1 to 3600 seconds.")
        for name in ("ca_file", "cert_file", "key_file"):
            if getattr(self, name) is not None and not self.tls:
                raise UserError(f"{name} is given but tls is off; set tls = true or remove {name}.")
        if (self.cert_file is None) != (self.key_file is None):
            got, missing = ("cert_file", "key_file") if self.key_file is None else ("key_file", "cert_file")
            raise UserError(f"{got} is given without {missing}; a client certificate needs both.")
        if self.password_file is not None and self.username is None:
            raise UserError("password_file is given without username; give both or neither.")
        for name in ("ca_file", "cert_file", "key_file", "password_file"):
            path: Path | None = getattr(self, name)
            if path is not None and not path.is_file():
                raise UserError(f"{name} is {str(path)!r}; there is no such file. Check the path.")
        if self.port == 0:
            msgspec.structs.force_setattr(self, "port", 8883 if self.tls else 1883)

    def password(self) -> str | None:
        """The first line of `password_file`, or None without one. Raises UserError if it cannot be read."""
        if self.password_file is None:
            return None
        try:
            return self.password_file.read_text(encoding="utf-8").partition("\n")[0].rstrip("\r")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"password_file {str(self.password_file)!r} cannot be read: {error}.") from error


def broker_flags(address: str | None) -> dict[str, str | int | None]:
    """What --broker says, as flags for `load`: host, host:port, [v6] or [v6]:port.

    Raises UserError for a port that is no number.
    """
    if address is None:
        return {}
    host, separator, port = address.rpartition(":")
    if not separator or address.endswith("]"):
        host, port = address, ""
    elif not (port.isascii() and port.isdigit()):
        raise UserError(f"--broker is {address!r}; give host or host:port, such as broker.example.org:1883.")
    return {"broker.host": host.removeprefix("[").removesuffix("]"), "broker.port": int(port) if port else None}
