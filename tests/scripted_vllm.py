"""A program that answers as vLLM 0.32's OpenAI server does, without a model: what it writes is fixed.

    python tests/scripted_vllm.py PORT KEY MODEL CONTEXT

A text has a token for each word, space or line end; the prompt counts one for each four characters. The head of a
stream comes after a pause, and then a token every few milliseconds. Each request's body is printed as `asked JSON`, and
its end as `ended N` after N tokens, as `left N` if the client has left, or as `refused STATUS`.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

BODY = "    return fibonacci(n - 1) + fibonacci(n - 2)\n"
PAST = "\n\nprint(fibonacci(10))\nprint(fibonacci(11))\n"  # a base model goes on, although the function is whole
GAP = "a + b"
CHAT = (
    "Sure! Here is the function:\n\n```python\ndef add(a, b):\n    return a + b\n```\n\nIt adds two numbers. Have fun!"
)
FIM = re.compile(r"<\|fim_prefix\|>.*<\|fim_suffix\|>.*<\|fim_middle\|>", re.DOTALL)
PAUSE_SECONDS, TOKEN_SECONDS = 0.2, 0.005
DEFAULT_TOKENS = 16  # of vLLM's /v1/completions


class Refusal(Exception):
    """An error that is answered before the head of a stream."""

    def __init__(self, status: int, message: str, param: str, value: object = None) -> None:
        self.status, self.param = status, param
        self.message = message if value is None else f"{message} (parameter={param}, value={value})"


def text_for(prompt: str) -> str:
    """What the model writes after a prompt of /v1/completions."""
    if FIM.search(prompt):
        return GAP
    return BODY + PAST if "def fibonacci" in prompt else "".join(f"{number}\n" for number in range(5, 5000))


def count(text: str) -> int:
    """The tokens of a prompt."""
    return len(text) // 4 + 1


def say(line: str) -> None:
    """Print a line in one piece, whatever other threads print."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    key = model = ""
    context = 0

    def log_message(self, format: str, *_: Any) -> None:
        pass

    def send_json(self, status: int, members: Any) -> None:
        payload = json.dumps(members, separators=(",", ":")).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def allowed(self) -> bool:
        if not self.key or self.headers.get("Authorization") == f"Bearer {self.key}":
            return True
        self.send_json(401, {"error": "Unauthorized"})
        return False

    def do_GET(self) -> None:
        if self.path == "/health":  # needs no key
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()
        elif self.path == "/v1/models":
            if self.allowed():
                self.send_json(200, {"object": "list", "data": [self.card()]})
        else:
            self.send_json(404, {"detail": "Not Found"})

    def card(self) -> dict[str, Any]:
        about = {"id": self.model, "object": "model", "created": int(time.time()), "owned_by": "vllm"}
        return about | {"root": self.model, "parent": None, "max_model_len": self.context, "permission": []}

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        if not self.allowed():
            return
        asked = json.loads(raw)
        say(f"asked {json.dumps(asked)}")
        try:
            if self.path == "/v1/completions":
                self.complete(asked)
            elif self.path == "/v1/chat/completions":
                self.chat(asked)
            else:
                self.send_json(404, {"detail": "Not Found"})
        except Refusal as refusal:
            kind = "NotFoundError" if refusal.status == 404 else "BadRequestError"
            error = {"message": refusal.message, "type": kind, "param": refusal.param, "code": refusal.status}
            say(f"refused {refusal.status}")
            self.send_json(refusal.status, {"error": error})

    def check(self, asked: dict[str, Any], prompt: str, limit: int) -> tuple[int, int]:
        """(the prompt's tokens, the most tokens to write); Refusal if the request cannot be served."""
        if asked["model"] != self.model:
            sentence = f"The model `{asked['model']}` does not exist. Valid aliases: {self.model}."
            raise Refusal(404, sentence, "model")
        if asked.get("suffix") is not None:
            raise Refusal(400, "suffix is only supported for models with FIM completion rendering", "suffix")
        if limit < 1:
            raise Refusal(400, f"max_tokens must be at least 1, got {limit}.", "max_tokens", limit)
        if limit > self.context:
            sentence = f"max_tokens={limit} cannot be greater than max_model_len={self.context}. Please request fewer"
            raise Refusal(400, f"{sentence} output tokens.", "max_tokens", limit)
        counted = count(prompt)
        if counted >= self.context:  # it stops counting there
            sentence = f"This model's maximum context length is {self.context} tokens. However, your prompt contains at"
            sentence += f" least {self.context + 1} input tokens, which exceeds this limit even without any output"
            sentence += " tokens. Please reduce the length of the input prompt."
            raise Refusal(400, sentence, "input_tokens", self.context + 1)
        return counted, min(limit, self.context - counted)

    def complete(self, asked: dict[str, Any]) -> None:
        limit = asked.get("max_tokens", DEFAULT_TOKENS)
        counted, limit = self.check(asked, asked["prompt"], limit)
        chunk = {"id": "cmpl-1", "object": "text_completion", "created": int(time.time()), "model": self.model}

        def choice(text: str, reason: str | None) -> dict[str, Any]:
            return {"index": 0, "text": text, "logprobs": None, "finish_reason": reason, "stop_reason": None}

        def events() -> Iterator[dict[str, Any]]:
            for token, reason in self.tokens(text_for(asked["prompt"]), limit):
                yield {**chunk, "choices": [choice(token, reason)]}

        self.stream(asked, chunk, events(), counted)

    def chat(self, asked: dict[str, Any]) -> None:
        prompt = "".join(message["content"] for message in asked["messages"])
        limit = asked.get("max_tokens") or self.context - count(prompt)
        counted, limit = self.check(asked, prompt, limit)
        chunk = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": int(time.time())}
        chunk["model"] = self.model

        def choice(delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
            return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}

        def events() -> Iterator[dict[str, Any]]:
            yield {**chunk, "choices": [choice({"role": "assistant", "content": ""})]}
            for token, reason in self.tokens(CHAT, limit):
                yield {**chunk, "choices": [choice({"content": token}, reason)]}

        self.stream(asked, chunk, events(), counted)

    def tokens(self, text: str, limit: int) -> list[tuple[str, str | None]]:
        """Each token with the reason for the end behind it. The mark of a natural end is a token without text."""
        *tokens, last = [*re.findall(r"\w+|\W", text), ""][:limit]
        return [*((token, None) for token in tokens), (last, "length" if last else "stop")]

    def stream(
        self, asked: dict[str, Any], chunk: dict[str, Any], events: Iterator[dict[str, Any]], prompt_tokens: int
    ) -> None:
        assert asked["stream"], "the Pi always asks for a stream"
        time.sleep(PAUSE_SECONDS)
        self.send_response(200)
        self.send_header("content-type", "text/event-stream; charset=utf-8")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        written = 0
        try:
            for event in events:
                self.send_event(json.dumps(event, separators=(",", ":")))
                written += event["choices"][0].get("delta", {}).get("role") is None
                time.sleep(TOKEN_SECONDS)
            if (asked.get("stream_options") or {}).get("include_usage"):
                total = prompt_tokens + written
                usage = {"prompt_tokens": prompt_tokens, "total_tokens": total, "completion_tokens": written}
                self.send_event(json.dumps({**chunk, "choices": [], "usage": usage}, separators=(",", ":")))
            self.send_event("[DONE]")
            self.wfile.write(b"0\r\n\r\n")
            say(f"ended {written}")
        except ConnectionError:
            say(f"left {written}")
            self.close_connection = True

    def send_event(self, data: str) -> None:
        event = f"data: {data}\n\n".encode()
        self.wfile.write(b"%x\r\n%b\r\n" % (len(event), event))


def main(port: str, key: str, model: str, context: str) -> None:
    Handler.key, Handler.model, Handler.context = key, model, int(context)
    server = ThreadingHTTPServer(("127.0.0.1", int(port)), Handler)
    say(f"listening on http://127.0.0.1:{server.server_port}")
    server.serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
