"""Settings: the environment, `.env`, systemd's credentials, and models.toml.

A daemon reads its settings at start and at SIGHUP, with `read_environment` and `load_catalog`, into
a frozen Config of its own. A wrong value raises `ConfigError`, whose message begins with the
variable's name. The message shows no text that may be a key, which people paste in wrong places.
Standard library only.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cerebrum.fields import Field, read_fields
from cerebrum_common import FIM_LAYOUTS, SUGGEST, HttpError, Model, log


def read_table(table: Any, where: str, fields: Mapping[str, Field], *others: str) -> dict[str, Any]:
    """The checked members of a TOML table, limited to `fields` and `others`. ConfigError says what
    is wrong.
    """
    if not isinstance(table, dict):
        raise ConfigError(f"{where}: expected a table, got something else")
    for name in sorted(table.keys() - {*fields, *others}):
        raise ConfigError(f"{where}: expected one of {', '.join((*fields, *others))}, got {name!r}")
    try:
        return read_fields(table, fields)
    except HttpError as error:
        shown = error.message.partition(' "')[0]  # without the text of a string
        raise ConfigError(f"{where}: {shown}") from None


# ------------------------------------------------------------------------------------ configuration


class ConfigError(ValueError):
    """A setting that keeps a daemon from starting; the message names the variable."""


KEY = re.compile(
    r"[!-+\--~]+"
)  # printable ASCII but for space and comma; a header can carry the key as it is
MAX_KEYS = 2  # a forgotten old key should not stay valid
HOST = re.compile(
    r"[A-Za-z0-9.\-_]{1,255}|[0-9A-Fa-f:.]{2,45}(%[A-Za-z0-9.\-_]{1,32})?"
)  # a name or an address
CLIENT = re.compile(rf"([A-Za-z0-9._-]{{1,32}}) ({KEY.pattern})(?: ([0-9]{{1,2}}))?")
MAX_CLIENTS, MAX_CLIENT_PLACES = 32, 64


@dataclass(frozen=True, slots=True)
class Client:
    """A person with a key. A guest (`places` above 0) has so many places at most, and only what the
    others leave.
    """

    name: str
    places: int = 0


@dataclass(frozen=True, slots=True)
class Environment:
    """The variables of the environment, a `.env` file and credentials. A bad value raises
    ConfigError with the variable's name.
    """

    values: Mapping[str, str]

    def text(self, name: str, default: str = "") -> str:
        return self.values.get(name, "") or default

    def keys(self, name: str) -> tuple[str, ...]:
        """The key in this variable, or two during a rotation, separated by a comma: the new one,
        then the old one.
        """
        if not (text := self.text(name)):
            return ()
        keys = tuple(key.strip() for key in text.split(","))
        if not all(KEY.fullmatch(key) for key in keys):
            raise ConfigError(f"{name}: expected printable ASCII without spaces")
        if len(keys) > MAX_KEYS:
            raise ConfigError(
                f"{name}: expected one key, or two while it is replaced, got {len(keys)}"
            )
        return keys

    def clients(self, name: str, default: Path, strict: bool = True) -> dict[str, Client] | None:
        """The named clients, by their keys, in the file that this variable names or in the default
        one; None if there is no such file. If not `strict`, wrong lines are skipped.
        """
        if re.search(r"\s", self.text(name)):
            raise ConfigError(
                f"{name}: expected the path of a file, got a text with spaces"
            )  # perhaps the keys
        try:
            path = Path(self.text(name, str(default))).expanduser()
            lines = path.read_text("utf-8-sig").split("\n")
            if strict and path.stat().st_mode & 0o077:
                log.warning("%s: expected mode 600: others can read the keys", path)
        except FileNotFoundError:
            if self.text(name):
                raise ConfigError(f"{name}: expected a file, got none at this path") from None
            return None
        except (OSError, ValueError, RuntimeError) as error:
            reason = getattr(error, "strerror", "expected the path of a file in UTF-8")
            raise ConfigError(f"{name}: cannot read the file: {reason}") from None
        found = dict[str, Client]()
        for number, line in enumerate(lines, 1):
            if not (words := line.split()) or words[0].startswith("#"):
                continue
            match = CLIENT.fullmatch(" ".join(words))
            if (
                not match or not 1 <= int(match[3] or 1) <= MAX_CLIENT_PLACES
            ):  # never show the line: it has a key
                fault = "expected NAME KEY [PLACES], got something else"
            elif match[2] in found or any(match[1] == one.name for one in found.values()):
                fault = "expected each name and each key once"
            else:
                found[match[2]] = Client(match[1], int(match[3] or 0))
                continue
            if strict:
                raise ConfigError(f"{name}: {path}: line {number}: {fault}")
        if strict and len(found) > MAX_CLIENTS:
            raise ConfigError(
                f"{name}: {path}: expected at most {MAX_CLIENTS} names, got {len(found)}"
            )
        return found

    def key(self, name: str) -> str:
        """The key to send: the new one of two, "" if there is none."""
        return next(iter(self.keys(name)), "")

    def warn_of_changes(self, new: Environment, names: Collection[str]) -> None:
        """Log which of these variables have changed in `new`: the daemon uses them only at its
        start.
        """
        if changed := [name for name in names if self.text(name) != new.text(name)]:
            log.warning("%s changed: restart the daemon to use it", ", ".join(changed))

    def log_level(self) -> str:
        text = self.text("CEREBRUM_LOG_LEVEL", "INFO")
        if text.upper() not in ("DEBUG", "INFO", "WARNING", "ERROR"):
            raise ConfigError(
                f"CEREBRUM_LOG_LEVEL: expected DEBUG, INFO, WARNING or ERROR, got {text!r}"
            )
        return text.upper()

    def host(self, name: str, default: str) -> str:
        text = self.text(name, default)
        if not HOST.fullmatch(text):
            raise ConfigError(f"{name}: expected an address or a host name, got something else")
        return text

    def names(self, name: str) -> frozenset[str]:
        """A comma-separated list."""
        return frozenset(
            part.strip().lower() for part in self.text(name).split(",") if part.strip()
        )

    def number(self, name: str, default: float, low: float, high: float) -> float:
        text = self.text(name, str(default))
        if not re.fullmatch(r"[0-9]+(\.[0-9]+)?", text) or not low <= float(text) <= high:
            raise ConfigError(f"{name}: expected a number from {low:g} to {high:g}, got {text!r}")
        return float(text)

    def integer(self, name: str, default: int, low: int, high: int) -> int:
        value = self.number(name, default, low, high)
        if value != int(value):
            raise ConfigError(f"{name}: expected an integer, got {value}")
        return int(value)


def read_environment(
    environ: Mapping[str, str], folder: Path, known: Environment | None = None
) -> Environment:
    """Read systemd's credentials, then the process's environment, then `folder`/.env: the first
    source that has a variable wins. `.env` has `NAME=value` lines as systemd reads them: quotes are
    optional, and a `#` inside a value is part of the value. With `known`, a wrong line is skipped;
    what it may have set keeps its value there.
    """
    return Environment(
        {**_read_env(folder / ".env", known), **environ, **_read_credentials(environ)}
    )


def _read_credentials(environ: Mapping[str, str]) -> dict[str, str]:
    """Variables from files of the same names, which systemd passes through the unit's
    LoadCredential=.
    """
    folder, values = environ.get("CREDENTIALS_DIRECTORY"), dict[str, str]()
    try:
        for path in Path(folder).iterdir() if folder else ():
            if re.fullmatch(r"[A-Z][A-Z0-9_]*", path.name):
                values[path.name] = path.read_text("utf-8", "replace").strip()
                if not values[
                    path.name
                ]:  # after a full disk, say; an empty key must not turn authentication off
                    raise ConfigError(f"{path.name}: expected a value in {path}, got an empty file")
    except FileNotFoundError:
        pass
    except OSError as error:
        raise ConfigError(
            f"CREDENTIALS_DIRECTORY: cannot read {error.filename}: {error.strerror}"
        ) from None
    return values


def _read_env(path: Path, known: Environment | None) -> dict[str, str]:
    values = dict[str, str]()
    try:
        lines = path.read_text("utf-8-sig").split("\n")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {getattr(error, 'strerror', error)}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = re.fullmatch(r"""\s*(?:export\s+)?([A-Za-z_]\w*)=(["']?)(.*?)\2\s*""", line)
        if match:
            values[match[1]] = match[3]
        elif known:
            values = {**{name: old for name, old in known.values.items() if name in line}, **values}
        else:
            raise ConfigError(f"{path}: line {number}: expected NAME=value")
    return values


@dataclass(frozen=True, slots=True)
class Catalog:
    """The contents of models.toml: the models in order of preference, the ids that each mode puts
    before that order, and the backends' tables, which only the Pi reads and checks.
    """

    models: tuple[Model, ...]
    prefer: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    backends: tuple[Any, ...] = ()

    @property
    def key_names(self) -> frozenset[str]:
        """The variables that hold keys: our own two, and each backend's `key_env`. No child process
        gets them.
        """
        named = [table.get("key_env") for table in self.backends if isinstance(table, dict)]
        own = "CEREBRUM_API_KEY", "CEREBRUM_CM4_API_KEY"
        return frozenset(own).union(name for name in named if isinstance(name, str))


MODES = ("complete", "infill", "instruct")
MODEL = {
    "id": Field(str, required=True, pattern=r"[A-Za-z0-9._\-]+"),
    **dict.fromkeys(("name", "parameters", "quantization"), Field(str, 1, required=True)),
    "file": Field(
        str, default="", pattern=r"(?:[^./\\\x00-\x1f][^/\\\x00-\x1f]*)?"
    ),  # joined to a folder's path
    "sha256": Field(str, default="", pattern=r"(?:[0-9a-f]{64})?"),
    **dict.fromkeys(("size", "memory_mb"), Field(int, default=0)),
    "languages": Field(list, default=[], pattern=r"[A-Za-z0-9+#._\-]{1,40}"),
    "aliases": Field(list, default=[]),
    "fim": Field(list, 3, 3, []),
    "fim_layout": Field(str, default="psm", choices=FIM_LAYOUTS),
}
THRESHOLDS = dict.fromkeys(SUGGEST[1:-1], Field(float, 0, 1))
SHAPE = {
    **dict.fromkeys(
        ("layers", "width", "heads", "kv_heads", "head"), Field(int, 1, 999_999, required=True)
    ),
    **dict.fromkeys(("feed_forward", "vocabulary"), Field(int, 1, 999_999, required=True)),
    **dict.fromkeys(("experts", "used"), Field(int, 0, 999_999, 0)),
}


def load_catalog(path: Path, known: Collection[str]) -> Catalog:
    """Read and check models.toml, in which the language "all" stands for the `known` ones.
    ConfigError names the variable of the path, and the wrong entry with its fault.
    """
    try:
        table = tomllib.loads(path.read_text("utf-8"))
        entries, backends = table.get("models"), table.get("backends", [])
        if not isinstance(entries, list) or not entries:
            raise ConfigError("expected at least one [[models]]")
        models = tuple(
            _read_model(entry, f"model {number}", known) for number, entry in enumerate(entries, 1)
        )
        wanted = Field(list, default=[], choices=tuple(model.id for model in models))
        prefer = read_table(table.get("prefer", {}), "prefer", dict.fromkeys(MODES, wanted))
        if not isinstance(backends, list):
            raise ConfigError("backends: expected [[backends]], got something else")
        names = [name for model in models for name in (model.id, *model.aliases)]
        if len(set(names)) != len(names):
            raise ConfigError("expected every id and alias once")
    except (OSError, ValueError) as error:
        raise ConfigError(f"CEREBRUM_MODELS_FILE: {path}: {error}") from None
    return Catalog(
        models, {mode: tuple(ids) for mode, ids in prefer.items() if ids}, tuple(backends)
    )


def _is_sound(shape: Mapping[str, int]) -> bool:
    """Whether llama.cpp can compute a model of this shape; otherwise it would end the process."""
    heads, experts, used = shape["heads"], shape["experts"], shape["used"]
    rows = (
        shape["width"],
        shape["feed_forward"],
        heads * shape["head"],
    )  # each of whole blocks of 32 weights
    fits = (
        heads % shape["kv_heads"] == 0
        and shape["head"] % 2 == 0
        and all(row % 32 == 0 for row in rows)
    )
    return fits and (0 < used <= experts or used == experts == 0)


def _read_model(entry: Any, where: str, known: Collection[str]) -> Model:
    given = read_table(entry, where, MODEL, "sources", "min_confidence", "shape")
    if not given["file"] and not given["aliases"]:
        raise ConfigError(f"{where}: file: expected a name, or aliases instead, got nothing")
    given["sources"] = entry.get("sources", [])
    if not isinstance(given["sources"], list) or not all(
        isinstance(source, dict) for source in given["sources"]
    ):
        raise ConfigError(f"{where}: sources: expected [[models.sources]], got something else")
    values: dict[str, Any] = {
        name: tuple(one) if isinstance(one, list) else one for name, one in given.items()
    }
    values["min_confidence"] = read_table(
        entry.get("min_confidence", {}), f"{where}: min_confidence", THRESHOLDS
    )
    values["shape"] = shape = (
        read_table(entry["shape"], f"{where}: shape", SHAPE) if "shape" in entry else {}
    )
    if shape and not _is_sound(shape):
        raise ConfigError(f"{where}: shape: expected one that llama.cpp can compute, got {shape}")
    named = (one for name in given["languages"] for one in (known if name == "all" else [name]))
    values["languages"] = tuple(dict.fromkeys(named))
    return Model(**values)
