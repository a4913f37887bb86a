"""A server on loopback with OpenAI's interface: it answers what a function says, or what a tiny model writes."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

import torch

Answer = Callable[[str, dict[str, Any]], Any]


class Cut(NamedTuple):
    """An answer that breaks off in the middle."""

    body: Any


class Server(ThreadingHTTPServer):
    request_queue_size = 128  # 5 would let some of many connections at once wait a second for their next try


class FakeServer:
    """`answer(path, asked)`: a status, a `Cut`, bytes as they are, or what is sent as JSON. `seen` holds all that was
    asked, `headers` under which."""

    def __init__(self, answer: Answer) -> None:
        self.seen: list[tuple[str, dict[str, Any]]] = []
        self.headers: list[dict[str, str]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:  # noqa: N802
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.seen.append((self.path, asked))
                outer.headers.append(dict(self.headers))
                found = answer(self.path, asked)
                body = found.body if isinstance(found, Cut) else found
                data = b"no luck\nhere" if isinstance(found, int) else body
                data = data if isinstance(data, bytes) else json.dumps(data, indent=1).encode()
                self.send_response(found if isinstance(found, int) else 200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data[: len(data) // 2] if isinstance(found, Cut) else data)

            def log_message(self, *args: object) -> None:
                pass

        self.server = Server(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def __enter__(self) -> FakeServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


def said(**message: Any) -> dict[str, Any]:
    """An answer of /v1/chat/completions."""
    return {"choices": [{"message": message}]}


def writes(**models: tuple[Any, Any]) -> Answer:
    """What a server of these models and tokenizers answers, by their names: each prompt alone through `generate`."""
    lock = threading.Lock()

    def answer(path: str, asked: dict[str, Any]) -> Any:
        if asked["model"] not in models:
            return 404
        assert asked["temperature"] == 0
        model, tokenizer = models[asked["model"]]
        if path == "/v1/completions":
            ids = tokenizer(asked["prompt"])["input_ids"]
        elif path == "/v1/chat/completions":
            ids = tokenizer.apply_chat_template(
                asked["messages"], tools=asked.get("tools"), add_generation_prompt=True, return_dict=True,
                **asked.get("chat_template_kwargs", {})
            )["input_ids"]  # fmt: skip
        else:
            return 404
        with lock, torch.no_grad():
            whole = model.generate(torch.tensor([ids]), max_new_tokens=asked["max_tokens"], do_sample=False)[0]
        head, text = (str(tokenizer.decode(part, skip_special_tokens=True)) for part in (ids, whole))
        text = text[len(head) :]
        return {"choices": [{"text": text}]} if path == "/v1/completions" else said(role="assistant", content=text)

    return answer
