"""Settings: the environment, `.env`, systemd's credentials, and models.toml.

A daemon reads its settings at start and at SIGHUP, with `read_environment` and `load_catalog`, into
a frozen Config of its own. A wrong value raises `ConfigError`, whose message begins with the
variable's name. The message shows no text that may be a key, which people paste in wrong places.
Standard library only.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from cerebrum.fields import Field, Fields, JsonObject, describe, read_fields
from cerebrum_common import FIM_LAYOUTS, HttpError, Model, log


def read_table(table: Any, where: str, fields: Fields, *others: str) -> JsonObject:
    """The checked members of a TOML table, limited to `fields` and `others`. ConfigError says what
    is wrong.
    """
    if not isinstance(table, dict):
        raise ConfigError(f"{where}: expected a table, got something else")
    known = (*fields, *others)
    for name in sorted(table.keys() - known):
        raise ConfigError(f"{where}: expected one of {', '.join(known)}, got {name!r}")
    try:
        return read_fields(table, fields)
    except HttpError as error:
        shown = error.message.partition(' "')[0]  # without the text of a string
        raise ConfigError(f"{where}: {shown}") from None


# ------------------------------------------------------------------------------------ configuration


class ConfigError(ValueError):
    """A setting that keeps a daemon from starting; the message names the variable."""


# Printable ASCII but for space and comma: a header can carry the key as it is.
KEY = re.compile(r"[!-+\--~]+")
# NAME KEY [PLACES], a comment, or nothing.
CLIENT = re.compile(
    rf"\s*(?:#.*|([A-Za-z0-9._-]{{1,32}})\s+({KEY.pattern})(?:\s+([1-9][0-9]?))?\s*)?"
)
MAX_CLIENTS = 32
# NAME=value, a comment, or nothing.
SETTING = re.compile(r"""(?:#.*|(?:export\s+)?([A-Za-z_]\w*)=(["']?)(.*)\2)?""")


class Client(NamedTuple):
    """A person with a key. A guest (`places` above 0) has so many places at most, and only what the
    others leave.
    """

    name: str
    places: int = 0


class Environment(NamedTuple):
    """The variables of the environment, a `.env` file and credentials. A bad value raises
    ConfigError with the variable's name.
    """

    values: Mapping[str, str]

    def text(self, name: str, default: str = "") -> str:
        return self.values.get(name) or default

    def keys(self, name: str) -> tuple[str, ...]:
        """The key in this variable; during a rotation the new one and the old one, with a comma
        between them.
        """
        text = self.text(name)
        if not text:
            return ()
        keys = tuple(key.strip() for key in text.split(","))
        if not all(map(KEY.fullmatch, keys)):
            raise ConfigError(f"{name}: expected printable ASCII without spaces")
        return keys

    def clients(self, name: str, default: Path, strict: bool = True) -> dict[str, Client] | None:
        """The named clients, by their keys, in the file that this variable names or in the default
        one; None if there is no such file. If not `strict`, wrong lines are skipped.
        """
        given = self.text(name)
        path = self.path(name, str(default))
        try:
            lines = path.read_text("utf-8-sig").split("\n")
            if strict and path.stat().st_mode & 0o077:
                log.warning("%s: expected mode 600: others can read the keys", path)
        except FileNotFoundError:
            if given:
                raise ConfigError(f"{name}: expected a file, got none at this path") from None
            return None
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", "expected the path of a file in UTF-8")
            raise ConfigError(f"{name}: cannot read the file: {reason}") from None
        return _read_clients(lines, f"{name}: {path}", strict)

    def warn_of_changes(self, new: Environment, names: Collection[str]) -> None:
        """Log which of these variables have changed in `new`: the daemon uses them only at its
        start.
        """
        if changed := [name for name in names if self.text(name) != new.text(name)]:
            log.warning("%s changed: restart the daemon to use it", ", ".join(changed))

    def log_level(self) -> str:
        text = self.text("CEREBRUM_LOG_LEVEL", "INFO").upper()
        if text not in ("DEBUG", "INFO", "WARNING", "ERROR"):
            raise ConfigError(
                f"CEREBRUM_LOG_LEVEL: expected DEBUG, INFO, WARNING or ERROR, got {text!r}"
            )
        return text

    def host(self, name: str, default: str) -> str:
        """An address or a name. Something else may be a key and is not shown."""
        text = self.text(name, default)
        if not re.fullmatch(r"[\w.:%-]{1,255}", text, re.ASCII):
            raise ConfigError(f"{name}: expected an address or a host name, got something else")
        return text

    def names(self, name: str) -> frozenset[str]:
        """A comma-separated list."""
        parts = self.text(name).split(",")
        return frozenset(part.strip().lower() for part in parts if part.strip())

    def path(self, name: str, default: str) -> Path:
        text = self.text(name, default)
        try:
            return Path(text).expanduser()
        except RuntimeError:
            raise ConfigError(
                f"{name}: expected a path, got {text!r}, and there is no such home"
            ) from None

    def state_dir(self) -> Path:
        """Where a daemon keeps its state; systemd's StateDirectory= by default."""
        return self.path(
            "CEREBRUM_STATE_DIR", self.text("STATE_DIRECTORY", "~/.local/state/cerebrum")
        )

    def number(self, name: str, default: float, low: float, high: float) -> float:
        text = self.text(name, str(default))
        if not re.fullmatch(r"[0-9]+(\.[0-9]+)?", text) or not low <= float(text) <= high:
            raise ConfigError(f"{name}: expected a number from {low} to {high}, got {text!r}")
        return float(text)

    def integer(self, name: str, default: int, low: int, high: int) -> int:
        value = self.number(name, default, low, high)
        if value % 1:
            raise ConfigError(f"{name}: expected an integer, got {value}")
        return int(value)


def _read_clients(lines: Sequence[str], where: str, strict: bool) -> dict[str, Client]:
    """The clients by key. A ConfigError never shows a line, which has a key."""
    clients = dict[str, Client]()
    for number, line in enumerate(lines, 1):
        problem = ""
        match = CLIENT.fullmatch(line)
        if not match:
            problem = "expected NAME KEY [PLACES], got something else"
        elif match[1]:
            name, key, places = match.groups("0")
            if key in clients or name in {client.name for client in clients.values()}:
                problem = "expected each name and each key once"
            else:
                clients[key] = Client(name, int(places))
        if problem and strict:
            raise ConfigError(f"{where}: line {number}: {problem}")
    if strict and len(clients) > MAX_CLIENTS:
        raise ConfigError(f"{where}: expected at most {MAX_CLIENTS} names, got {len(clients)}")
    return clients


def read_environment(environ: Mapping[str, str], folder: Path, strict: bool = True) -> Environment:
    """Read systemd's credentials, then the process's environment, then `folder`/.env: the first
    source that has a variable wins. `.env` has `NAME=value` lines as systemd reads them: quotes are
    optional, and a `#` inside a value is part of the value. If not `strict`, wrong lines are
    skipped.
    """
    return Environment(
        {**_read_env(folder / ".env", strict), **environ, **_read_credentials(environ)}
    )


def _read_credentials(environ: Mapping[str, str]) -> dict[str, str]:
    """Variables from files of the same names, which systemd passes through the unit's
    LoadCredential=.
    """
    folder = environ.get("CREDENTIALS_DIRECTORY")
    values = {}
    try:
        for path in Path(folder).iterdir() if folder else ():
            if re.fullmatch(r"[A-Z][A-Z0-9_]*", path.name):
                value = path.read_text("utf-8", "replace").strip()
                # After a full disk, say; an empty key must not turn authentication off.
                if not value:
                    raise ConfigError(f"{path.name}: expected a value in {path}, got an empty file")
                values[path.name] = value
    except FileNotFoundError:
        pass
    except OSError as error:
        raise ConfigError(
            f"CREDENTIALS_DIRECTORY: cannot read {error.filename}: {error.strerror}"
        ) from None
    return values


def _read_env(path: Path, strict: bool) -> dict[str, str]:
    values = {}
    try:
        lines = path.read_text("utf-8-sig").split("\n")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {getattr(error, 'strerror', error)}") from None
    for number, line in enumerate(lines, 1):
        match = SETTING.fullmatch(line.strip())
        if match and match[1]:
            values[match[1]] = match[3]
        elif strict and not match:
            raise ConfigError(f"{path}: line {number}: expected NAME=value")
    return values


class Catalog(NamedTuple):
    """The contents of models.toml: the models in order of preference, the ids that each mode puts
    before that order, and the backends' tables, which only the Pi reads and checks.
    """

    models: tuple[Model, ...]
    prefer: Mapping[str, tuple[str, ...]]
    backends: tuple[Any, ...]


MODES = ("complete", "infill", "instruct")
MODEL = {
    "id": Field(str, required=True, pattern=r"[A-Za-z0-9._\-]+"),
    **dict.fromkeys(("name", "parameters", "quantization"), Field(str, 1, required=True)),
    # Joined to a folder's path.
    "file": Field(str, default="", pattern=r"(?:[^./\\\x00-\x1f][^/\\\x00-\x1f]*)?"),
    "sha256": Field(str, default="", pattern=r"(?:[0-9a-f]{64})?"),
    **dict.fromkeys(("size", "memory_mb"), Field(int, default=0)),
    "draft": Field(str, default=""),
    "keep": Field(bool, default=False),
    "early": Field(bool, default=True),
    "languages": Field(list, default=[], pattern=r"[A-Za-z0-9+#._\-]{1,40}"),
    "aliases": Field(list, default=[]),
    "fim": Field(list, 3, 3, []),
    "fim_layout": Field(str, default="psm", choices=FIM_LAYOUTS),
}
SIZES = "layers width heads kv_heads head feed_forward vocabulary"
SHAPE = {
    **dict.fromkeys(SIZES.split(), Field(int, 1, 999_999, required=True)),
    **dict.fromkeys(("experts", "used"), Field(int, 0, 999_999, 0)),
}


def load_catalog(path: Path, known: Collection[str]) -> Catalog:
    """Read and check models.toml, in which the language "all" stands for the `known` ones.
    ConfigError names the variable of the path, and the wrong entry with its fault.
    """
    try:
        table = tomllib.loads(path.read_text("utf-8"))
        entries = table.get("models")
        backends = table.get("backends", [])
        if not isinstance(entries, list) or not entries:
            raise ConfigError("expected at least one [[models]]")
        models = [
            _read_model(entry, f"model {number}", known) for number, entry in enumerate(entries, 1)
        ]
        ids = tuple(model.id for model in models)
        wanted = Field(list, default=[], choices=ids)
        prefer = read_table(table.get("prefer", {}), "prefer", dict.fromkeys(MODES, wanted))
        if not isinstance(backends, list):
            raise ConfigError("backends: expected [[backends]], got something else")
        names = list(ids)
        for model in models:
            names += model.aliases
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"expected every id and alias once, got {name!r} twice")
        _check_drafts(models)
    except (OSError, ValueError) as error:
        raise ConfigError(f"CEREBRUM_MODELS_FILE: {path}: {error}") from None
    preferred = {mode: tuple(wanted) for mode, wanted in prefer.items() if wanted}
    return Catalog(tuple(models), preferred, tuple(backends))


def _check_drafts(models: Sequence[Model]) -> None:
    """ConfigError unless each model's draft model has a file and no draft model itself."""
    known = [model.id for model in models if model.file and not model.draft]
    for model in models:
        if model.draft and model.draft not in known:
            raise ConfigError(
                f"{model.id}: draft: expected the id of a model with a file and without a draft, "
                f"got {describe(model.draft)}"
            )


def _read_model(entry: Any, where: str, known: Collection[str]) -> Model:
    given = read_table(entry, where, MODEL, "sources", "shape")
    if not given["file"] and not given["aliases"]:
        raise ConfigError(f"{where}: file: expected a name, or aliases instead, got nothing")
    sources = entry.get("sources", [])
    if not isinstance(sources, list) or not all(isinstance(source, dict) for source in sources):
        raise ConfigError(f"{where}: sources: expected [[models.sources]], got something else")
    if "shape" in entry:
        given["shape"] = read_table(entry["shape"], f"{where}: shape", SHAPE)
    languages = dict[str, None]()  # each once
    for name in given["languages"]:
        languages |= dict.fromkeys(known if name == "all" else [name])
    given["languages"] = languages
    for name in ("languages", "aliases", "fim"):
        given[name] = tuple(given[name])
    return Model(**given, sources=tuple(sources))


# ------------------------------------------------------------------------------- a daemon's state


def write_atomically(path: Path, *parts: bytes | memoryview) -> None:
    """Replace the file by these parts in one step. The file and a new folder are for this user
    alone.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    # A fixed name, so that the next write replaces a killed process's file.
    temporary = path.with_name(f".{path.name}")
    try:
        with open(temporary, "wb", opener=partial(os.open, mode=0o600)) as file:
            file.writelines(parts)
        os.replace(temporary, path)
    except BaseException:  # a full disk, say
        temporary.unlink(missing_ok=True)
        raise
