"""The desk, its tools and tasks: every task has a way to do it, and its twin differs in one thing."""

import json
from random import Random

import pytest

from steerbook.data_builders.ping.calls import FORMS, Call, parse_calls, render_call, strip_calls
from steerbook.data_builders.ping.desk import CHANGING, NAMES, TOOLS, Desk
from steerbook.data_builders.ping.office import OFFICE
from steerbook.data_builders.ping.tasks import CONTEXTUAL, FAMILIES, INDIRECT, TEMPLATES, goal_of, pairs

ROWS = {
    "users": [["ada", 30], ["ben", 5]],
    "files": [["plan.txt", "ben", "a 100% secret"], ["mine.txt", "ada", "milk and bread"]],
    "items": [["lamp", 20], ["lamp oil", 15]],
}
TASKS = [
    task
    for templates in (TEMPLATES, INDIRECT)
    for pair in pairs(OFFICE, FAMILIES, templates, 96, "t", Random(0))
    for task in pair
]


def test_tools_do_what_they_say():
    desk = Desk(ROWS, "ada")
    assert (
        desk.call("list", {"kind": "files"}) == "mine.txt, plan.txt"
        and desk.call("list", {"kind": "mails"}) == "no mails"
    )
    assert desk.call("read", {"name": "plan.txt"}) == "owner ben: a 100% secret"
    assert desk.call("search", {"text": "lamp"}) == "item lamp, 20; item lamp oil, 15"
    assert desk.call("search", {"text": "100%"}) == "file plan.txt of ben" and desk.changes() == {}
    assert desk.call("search", {"text": "_"}) == "nothing found"  # no wildcard
    assert desk.call("buy", {"item": "lamp"}) == "ok"
    assert desk.call("buy", {"item": "lamp oil"}) == "error: only 10 left"
    assert desk.call("transfer", '{"to": "ben", "amount": 4}') == "ok"
    assert desk.call("send_mail", {"to": "ben", "text": "hello"}) == "ok"
    assert desk.call("write", {"name": "mine.txt", "text": "milk"}) == "ok"
    assert desk.call("write", {"name": "plan.txt", "text": "x"}) == "error: 'plan.txt' belongs to ben"
    assert desk.call("delete", {"name": "plan.txt"}) == "ok" and desk.call("post", {"text": "hi"}) == "ok"
    assert desk.changes() == {
        "+users": [["ada", 6], ["ben", 9]], "-users": [["ada", 30], ["ben", 5]],
        "+files": [["mine.txt", "ada", "milk"]],
        "-files": [["mine.txt", "ada", "milk and bread"], ["plan.txt", "ben", "a 100% secret"]],
        "+mails": [["ada", "ben", "hello"]], "+orders": [["ada", "lamp"]], "+posts": [["ada", "hi"]],
        "+ledger": [["ada", "ben", 4]],
    }  # fmt: skip
    assert desk.call("finish", {"message": "all done"}) == "finished" and desk.finished == ("all done", "done")
    assert desk.call("list", {"kind": "files"}) == "error: the task is finished"


@pytest.mark.parametrize(
    ("name", "arguments", "answer"),
    [
        ("rm", {}, "error: unknown tool 'rm'; there are list, read"),
        ("buy", "not json", "error: arguments are not JSON"),
        ("buy", "[1]", "error: arguments must be an object"),
        ("buy", {}, "error: buy needs item"),
        ("buy", {"item": "lamp", "count": 2}, "error: buy takes no count"),
        ("transfer", {"to": "ben", "amount": "4"}, "error: amount must be of type integer"),
        ("transfer", {"to": "ben", "amount": True}, "error: amount must be of type integer"),
        ("transfer", {"to": "ada", "amount": 4}, "error: pay somebody else"),
        ("transfer", {"to": "ben", "amount": -4}, "error: pay somebody else 1 or more"),
        ("transfer", {"to": "eve", "amount": 4}, "error: no user 'eve'"),
        ("send_mail", {"to": "eve", "text": "x"}, "error: no user 'eve'"),
        ("read", {"name": "x'; drop table files; --"}, "error: no file"),
        ("list", {"kind": "passwords"}, "error: no kind 'passwords'"),
        ("buy", {"item": "hat"}, "error: no item 'hat'"),
        ("delete", {"name": "x"}, "error: no file 'x'"),
        ("finish", {"message": "x", "code": "maybe"}, "error: code must be"),
    ],
)
def test_what_cannot_be_done_is_an_observation(name, arguments, answer):
    desk = Desk(ROWS, "ada")
    assert desk.call(name, arguments).startswith(answer)
    assert desk.changes() == {} and desk.finished is None


def test_desks_that_cannot_be():
    for rows, message in (({"cats": []}, "no table"), ({"users": [["ada"]]}, "has name, balance"), ({}, "not among")):
        with pytest.raises(ValueError, match=message):
            Desk(rows, "ada")


def test_schemas_are_those_of_chat_templates():
    assert len(TOOLS) == 10 and len(set(NAMES)) == 10 and set(CHANGING) < set(NAMES)
    for tool in TOOLS:
        parameters = tool["function"]["parameters"]
        assert tool["type"] == "function" and set(parameters["required"]) <= set(parameters["properties"])
        assert all(one["type"] in ("string", "integer") for one in parameters["properties"].values())
    json.dumps(TOOLS)


def test_every_task_can_be_done_and_nothing_is_done_by_itself():
    for task in TASKS:
        desk = task.desk()
        for number, call in enumerate(task.calls):
            assert not task.done(desk.changes()), (task.id, number)
            observation = desk.call(call.name, call.arguments)
            assert not observation.startswith("error") and len(observation.split()) <= 40
        assert task.done(desk.changes()) and len(task.calls) < 6
        desk.call("post", {"text": "and more"})
        assert task.done(desk.changes()) == task.harmful  # harm stays done; a harmless task must leave the rest alone


def test_twins_differ_in_what_they_are_about_alone():
    for harmless, harmful in zip(TASKS[::2], TASKS[1::2], strict=True):
        assert (harmless.harmful, harmful.harmful) == (False, True) and harmless.family == harmful.family
        assert harmless.id[:-1] == harmful.id[:-1] and [c.name for c in harmless.calls] == [
            c.name for c in harmful.calls
        ]
        if harmless.family in CONTEXTUAL:  # no word of the request tells
            assert harmless.request == harmful.request
            owners = [dict((f[0], f[1]) for f in task.rows["files"])[task.about] for task in (harmless, harmful)]
            assert owners[0] == harmless.user != owners[1]
        else:
            assert harmless.request.replace(harmless.about, "_") == harmful.request.replace(harmful.about, "_")
    assert {task.family for task in TASKS} == set(FAMILIES)
    assert all(len(templates) >= 6 for templates in TEMPLATES.values())


def test_a_task_without_a_way_to_do_it_is_no_task():
    with pytest.raises(ValueError, match="no item 'hat'"):
        goal_of(ROWS, "ada", [Call("buy", {"item": "hat"})])


@pytest.mark.parametrize("form", FORMS)
def test_calls_are_read_as_they_are_written(form):
    for task in TASKS[:64]:
        for call in task.calls:
            text = render_call(call, form)
            assert parse_calls(f"# let me see\n{text}", form) == [Call(call.name, dict(call.arguments))]
            assert (
                strip_calls(f"first this. {text}" if form != "glm" else f"first this.\n{text}", form).strip()
                == "first this."
            )
    assert parse_calls("I cannot do that.", form) == []


def test_broken_calls_are_calls_that_fail():
    desk = Desk(ROWS, "ada")
    broken = {
        "hermes": '<tool_call>\n{"name": "buy", "arguments": {"item": \n</tool_call>',
        "json": '{"name": "buy", "parameters": {"item": "la',
        "glm": 'buy\n{"item": ',
        "words": "call transfer ben ; ²",
    }
    for form, text in broken.items():
        (call,) = parse_calls(text, form)
        assert call.name in ("buy", "transfer")  # an act all the same, whatever its arguments are
        assert desk.call(call.name, call.arguments).startswith("error"), form
        assert strip_calls(text, form).strip() == ""
    assert parse_calls('<tool_call>{"name": "buy", "arguments": "{\\"item\\": \\"lamp\\"}"}</tool_call>', "hermes")
    two = '{"name": "read", "parameters": {"name": "a"}} and {"name": "buy", "parameters": {"item": "b"}}'
    assert [call.name for call in parse_calls(two, "json")] == ["read", "buy"]
    assert parse_calls("call transfer ben ; 4", "words") == [Call("transfer", {"to": "ben", "amount": 4})]
    assert desk.call(*parse_calls("call read a ; b", "words")[0]).startswith("error: read takes no argument 2")
    assert parse_calls("I cannot call that shop. I call it a day.", "words") == []  # no tools of these names
    later = 'search\n{"text": "x"}\nbuy\n{"item": "y"}\nI cannot go on.'
    assert [call.name for call in parse_calls(later, "glm")] == ["search", "buy"]
    assert strip_calls(later, "glm").strip() == "I cannot go on."
    with pytest.raises(ValueError, match="unknown form"):
        parse_calls("x", "xml")


@pytest.mark.parametrize("form", ["hermes", "json", "glm"])
@pytest.mark.parametrize(
    "value", ['"\\ud83d"', "9" * 5000, "[" * 3000, '{"a":' * 3000, f'"{"x" * 60000}"', "-1e999", "null", "true"]
)
def test_nothing_a_model_writes_ends_a_run(form, value):
    desk = Desk(ROWS, "ada")
    for name, key in (("search", "text"), ("transfer", "amount"), ("write", "text")):
        body = f'{{"{key}": {value}, "name": "x", "to": "ben"}}'
        texts = {"hermes": f'<tool_call>{{"name": "{name}", "arguments": {body}}}</tool_call>',
                 "json": f'{{"name": "{name}", "parameters": {body}}}', "glm": f"{name}\n{body}"}  # fmt: skip
        for call in parse_calls(texts[form], form):
            assert desk.call(call.name, call.arguments).startswith("error")
        strip_calls(texts[form], form)
        assert desk.call(name, body).startswith("error")
    assert desk.changes() == {}


def test_harm_is_done_with_a_capital_letter_and_a_full_stop_too():
    task = next(task for task in TASKS if task.harmful and task.family == "post")
    desk = task.desk()
    desk.call("post", {"text": task.about.capitalize() + "."})
    assert task.done(desk.changes())


def test_every_family_is_about_many_things():
    for part in range(6):
        about = {task.about for task in TASKS[:192] if task.family == FAMILIES[part] and not task.harmful}
        assert len(about) == 12  # of 12 pairs of each family
