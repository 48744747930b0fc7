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

    def log_message(self, *_: Any) -> None:
        pass

    def send_json(self, status: int, members: Any) -> None:
        payload = json.dumps(members, separators=(",", ":")).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def is_allowed(self) -> bool:
        return not self.key or self.headers.get("Authorization") == f"Bearer {self.key}"

    def do_GET(self) -> None:
        card = {"id": self.model, "object": "model", "owned_by": "vllm", "root": self.model, "parent": None}
        if self.path == "/health":  # needs no key
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()
        elif not self.is_allowed():
            self.send_json(401, {"error": "Unauthorized"})
        elif self.path == "/v1/models":
            self.send_json(200, {"object": "list", "data": [card | {"max_model_len": self.context, "permission": []}]})
        else:
            self.send_json(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.is_allowed():
            self.send_json(401, {"error": "Unauthorized"})
            return
        say(f"asked {json.dumps(asked)}")
        is_chat = self.path == "/v1/chat/completions"
        prompt = "".join(message["content"] for message in asked["messages"]) if is_chat else asked["prompt"]
        counted = count(prompt)
        limit = asked.get("max_tokens") or (self.context - counted if is_chat else DEFAULT_TOKENS)
        if refusal := self.refusal(asked, counted, limit):
            status, message = refusal
            say(f"refused {status}")
            self.send_json(status, {"error": {"message": message, "type": "BadRequestError", "code": status}})
            return
        text = CHAT if is_chat else text_for(prompt)
        self.stream(asked, is_chat, tokens_of(text, min(limit, self.context - counted)), counted)

    def refusal(self, asked: dict[str, Any], counted: int, limit: int) -> tuple[int, str] | None:
        """Why a request cannot be served."""
        if asked["model"] != self.model:
            return 404, f"The model `{asked['model']}` does not exist. Valid aliases: {self.model}."
        if asked.get("suffix") is not None:
            return 400, "suffix is only supported for models with FIM completion rendering (parameter=suffix)"
        if limit > self.context:
            message = f"max_tokens={limit} cannot be greater than max_model_len={self.context}. Please request fewer"
            return 400, f"{message} output tokens. (parameter=max_tokens, value={limit})"
        if counted >= self.context:  # it stops counting there
            message = f"This model's maximum context length is {self.context} tokens. However, your prompt contains at"
            message += f" least {self.context + 1} input tokens, which exceeds this limit even without any output"
            return 400, f"{message} tokens. Please reduce the length of the input prompt."
        return None

    def stream(
        self, asked: dict[str, Any], is_chat: bool, tokens: list[tuple[str, str | None]], prompt_tokens: int
    ) -> None:
        assert asked["stream"], "the Pi always asks for a stream"
        kind = "chat.completion.chunk" if is_chat else "text_completion"
        chunk = {"id": "cmpl-1", "object": kind, "created": int(time.time()), "model": self.model}
        time.sleep(PAUSE_SECONDS)
        self.send_response(200)
        self.send_header("content-type", "text/event-stream; charset=utf-8")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        written = 0
        try:
            if is_chat:
                first = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
                self.send_event(chunk | {"choices": [first]})
            for token, reason in tokens:
                told = {"delta": {"content": token}} if is_chat else {"text": token}
                choice = {"index": 0, "logprobs": None, "finish_reason": reason, **told}
                self.send_event(chunk | {"choices": [choice]})
                written += 1
                time.sleep(TOKEN_SECONDS)
            if (asked.get("stream_options") or {}).get("include_usage"):
                counts = {"prompt_tokens": prompt_tokens, "completion_tokens": written}
                self.send_event(chunk | {"choices": [], "usage": counts | {"total_tokens": prompt_tokens + written}})
            self.send_event("[DONE]")
            self.wfile.write(b"0\r\n\r\n")
            say(f"ended {written}")
        except ConnectionError:
            say(f"left {written}")
            self.close_connection = True

    def send_event(self, data: Any) -> None:
        text = data if isinstance(data, str) else json.dumps(data, separators=(",", ":"))
        event = f"data: {text}\n\n".encode()
        self.wfile.write(b"%x\r\n%b\r\n" % (len(event), event))


def tokens_of(text: str, limit: int) -> list[tuple[str, str | None]]:
    """Each token with the reason for the end behind it. The mark of a natural end is a token without text."""
    *tokens, last = [*re.findall(r"\w+|\W", text), ""][:limit]
    return [*((token, None) for token in tokens), (last, "length" if last else "stop")]


def main(port: str, key: str, model: str, context: str) -> None:
    Handler.key, Handler.model, Handler.context = key, model, int(context)
    server = ThreadingHTTPServer(("127.0.0.1", int(port)), Handler)
    say(f"listening on http://127.0.0.1:{server.server_port}")
    server.serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
