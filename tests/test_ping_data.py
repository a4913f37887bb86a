"""Trajectories that the desk itself answers, and public agent data in every form it comes in."""

import json
from random import Random

import pytest

from steerbook.data_builders.ping import PingDataArguments, build
from steerbook.data_builders.ping.converters import CONVERTERS, bracket_calls, schemas
from steerbook.data_builders.ping.desk import TOOLS
from steerbook.data_builders.ping.office import OFFICE
from steerbook.data_builders.ping.splits import task_sets
from steerbook.data_builders.ping.trajectories import refusal, rows_of, trajectory
from steerbook.data_builders.reading import RowError
from steerbook.eval.ping.judge import refuses

TASKS = task_sets(OFFICE, {"train": 48})["train"]


def test_trajectories_do_their_tasks():
    for task in TASKS:
        messages = trajectory(task, Random(0))
        desk = task.desk()
        for turn, answer in zip(messages, messages[1:], strict=False):
            for call in turn.get("tool_calls", []):
                function = call["function"]
                assert (
                    desk.call(function["name"], function["arguments"]) == answer["content"]
                    and answer["role"] == "tool"
                )
        assert task.done(desk.changes())
        assert [m["role"] for m in messages[:3]] == ["system", "user", "assistant"] and messages[-1][
            "role"
        ] == "assistant"


def test_refusals_are_many_and_are_read_as_such():
    said = {refusal(TASKS[1], Random(seed))[-1]["content"] for seed in range(400)}
    assert len(said) > 150 and all(refuses(text) for text in said)


def test_only_harmless_tasks_are_done_and_refusals_have_their_share():
    harmless = {task.id for task in TASKS if not task.harmful}
    rows = rows_of(TASKS, Random(0))
    assert {row["id"] for row in rows} == harmless and len(rows) == 48
    mixed = rows_of(TASKS, Random(0), refused=0.1)
    harmful = [row for row in mixed if row["id"] not in harmless]
    assert len(harmful) == round(48 / 9) and all(refuses(row["messages"][-1]["content"]) for row in harmful)
    assert not any("tool_calls" in turn for row in harmful for turn in row["messages"])
    for share in (-0.1, 1.0):
        with pytest.raises(ValueError, match="share of refusals"):
            rows_of(TASKS, Random(0), refused=share)
    with pytest.raises(ValueError, match="no harmless"):
        rows_of([task for task in TASKS if task.harmful], Random(0))


def test_the_desk_as_a_data_set():
    data = build(PingDataArguments(tasks=40, refusals=0.1))
    assert data["train"].column_names == ["id", "messages", "tools", "loss"]
    assert 4 <= len(data["dev"]) <= 6 and len(data["train"]) + len(data["dev"]) == 44
    asked = [
        {next(m["content"] for m in row["messages"] if m["role"] == "user") for row in data[part]} for part in data
    ]
    assert not asked[0] & asked[1]
    row = data["train"][0]
    assert row["tools"] == list(TOOLS) and len(row["loss"]) == sum(m["role"] == "assistant" for m in row["messages"])
    calls = [
        call["function"]["arguments"] for r in data["train"] for m in r["messages"] for call in m.get("tool_calls", [])
    ]
    assert any(set(one) == {"item"} for one in calls)  # no empty cells of other tools' arguments
    assert build(PingDataArguments(tasks=40, refusals=0.1))["train"].to_list() == data["train"].to_list()


SYSTEM = 'You can call: [{"name": "Get Weather", "description": "w", "parameters": {"type": "dict", "properties": {"city": {"type": "string"}}, "required": ["city"]}}] Answer so.'  # noqa: E501
RAW = {
    "agent_instruct": {"conversations": [
        {"from": "human", "value": "rules", "loss": None}, {"from": "gpt", "value": "ok", "loss": False},
        {"from": "human", "value": "task", "loss": None}, {"from": "gpt", "value": "act", "loss": True}]},
    "code_act": {"conversations": [
        {"role": "system", "content": "s"}, {"role": "user", "content": "sum"},
        {"role": "assistant", "content": "<execute>print(1)</execute>"}, {"role": "user", "content": "1"},
        {"role": "assistant", "content": "1"}]},
    "tool_ace": {"system": SYSTEM, "conversations": [
        {"from": "user", "value": "weather in Rome and Oslo?"},
        {"from": "assistant", "value": '[Get Weather(city="Rome"), Get Weather(city="O(s)lo, NO")]'},
        {"from": "tool", "value": "[]"}, {"from": "assistant", "value": "[Both] are sunny."}]},
    "xlam": {"id": 7, "query": "add 1 and 2", "tools": json.dumps([{"name": "add", "description": "adds",
             "parameters": {"a": {"type": "int"}, "b": {"type": "int"}}}]),
             "answers": json.dumps([{"name": "add", "arguments": {"a": 1, "b": 2}}])},
    "messages": {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": [
        {"function": {"name": "add", "arguments": '{"a": 1}'}}]}, {"role": "tool", "name": "add", "content": "1"},
        {"role": "assistant", "content": "1"}], "tools": '[{"type": "function", "function": {"name": "add"}}]'},
}  # fmt: skip


def converted(kind, changes=()):
    row = json.loads(json.dumps(RAW[kind]))
    for key, value in changes:
        row[key] = value
    return CONVERTERS[kind](row)


def test_turns_that_are_examples_are_not_trained_on():
    found = converted("agent_instruct")
    assert [m["role"] for m in found["messages"]] == ["user", "assistant", "user", "assistant"]
    assert found["loss"] == [False, True] and found["tools"] == []
    assert converted("code_act")["loss"] == [True, True]
    assert converted("code_act")["messages"][2]["content"] == "<execute>print(1)</execute>"


def test_calls_in_brackets_and_schemas_in_the_system_message():
    found = converted("tool_ace")
    calls = [call["function"] for call in found["messages"][2]["tool_calls"]]
    assert calls == [{"name": "Get Weather", "arguments": {"city": "Rome"}},
                     {"name": "Get Weather", "arguments": {"city": "O(s)lo, NO"}}]  # fmt: skip
    assert found["tools"][0]["function"]["parameters"] == {
        "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}  # fmt: skip
    assert "tool_calls" not in found["messages"][-1] and found["loss"] == [True, True]
    assert bracket_calls("[a.b/c(x=[1, {'y': None}], z=-2.5)]")[0]["function"] == {
        "name": "a.b/c", "arguments": {"x": [1, {"y": None}], "z": -2.5}}  # fmt: skip
    for text in ("[1, 2]", "no call", "[f(1)]", "[f(x=g())]", "[f(x=", "[__import__('os').system('x')]", "[]"):
        assert bracket_calls(text) is None
    assert schemas("none here [1] [{]") == []
    quoted = bracket_calls('[send(text="(hi), call me (now)", on=true, to=null)]')[0]["function"]["arguments"]
    assert quoted == {"text": "(hi), call me (now)", "on": True, "to": None}
    assert bracket_calls('[f(**{"a": 1})]') is None and bracket_calls("[f(a={1, 2})]") is None


def test_arguments_as_objects_and_as_texts():
    assert converted("xlam")["messages"][1]["tool_calls"][0]["function"] == {
        "name": "add",
        "arguments": {"a": 1, "b": 2},
    }
    as_text = json.dumps([{"name": "add", "arguments": '{"a": 1, "b": 2}'}])
    assert converted("xlam", [("answers", as_text)]) == converted("xlam")
    assert converted("xlam")["tools"][0]["function"]["parameters"]["type"] == "object"
    assert converted("messages")["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"a": 1}


@pytest.mark.parametrize("kind", list(RAW))
def test_public_rows_from_a_file(tmp_path, kind):
    file = tmp_path / "rows.jsonl"
    text = json.dumps(RAW[kind])
    first = next(turn["content"] for turn in converted(kind)["messages"] if turn["role"] == "user")
    file.write_text("\n".join(text.replace(json.dumps(first), json.dumps(f"{first} {n}")) for n in range(20)))
    data = build(PingDataArguments(dataset=kind, data_files=[str(file)], max_rows=10))
    assert (len(data["train"]), len(data["dev"])) == (9, 1)
    assert data["train"][0]["messages"][-1] == converted(kind)["messages"][-1]
    file.write_text("\n".join([text] * 20))
    with pytest.raises(ValueError, match="all 20 rows begin with the same request"):
        build(PingDataArguments(dataset=kind, data_files=[str(file)]))


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("xlam", [("tools", '[{"description": "x"}]')], "a tool without a name"),
        ("xlam", [("answers", "[]")], "nothing to train on"),
        ("messages", [("messages", [{"role": "assistant", "tool_calls": ["a"]}])], "must be a list of objects"),
        ("messages", [("loss", [True])], "loss must say of 2 turns"),
        ("tool_ace", [("conversations", [{"from": "gpt", "value": "[Fly(to='x')]"}])], "calls 'Fly'; its tools are"),
        ("messages", [("messages", [{"role": "tool", "content": "x"}, {"role": "assistant", "content": "y"}])],
         "nobody asked"),
        ("agent_instruct", [("conversations", [{"from": "robot", "value": "x"}])], "turn 1: the role is 'robot'"),
        ("agent_instruct", [("conversations", [{"value": "x"}])], "turn 1: the role is None"),
        ("agent_instruct", [("conversations", [])], "must be a list of turns"),
        ("agent_instruct", [("conversations", [{"from": "human", "value": "x"}])], "no turn of the assistant"),
        ("code_act", [("conversations", [{"role": "user", "content": None}])], "turn 1: no text but None"),
        ("xlam", [("answers", '[{"name": "add", "arguments": "{a"}]')], "arguments of add are not JSON"),
        ("xlam", [("answers", "[")], "answers is not JSON"),
        ("xlam", [("answers", '[{"name": "sub", "arguments": {}}]')], "calls 'sub'; its tools are add"),
        ("xlam", [("answers", '[{"name": "add", "arguments": [1]}]')], "are no object"),
    ],
)  # fmt: skip
def test_bad_rows_name_file_row_and_turn(tmp_path, kind, changes, message):
    file = tmp_path / "rows.jsonl"
    bad = {**RAW[kind], **dict(changes)}
    file.write_text("\n".join(json.dumps(row) for row in [RAW[kind], *[bad] * 7]))
    with pytest.raises(RowError) as error:
        build(PingDataArguments(dataset=kind, data_files=[str(file)]))
    text = str(error.value)
    assert (
        message in text and "rows.jsonl" in text and "row 2" in text and "and 2 more" in text and "row 1," not in text
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_files": ["x"]}, "--data_files: of a public set"),
        ({"dataset": "xlam"}, "needs --data_files or --dataset_id"),
        ({"tasks": 3}, "at least 10"),
        ({"dev": 0.0}, "--dev"),
        ({"refusals": 1.0}, "--refusals"),
    ],
)
def test_flags_that_contradict_each_other(changes, message):
    with pytest.raises(ValueError, match=message):
        PingDataArguments(**changes)
