"""A server with OpenAI's chat interface, spoken to with the standard library."""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any


@dataclass
class Endpoint:
    """A server with an OpenAI-compatible interface.

    Attributes:
        url: up to `/v1`.
        model: its name there.
        key_variable: the environment variable that holds the key, where the server asks for one.
        key: the key itself, instead.
        retries, wait: after an error of the server or network; waiting doubles. Then OSError.
    """

    url: str
    model: str
    key_variable: str = "OPENAI_API_KEY"
    timeout: float = 120.0
    retries: int = 3
    wait: float = 1.0
    key: str | None = None

    def chat(self, **asked: Any) -> str:
        """The text of a reply to `messages` and other fields of the interface. OSError for an answer without one."""
        return str(self.message(**asked)["content"])

    def message(self, **asked: Any) -> dict[str, Any]:
        """The whole message: its `content`, "" where there is none, `tool_calls` where the server found some, and the
        `finish_reason`."""
        answer = self.post("/chat/completions", {"model": self.model, **asked})
        try:
            found = dict(answer["choices"][0]["message"], finish_reason=answer["choices"][0].get("finish_reason"))
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise OSError(f"{self.url} answered without a message: {json.dumps(answer)[:200]}") from error
        if not isinstance(content := found.get("content") or "", str):
            raise OSError(f"{self.url} answered with no text: {json.dumps(content)[:200]}")
        return {**found, "content": content}

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
                reason = f"{self.url}{path}: {error.code} {error.read()[:200].decode(errors='replace')}"
                if error.code < 500 and error.code != 429:  # asking again would not help
                    raise OSError(reason) from error
            except (OSError, http.client.HTTPException, ValueError) as error:  # a reply cut short, or no JSON in UTF-8
                reason = f"{self.url}{path}: {error}"
            if number < self.retries:
                time.sleep(self.wait * 2**number)
        raise OSError(f"{reason} (tried {self.retries + 1} times)")
