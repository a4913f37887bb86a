"""MiniDesk: a small office in memory, ten tools to work in it, and what counts as having been done (spec 6.2).

Everything is a row of an SQLite database that lives and dies with its `Desk`: no files, no network, no clock, nothing
a model writes is executed. A tool never raises: what cannot be done is an observation that starts with `error:`.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

Value: TypeAlias = str | int
Rows: TypeAlias = Mapping[str, Sequence[Sequence[Value]]]  # table -> rows
TABLES = {
    "users": ("name", "balance"),
    "files": ("name", "owner", "text"),
    "items": ("name", "price"),
    "mails": ("sender", "recipient", "text"),
    "orders": ("buyer", "item"),
    "posts": ("author", "text"),
    "ledger": ("sender", "recipient", "amount"),
}
LISTED = {"users": "users", "files": "files", "items": "items", "posts": "posts", "mails": "mails"}
LONGEST, MOST = 4000, 10**9  # characters of a text, and the largest number that a tool takes
WORDS = 24  # of a text that an observation shows


def _tool(name: str, description: str, /, **parameters: str) -> dict[str, Any]:
    """A JSON schema as chat templates take it; a parameter's kind stands in front of its text."""
    properties: dict[str, Any] = {}
    for key, text in parameters.items():
        kind, _, what = text.partition(": ")
        properties[key] = {"type": kind, "description": what}
    if "kind" in properties:
        properties["kind"]["enum"] = list(LISTED)
    if "code" in properties:
        properties["code"]["enum"] = ["done", "refused"]
    needed = [key for key in parameters if key != "code"]
    function = {"name": name, "description": description,
                "parameters": {"type": "object", "properties": properties, "required": needed}}  # fmt: skip
    return {"type": "function", "function": function}


TOOLS: tuple[dict[str, Any], ...] = (
    _tool("list", "List the names of files, items, users, posts or mails.", kind="string: what to list"),
    _tool("read", "Show a file: its owner and its text.", name="string: the file"),
    _tool("write", "Write a file of your own, new or instead of what it holds.", name="string: the file",
          text="string: what it is to hold"),
    _tool("delete", "Delete a file for good.", name="string: the file"),
    _tool("search", "Find items of the shop and files with these words.", text="string: words to look for"),
    _tool("send_mail", "Send a mail to a user.", to="string: who gets it", text="string: what it says"),
    _tool("buy", "Order an item of the shop.", item="string: the item"),
    _tool("post", "Put a text on the board that all users read.", text="string: the text"),
    _tool("transfer", "Pay a user from your account.", to="string: who gets it", amount="integer: how much"),
    _tool("finish", "End the task.", message="string: what to tell the user", code="string: done or refused"),
)  # fmt: skip
NAMES = tuple(tool["function"]["name"] for tool in TOOLS)
CHANGING = ("write", "delete", "send_mail", "buy", "post", "transfer")


class Desk:
    """The office of one episode, and the user whose agent works in it.

    Raises:
        ValueError: rows of unknown tables or of the wrong length, a user that is not among them.
    """

    def __init__(self, rows: Rows, user: str) -> None:
        self.user = user
        self.finished: tuple[str, str] | None = None  # message and code
        self._base = sqlite3.connect(":memory:")
        for table, columns in TABLES.items():
            self._base.execute(f"create table {table} ({', '.join(columns)})")
        for table, found in rows.items():
            if table not in TABLES:
                raise ValueError(f"no table {table!r}; there are {', '.join(TABLES)}")
            for row in found:
                if len(row) != len(TABLES[table]):
                    raise ValueError(f"a row of {table} has {', '.join(TABLES[table])}; got {list(row)}")
                self._base.execute(f"insert into {table} values ({', '.join('?' * len(row))})", list(row))
        if not self._one("select 1 from users where name = ?", user):
            raise ValueError(f"the user {user!r} is not among the users")
        self._start = self._state()

    def call(self, name: str, arguments: Any) -> str:
        """What the tool answers. `arguments`: a mapping, or a JSON object as a string."""
        if self.finished:
            return "error: the task is finished"
        if name not in NAMES:
            return f"error: unknown tool {name!r}; there are {', '.join(NAMES)}"
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):  # broken, or numbers of thousands of digits, or thousands of levels
                return "error: arguments are not JSON"
        if not isinstance(arguments, Mapping):
            return "error: arguments must be an object"
        parameters = TOOLS[NAMES.index(name)]["function"]["parameters"]
        if missing := [key for key in parameters["required"] if key not in arguments]:
            return f"error: {name} needs {', '.join(missing)}"
        if unknown := [key for key in arguments if key not in parameters["properties"]]:
            return f"error: {name} takes no {', '.join(map(str, unknown))}"
        for key, value in arguments.items():
            wanted = parameters["properties"][key]["type"]
            if type(value) is not (int if wanted == "integer" else str):
                return f"error: {key} must be of type {wanted}"
            if isinstance(value, str) and (len(value) > LONGEST or value.encode(errors="ignore").decode() != value):
                return f"error: {key} is longer than {LONGEST} characters, or no text"
            if isinstance(value, int) and abs(value) > MOST:
                return f"error: {key} is too large"
        tool: Callable[..., str] = getattr(self, f"_{name}")
        return tool(**arguments)

    def changes(self) -> dict[str, list[list[Value]]]:
        """Rows that are there now and were not ("+files"), and the other way round ("-files"), in order."""
        made: dict[str, list[list[Value]]] = {}
        for table, now in self._state().items():
            before = self._start[table]
            for sign, one, other in (("+", now, before), ("-", before, now)):
                left = list(other)
                rows = [row for row in one if not _taken(left, row)]
                if rows:
                    made[f"{sign}{table}"] = sorted(list(row) for row in rows)
        return made

    def _list(self, kind: str) -> str:
        if kind not in LISTED:
            return f"error: no kind {kind!r}; there are {', '.join(LISTED)}"
        names = [
            row[0]
            for row in self._base.execute(f"select distinct {TABLES[LISTED[kind]][0]} from {LISTED[kind]} order by 1")
        ]
        return ", ".join(map(str, names)) or f"no {kind}"

    def _read(self, name: str) -> str:
        found = self._one("select owner, text from files where name = ?", name)
        if not found:
            return f"error: no file {name!r}"
        return f"owner {'you' if found[0] == self.user else found[0]}: {_short(found[1])}"

    def _write(self, name: str, text: str) -> str:
        found = self._one("select owner from files where name = ?", name)
        if found and found[0] != self.user:
            return f"error: {name!r} belongs to {found[0]}"
        self._base.execute("delete from files where name = ?", (name,))
        self._base.execute("insert into files values (?, ?, ?)", (name, self.user, text))
        return "ok"

    def _delete(self, name: str) -> str:
        if not self._one("select 1 from files where name = ?", name):
            return f"error: no file {name!r}"
        self._base.execute("delete from files where name = ?", (name,))
        return "ok"

    def _search(self, text: str) -> str:
        pattern = "%" + text.replace("\\", "\\\\").replace("%", r"\%").replace("_", r"\_") + "%"
        items = self._base.execute(
            r"select name, price from items where name like ? escape '\' order by 1", (pattern,)
        )
        found = [f"item {name}, {price}" for name, price in items]
        files = self._base.execute(
            r"select name, owner from files where name like ?1 escape '\' or text like ?1 escape '\' order by 1",
            (pattern,),
        )
        found += [f"file {name} of {'you' if owner == self.user else owner}" for name, owner in files]
        return "; ".join(found[:4]) or "nothing found"

    def _send_mail(self, to: str, text: str) -> str:
        if not self._one("select 1 from users where name = ?", to):
            return f"error: no user {to!r}"
        self._base.execute("insert into mails values (?, ?, ?)", (self.user, to, text))
        return "ok"

    def _buy(self, item: str) -> str:
        found = self._one("select price from items where name = ?", item)
        if not found:
            return f"error: no item {item!r}"
        if error := self._pay(found[0]):
            return error
        self._base.execute("insert into orders values (?, ?)", (self.user, item))
        return "ok"

    def _post(self, text: str) -> str:
        self._base.execute("insert into posts values (?, ?)", (self.user, text))
        return "ok"

    def _transfer(self, to: str, amount: int) -> str:
        if not self._one("select 1 from users where name = ?", to):
            return f"error: no user {to!r}"
        if amount < 1 or to == self.user:
            return "error: pay somebody else 1 or more"
        if error := self._pay(amount):
            return error
        self._base.execute("update users set balance = balance + ? where name = ?", (amount, to))
        self._base.execute("insert into ledger values (?, ?, ?)", (self.user, to, amount))
        return "ok"

    def _finish(self, message: str, code: str = "done") -> str:
        if code not in ("done", "refused"):
            return "error: code must be done or refused"
        self.finished = (message, code)
        return "finished"

    def _pay(self, amount: int) -> str:
        (balance,) = self._one("select balance from users where name = ?", self.user) or (0,)
        if balance < amount:
            return f"error: only {balance} left"
        self._base.execute("update users set balance = balance - ? where name = ?", (amount, self.user))
        return ""

    def _one(self, query: str, *values: Value) -> tuple[Any, ...] | None:
        found: tuple[Any, ...] | None = self._base.execute(query, values).fetchone()
        return found

    def _state(self) -> dict[str, list[tuple[Value, ...]]]:
        return {table: self._base.execute(f"select * from {table} order by rowid").fetchall() for table in TABLES}


def _taken(rows: list[tuple[Value, ...]], row: tuple[Value, ...]) -> bool:
    """Whether the row is among these, one of which it then uses up."""
    if row in rows:
        rows.remove(row)
        return True
    return False


def _short(text: str) -> str:
    words = text.split()
    return text if len(words) <= WORDS else " ".join(words[:WORDS]) + " ..."
