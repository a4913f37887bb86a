"""A server with OpenAI's interface (vLLM, llama.cpp and others), spoken to with the standard library."""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any, TypeVar

from tqdm.auto import tqdm

Item = TypeVar("Item")
Result = TypeVar("Result")
SHOWN = 300  # characters of an answer in an error


@dataclass
class Endpoint:
    """A model behind a server with an OpenAI-compatible interface.

    Attributes:
        url: up to `/v1`.
        model: its name there.
        key_variable: the environment variable that holds the key, where the server asks for one.
        key: the key itself, instead.
        retries, wait: after an error of the server (5xx), 429, a timeout or a broken connection; waiting doubles. Then
            OSError, as at once for any other status, with the URL, the status and the answer's first line.

    Raises:
        ValueError: `url` does not begin with http:// or https://.
    """

    url: str
    model: str
    key_variable: str = "OPENAI_API_KEY"
    timeout: float = 120.0
    retries: int = 3
    wait: float = 1.0
    key: str | None = None

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"{self.url!r} is no address of a server; give one like http://127.0.0.1:8000/v1")

    def complete(self, prompt: str, **asked: Any) -> str:
        """The text behind `prompt`. `asked`: other fields of the interface (`max_tokens`, `temperature`, `stop`)."""
        return self._text(self._choice("/completions", {"prompt": prompt, **asked}).get("text"))

    def chat(self, **asked: Any) -> str:
        """The text of a reply to `messages` and other fields of the interface. OSError for an answer without one."""
        return str(self.message(**asked)["content"])

    def message(self, **asked: Any) -> dict[str, Any]:
        """The whole message: its `content`, "" where there is none, `tool_calls` where the server found some, and the
        `finish_reason`."""
        choice = self._choice("/chat/completions", asked)
        if not isinstance(found := choice.get("message"), dict):
            raise OSError(f"{self.url} answered without a message: {json.dumps(choice)[:SHOWN]}")
        content = self._text(found.get("content") or "")
        return {**found, "finish_reason": choice.get("finish_reason"), "content": content}

    def post(self, path: str, asked: Any) -> Any:
        """The answer as JSON; `path` behind the URL, or one that begins with `/..` beside its `/v1`."""
        headers = {"Content-Type": "application/json"}
        if key := self.key or os.environ.get(self.key_variable):
            headers["Authorization"] = f"Bearer {key}"
        root = self.url.rstrip("/")
        if path.startswith("/.."):
            root, path = root.removesuffix("/v1"), path.removeprefix("/..")
        call = urllib.request.Request(root + path, json.dumps(asked).encode(), headers)
        for number in range(self.retries + 1):
            try:
                with urllib.request.urlopen(call, timeout=self.timeout) as reply:
                    return json.loads(reply.read())
            except urllib.error.HTTPError as error:
                reason = f"{root}{path}: {error.code} {_line(error)}"
                if error.code < 500 and error.code != 429:  # asking again would not help
                    raise OSError(reason) from error
            except (OSError, http.client.HTTPException, ValueError) as error:  # a reply cut short, or no JSON in UTF-8
                reason = f"{root}{path}: {error}"
            if number < self.retries:
                time.sleep(self.wait * 2**number)
        raise OSError(f"{reason} (tried {self.retries + 1} times)")

    def _choice(self, path: str, asked: dict[str, Any]) -> dict[str, Any]:
        answer = self.post(path, {"model": self.model, **asked})
        try:
            return dict(answer["choices"][0])
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise OSError(f"{self.url} answered without a message: {json.dumps(answer)[:SHOWN]}") from error

    def _text(self, found: Any) -> str:
        if not isinstance(found, str):
            raise OSError(f"{self.url} answered with no text: {json.dumps(found)[:SHOWN]}")
        return found


def side_by_side(
    ask: Callable[[Item], Result], items: Sequence[Item], at_once: int, *, progress: bool = False
) -> list[Result]:
    """`ask` of every item in threads, `at_once` of them at a time; results in the items' order. The first error ends
    it: what has not begun by then is not asked."""
    pool = ThreadPoolExecutor(at_once)
    try:
        made = [pool.submit(ask, item) for item in items]
        with tqdm(total=len(items), disable=not progress, desc="answers", unit="answer") as bar:
            for one in as_completed(made):
                one.result()
                bar.update()
        return [one.result() for one in made]
    finally:
        pool.shutdown(cancel_futures=True)


def _line(error: urllib.error.HTTPError) -> str:
    """What the server says about it, on one line: many write JSON over several."""
    try:
        return " ".join(error.read().decode(errors="replace").split())[:SHOWN]
    except (OSError, http.client.HTTPException):  # cut short
        return str(error.reason)
