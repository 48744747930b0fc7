"""What the kinds of backends have in common. The kinds are vpsd (native.py), llama-server and
OpenAI (engines.py).

A `Kind` asks one backend in its own language and answers in the Pi's: pairs, errors for clients,
tables of models. It owns the HTTP client. What is known about the backend belongs to `Backend`.

A backend is not trusted: of its results only the known members of the right type and range are
passed on.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from hashlib import blake2b
from typing import TypeVar

from cerebrum.fields import Field, JsonObject, Members
from cerebrum.pi.completion import Fitted, Pairs
from cerebrum.pi.upstream import (
    EVENT_STREAM,
    JSON,
    LATE,
    Answer,
    BackendConfig,
    BackendFailure,
    Upstream,
    blamed,
)
from cerebrum_common import HttpError, Model

ASIDE_SECONDS = 2.0  # /health and /v1/models, which are answered in milliseconds
LOAD_SECONDS = 120.0  # for an answer that waits until a model is loaded
MAX_ERROR_BYTES = 65_536  # an error's JSON
MAX_TOKENS_BYTES = 8 << 20  # the tokens of 1 MiB of text
# /v1/models, where a cloud lists hundreds of models; or an answer that is not streamed
MAX_JSON_BYTES = 1 << 20


T = TypeVar("T")
Models = dict[str, JsonObject]  # by name: {"n_ctx", "loaded", …}
RETRY_AFTER = re.compile("[1-9][0-9]{0,8}")  # its other form, a date, is not read
MAX_REST_SECONDS = 60
TOO_MANY = ("RATE_LIMIT", "VPS backend has too many requests; try again later")
AFFINITY_KEY = os.urandom(16)  # so that a balancer learns nothing of a file


class Kind(ABC):
    """One backend of some kind, asked in its own language."""

    # What backends of a kind can do; a kind overrides what differs.
    # Whether it is vpsd, which
    # - knows our ids of models, and says how to get a missing model;
    # - answers other requests while it generates, without disturbing that;
    # - reports exactly how many tokens it reads, and cuts no answer.
    is_ours = False
    reads_ahead = False  # reading a prompt ahead costs nothing
    tokenize_path = ""  # "" if it counts no tokens for others
    key_line: str  # the beginning of the header that carries our key
    idle_seconds: float  # how long an answer may be silent

    version = ""  # as it last said; "" if it does not

    def __init__(self, config: BackendConfig, catalog: Sequence[Model]) -> None:
        self.config = config
        self.catalog = catalog
        self.client = Upstream(config, self.key_line)

    # How a kind speaks.

    parse: Callable[[bytes], JsonObject]  # a JSON object; HttpError if it is none

    def refusal(self, status: int, members: Members) -> HttpError:
        """The client's error if the backend answers with this status and these members.
        BackendFailure if no working backend would. Here for members that no kind knows: a 4xx is
        about the request, maybe by a proxy, and a 501 about the call.
        """
        if status not in range(400, 500) and status != 501:
            return BackendFailure(f"it answered {status}")
        return HttpError("VPS_UNAVAILABLE", f"VPS backend refuses the request ({status})")

    # What a kind reports about itself.

    @abstractmethod
    async def ask_health(self) -> list[str] | None:
        """The ids of the models in its memory; None: all that it lists. HttpError if it is not
        well.
        """

    @abstractmethod
    async def list_models(self) -> Models:
        """The models that it has, by its names for them."""

    @abstractmethod
    def layout(self, model: str, about: Members) -> str:
        """How a gap's prompt is laid out for a model that the backend reports so, see
        `arrange_gap`.
        """

    # How a kind is asked.

    @abstractmethod
    def write(self, wanted: Fitted) -> tuple[str, JsonObject]:
        """The path and the body of a request for a completion."""

    @abstractmethod
    def read(self, answer: Answer, wanted: Fitted) -> Pairs:
        """The pairs of this answer: ("begun", None) once the backend responds, ("done", …) last.
        HttpError if it refuses, BackendFailure if its answer breaks off.
        """

    def tokenize_body(self, name: str, fields: Members) -> Members:
        """The body of a request for a text's tokens; `fields` are those of llama-server's."""
        return fields

    # What all kinds share.

    def ask(self, wanted: Fitted) -> AbstractAsyncContextManager[Answer]:
        """Send a request for a completion, and yield its unread answer."""
        header = ""
        if wanted.file and (name := self.config.affinity_header):
            token = blake2b(wanted.file.encode(), key=AFFINITY_KEY, digest_size=16)
            header = f"{name}: {token.hexdigest()}"
        return self.client.send(*self.write(wanted), self.idle_seconds, header)

    async def begin(self, answer: Answer, seconds: float, media: str) -> bool:
        """Read the head of a 200 with this media type. False if no head has come after `seconds`:
        call again. HttpError if the backend refuses, BackendFailure if its answer is malformed.
        """
        members = JsonObject()
        try:
            async with asyncio.timeout(seconds):
                with blamed("its answer is not HTTP/1.1"):
                    await answer.read_head(media)
                if answer.status == 200:
                    return True
                with contextlib.suppress(HttpError):  # the status may be enough
                    members = self.parse(await answer.read_all(MAX_ERROR_BYTES))
        except TimeoutError:
            if answer.status < 200:
                return False
        after = RETRY_AFTER.fullmatch(answer.retry_after)
        # Only a completion is asked for as events. To a probe, a 503 says that the backend is not
        # well.
        if after and answer.status in (429, 503) and media == EVENT_STREAM:
            busy = HttpError(*TOO_MANY)
            busy.retry_after = min(int(after[0]), MAX_REST_SECONDS)
            raise busy
        raise self.refusal(answer.status, members)

    async def get(self, path: str) -> JsonObject:
        """The JSON object at `path`."""
        return await self._fetch(path, None, ASIDE_SECONDS, MAX_JSON_BYTES, self.parse)

    async def tokenize(self, name: str, fields: Members) -> bytes:
        """The tokens of a text, as `read_tokens` returns them. The backend may have to load the
        model first.
        """
        return await self._fetch(
            self.tokenize_path,
            self.tokenize_body(name, fields),
            LOAD_SECONDS,
            MAX_TOKENS_BYTES,
            read_tokens,
        )

    async def _fetch(
        self,
        path: str,
        body: Members | None,
        seconds: float,
        limit: int,
        parse: Callable[[bytes], T],
    ) -> T:
        """Parse an answer in one piece of at most `limit` bytes, whose head may take `seconds`."""
        async with self.client.send(path, body, LOAD_SECONDS) as answer:
            if not await self.begin(answer, seconds, JSON):
                raise BackendFailure(LATE)
            with blamed("its answer is not JSON"):
                async with asyncio.timeout(ASIDE_SECONDS):
                    return parse(await answer.read_all(limit))


# --------------------------------------------------------------------------------- what they answer

COUNT = Field(int, 0, 10**9)
SECONDS = Field(float, 0, 10**9)
PROBABILITY = Field(float, 0, 1)
RESULT_FIELDS = {  # of a done event, which the Pi passes on
    "finish_reason": Field(str, 1, 40),
    "total_tokens": COUNT,
    "prompt_tokens": COUNT,
    "cached_tokens": COUNT,
    "inference_time": SECONDS,
    "load_time": SECONDS,
    "ttft": SECONDS,
    "tokens_per_second": SECONDS,
    "draft_tokens": COUNT,
    "accepted_tokens": COUNT,
    "confidence": PROBABILITY,
    "text_confidence": PROBABILITY,
    "chance": PROBABILITY,
    "prompt_cut": Field(bool),
}


def read_tokens(answer: bytes) -> bytes:
    """The integers of `{"tokens": [1, 2]}` with commas between them, unparsed: there can be a
    million, which a parser reads in a second. HttpError for any other answer.
    """
    packed = answer.translate(None, b" \n")
    tokens = packed[11:-2]
    is_list = packed == b'{"tokens":[%b]}' % tokens and not tokens.translate(None, b"0123456789,")
    if not is_list or (tokens and b",," in b",%b," % tokens):
        raise HttpError("INVALID_REQUEST", "expected tokens")
    return tokens
