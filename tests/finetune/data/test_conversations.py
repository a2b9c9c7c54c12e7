"""Conversations in every format that people have, and every way they are broken."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import needs_shared
from hypothesis import given, settings
from hypothesis import strategies as st

from lora.errors import DataError
from lora.finetune.data.conversations import (
    Conversation,
    conversational,
    from_row,
    grouped,
    holds_conversations,
    read_conversations,
    read_one_split,
    read_prompts,
)
from lora.finetune.data.messages import Message
from lora.finetune.data.rows import BadRows, read_rows

PAIR = {"instruction": "Add.", "input": "1 2", "output": "3"}


def write(path: Path, text: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def lines(path: Path, rows: list[Any]) -> str:
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def pairs(count: int, start: int = 0) -> list[dict[str, str]]:
    return [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(start, start + count)]


def said(row: dict[str, Any], **more: Any) -> list[list[tuple[str, str]]]:
    return [[(m.role, m.content) for m in c.messages] for c in from_row(row, "here", **more)]


@pytest.mark.parametrize("key", ["label", "labels", "score", "class", "target"])
def test_a_question_and_an_answer_with_a_label_are_to_be_classified(key: str) -> None:
    assert not conversational({"question": "how", "answer": "so", key: "0.5"})
    assert conversational({"question": "how", "answer": "so", "source": "here"})


def test_openai_messages() -> None:
    row = {
        "messages": [
            {"role": "developer", "content": "be good"},
            {"role": "user", "content": [{"type": "text", "text": part} for part in "ab"]},
            {"role": "assistant", "content": "no", "weight": 0},
            {"role": "tool", "content": "7"},
            {"role": "assistant", "content": " yes\n", "weight": 1},
        ]
    }  # fmt: skip
    (one,) = from_row(row, "f.jsonl, line 3", "chat")
    assert one == Conversation(
        (
            Message("system", "be good"), Message("user", "ab"),
            Message("assistant", "no", learned=False), Message("tool", "7"),
            Message("assistant", " yes\n"),
        ),
        references=("yes",), task="chat", place="f.jsonl, line 3",
    )  # fmt: skip
    assert one.prompt == one.messages[:4]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]},
         [[("user", "hi"), ("assistant", "ho")]]),
        ({"system": "be", "conversations": [{"from": "human", "value": "hi"},
                                            {"from": "gpt", "value": "ho"}]},
         [[("system", "be"), ("user", "hi"), ("assistant", "ho")]]),
        (PAIR, [[("user", "Add.\n\n1 2"), ("assistant", "3")]]),
        (PAIR | {"input": "", "text": "Below is ..."}, [[("user", "Add."), ("assistant", "3")]]),
        ({"instruction": "Add.", "context": "1 2", "response": 3},
         [[("user", "Add.\n\n1 2"), ("assistant", "3")]]),
        ({"system_prompt": "be", "question": "why", "response": "so"},
         [[("system", "be"), ("user", "why"), ("assistant", "so")]]),
        ({"system_prompt": " ", "question": "why", "answer": "so"},
         [[("user", "why"), ("assistant", "so")]]),
        ({"input": "why", "output": "so"}, [[("user", "why"), ("assistant", "so")]]),
        ({"prompt": [{"role": "user", "content": "why"}],
          "completion": [{"role": "assistant", "content": "so"}]},
         [[("user", "why"), ("assistant", "so")]]),
        ({"prompt": [{"role": "user", "content": "why"}], "answer": "so"},
         [[("user", "why"), ("assistant", "so")]]),
        ({"messages": json.dumps([{"role": "user", "content": "why"},
                                  {"role": "assistant", "content": "so"}])},
         [[("user", "why"), ("assistant", "so")]]),
        ({"prompt": "[3, 1, 2]", "completion": "[1, 2, 3]"},
         [[("user", "[3, 1, 2]"), ("assistant", "[1, 2, 3]")]]),
        ({"prompt": "[]", "completion": "[]"}, [[("user", "[]"), ("assistant", "[]")]]),
        ({"instruction": "Add.", "instances": [{"input": "1 2", "output": "3"},
                                               {"input": "", "output": "none"}]},
         [[("user", "Add.\n\n1 2"), ("assistant", "3")],
          [("user", "Add."), ("assistant", "none")]]),
        ({"text": "once "}, [[("assistant", "once ")]]),
    ],
)  # fmt: skip
def test_a_row_is_recognised_by_its_keys(
    row: dict[str, Any], expected: list[list[tuple[str, str]]]
) -> None:
    assert said(row) == expected
    assert conversational(row) == ("text" not in row or "instruction" in row)
    raw = isinstance(row.get("completion"), str) or list(row) == ["text"]
    assert all(one.raw == raw for one in from_row(row, "here"))


def test_what_is_to_be_classified_is_no_conversation() -> None:
    for row in (
        {"sentence": "good", "label": "1"}, {"question": "a", "sentence": "b", "label": "1"},
        {"question": "a", "answer": "b", "label": "1"}, {"text": "good", "label": "1"},
        {"text": "good"}, {"messages": "good", "label": "1"}, {},
    ):  # fmt: skip
        assert not conversational(row)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"body": "x", "id": 1}, "no conversation among body, id. Known: messages;"),
        ({}, "no conversation among no keys"),
        ({"messages": []}, "an empty conversation"),
        ({"messages": [{"role": "system", "content": "x"}]}, "an empty conversation"),
        ({"conversations": [{"from": "narrator", "value": "x"}]},
         "message 1 has the role 'narrator', none of system, developer, user, human"),
        ({"messages": [{"content": "x"}]}, "message 1 has the role None"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, r"message 1 has the role \['user'\]"),
        ({"messages": ["x"]}, "message 1 is a str, not an object"),
        ({"messages": [{"role": "user"}]}, "message 1 has no text, found NoneType"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
         "message 1 has a part that is not a text: {'type': 'image_url'"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]},
         "message 1: tool_calls belong to an answer and must be a list of"),
        ({"messages": [{"role": "user", "content": "x"}]},
         "the last message has the role user, but it must be"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "\n"}]},
         "an empty answer, message 2"),
        (PAIR | {"output": ""}, "an empty answer"),
        (PAIR | {"output": None}, "instruction has no output"),
        (PAIR | {"output": ["3"]}, "output must be a text, found list"),
        (PAIR | {"output": True}, "output must be a text, found bool"),
        ({"instruction": "", "input": " ", "output": "3"}, "an empty instruction"),
        ({"prompt": [], "completion": "x"}, "prompt must be a text, found list"),
        ({"instruction": "x", "instances": []}, "no instances"),
        ({"instruction": None, "instances": [{"output": "y"}]}, "none of instruction, prompt"),
        (PAIR | {"history": 3}, "history must be a list of"),
        (PAIR | {"history": True}, "history must be a list of"),
        ({"instruction": "x", "instances": ["y"]}, "an instance is a str"),
        ({"text": " \n"}, "an empty answer"),
        ({"text": None}, "text must be a text, found NoneType"),
        ({"text": "\ud800"}, "surrogates not allowed: the text has half"),
    ],
)  # fmt: skip
def test_a_row_that_is_no_conversation_is_named(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=f"^f.jsonl, line 9: {message}"):
        from_row(row, "f.jsonl, line 9")


def test_a_prompt_needs_no_answer(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"instruction": "Add.", "input": "1 2"}, {"prompt": "once"}, {"text": "once"},
        {"messages": [{"role": "user", "content": "hi"}]}, PAIR,
    ]  # fmt: skip
    found = read_prompts(lines(tmp_path / "x.jsonl", rows), "task")
    assert [one.prompt[-1].content for one in found] == [
        "Add.\n\n1 2", "once", "once", "hi", "Add.\n\n1 2",
    ]  # fmt: skip
    assert [one.references for one in found] == [(), (), (), (), ("3",)]
    assert [one.raw for one in found] == [False, True, True, False, False]
    with pytest.raises(DataError, match="x.jsonl, line 2: not a JSON object"):
        read_prompts(write(tmp_path / "x.jsonl", '{"text": "a"}\nx\n'))
    with pytest.raises(DataError, match="y.json has no rows"):
        read_prompts(write(tmp_path / "y.json", "[]"))


def test_the_same_prompts_answers_are_its_references() -> None:
    rows = [("a", "1"), ("b", " 2 "), ("a", "3")]
    some = [one for p, c in rows for one in from_row({"prompt": p, "completion": c}, "", "x")]
    texts = [one for text in ("once", "once") for one in from_row({"text": text}, "")]
    other = from_row({"prompt": "a", "completion": "4"}, "", "y")
    found = grouped([*some, *texts, *other])
    assert [one.references for one in found] == [("1", "3"), ("2",), (), (), ("4",)]
    assert found[0].messages == some[0].messages


@pytest.mark.parametrize("end", ["jsonl", "json", "data.json", "csv", "tsv", "parquet", "txt"])
def test_every_ending_reads_the_same(end: str, tmp_path: Path) -> None:
    rows = [{"prompt": f"né {i} ||", "completion": f" place, {i}"} for i in range(12)]
    path = tmp_path / f"rows.{end}"
    if end == "parquet":
        arrow = pytest.importorskip("pyarrow")
        import pyarrow.parquet

        pyarrow.parquet.write_table(arrow.Table.from_pylist(rows), path)
    else:
        text = {
            "jsonl": "".join(json.dumps(row) + "\n" for row in rows),
            "json": json.dumps(rows, indent=1),
            "data.json": json.dumps({"version": 1, "data": rows}),
            "csv": "prompt,completion\n"
            + "".join(f'"{r["prompt"]}","{r["completion"]}"\n' for r in rows),
            "tsv": "prompt\tcompletion\n" + "".join("\t".join(r.values()) + "\n" for r in rows),
            "txt": "".join(f"né {i}|| place, {i} \n" for i in range(12)),
        }[end]
        write(path, "\ufeff" + text.replace("\n", "\r\n") if end in ("csv", "txt") else text)
    assert [row for _, row in read_rows(path)] == rows
    where = {"json": "item 2", "data.json": "item 2", "parquet": "row 2"}
    line = "line 3" if end in ("csv", "tsv") else "line 2"
    assert [place for place, _ in read_rows(path)][1] == f"{path}, {where.get(end, line)}"
    assert holds_conversations(str(path))
    splits, notes = read_conversations(str(path), "name")
    assert {name: len(some) for name, some in splits.items()} == {"train": 10, "dev": 1, "test": 1}
    assert "divided 80/10/10 by prompt" in notes[0]
    assert splits["train"][0].task == "name"


def test_nested_rows_of_parquet(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    table = arrow.Table.from_pylist([{"messages": turns, "system": None}])
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    ((_, row),) = read_rows(tmp_path / "x.parquet")
    assert isinstance(row, dict)
    assert said(row) == [[("user", "a"), ("assistant", "b")]]


def test_plain_text_is_a_text_per_line(tmp_path: Path) -> None:
    text = "once upon\n\na || b in C\nand so on\n" * 3
    path = write(tmp_path / "x.txt", text)
    splits, _ = read_conversations(path)
    found = [one for some in splits.values() for one in some]
    assert len(found) == 9
    assert all(one.raw and not one.prompt and not one.references for one in found)
    assert not holds_conversations(path)


def test_lines_without_a_reference_are_broken(tmp_path: Path) -> None:
    text = "".join(f"name : {i}||text {i}\n" for i in range(19)) + "no reference\n"
    with pytest.raises(
        DataError, match=r"x.txt, line 20: no '\|\|' between.*\n.*--skip-bad-lines 1"
    ):
        read_conversations(write(tmp_path / "x.txt", text))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.jsonl", '\n{"text": "a"}\n{', "x.jsonl, line 3: not a JSON object"),
        ("x.jsonl", "[1]\n", "x.jsonl, line 1: not a JSON object: found a list, not an object"),
        ("x.jsonl", "[" * 100_000, "line 1: not a JSON object: nested too deeply"),
        ("x.json", '[{"text": "a"},\n {]', "x.json, line 2: not valid JSON: .*Fix it"),
        ("x.json", '{"text": "a"}\n{"text": "b"}', "line 2: not valid JSON: Extra data. Rename it"),
        ("x.json", '{"text": "a"}', r"x.json must be a list of rows, found a dict. Write \[\{"),
        ("x.json", "[" * 100_000, "x.json: its JSON is nested too deeply"),
        ("x.json", "[3]", "x.json, item 1: found a int, not an object"),
        ("x.csv", "text,id\na,1\nb\n", "line 3: 1 columns, the first row has 2"),
        ("x.csv", 'text,id\n"a"b,1\n', "x.csv, line 2: .*Fix the quotes"),
        ("x.csv", "text,text\na,1\n", "two columns are named 'text'"),
        ("x.tsv", "text\tid\na\n", "line 2: 1 columns"),
        ("x.csv", "hello,hi\nyou,me\n", "line 2: no conversation among hello, hi. Known"),
        ("x.jsonl", b"\xff\xfe\n", "x.jsonl, line 1: byte 0xff is not UTF-8.*iconv -f utf-16"),
        ("x.txt", " \n", "x.txt is empty"),
        ("x.parquet", "PAR1", "x.parquet cannot be read: "),
        ("x.xlsx", "x", "x.xlsx: found .xlsx. Known: .jsonl, .json, .csv"),
        ("x.jsonl", '{"text": "a", "split": "hold"}\n', "line 1: split 'hold' is none of dev"),
    ],
)  # fmt: skip
def test_a_broken_file_is_named(name: str, text: str | bytes, message: str, tmp_path: Path) -> None:
    if name == "x.parquet":
        pytest.importorskip("pyarrow")
    with pytest.raises(DataError, match=message):
        read_conversations(write(tmp_path / name, text))


def test_parquet_without_its_library_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        DataError, match=r"needs pyarrow. Run pip install 'lora-from-scratch\[hub\]'"
    ):
        read_conversations(write(tmp_path / "x.parquet", "x"))


@pytest.mark.parametrize("end", ["jsonl", "csv", "tsv"])
def test_so_many_bad_lines_are_left_out_and_said(end: str, tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(12)]
    if end == "jsonl":
        some = [json.dumps(row) for row in rows]
        some[3], some[5], some[7] = "{", json.dumps(PAIR | {"output": " "}), '{"id": 1}'
        numbers = (4, 6, 8)
    else:
        mark = "," if end == "csv" else "\t"
        some = [mark.join(row.values()) for row in (dict.fromkeys(rows[0], ""), *rows)]
        some[0] = f"prompt{mark}completion"
        some[4], some[6], some[8] = "p", f"p{mark}", f"p{mark}c{mark}c"
        numbers = (5, 7, 9)
    path = write(tmp_path / f"x.{end}", "\n".join(some))
    with pytest.raises(DataError) as error:
        read_conversations(path)
    message = str(error.value).split("\n")
    first, second, third = (f"{path}, line {number}" for number in numbers)
    assert message[0] == "3 rows cannot be used:"
    assert [line.partition(": ")[0] for line in message[1:4]] == [
        f"  {first}", f"  {second}", f"  {third}",
    ]  # fmt: skip
    assert message[4] == "Fix them, or pass --skip-bad-lines 3 to skip them."
    bad = BadRows(2)
    read_conversations(path, bad=bad)
    with pytest.raises(DataError, match="--skip-bad-lines 3"):
        bad.judge()
    bad = BadRows(3)
    splits, _ = read_conversations(path, bad=bad)
    assert sum(map(len, splits.values())) == 9
    (said,) = bad.judge()
    assert said.startswith("3 rows skipped, as --skip-bad-lines 3 allows:")
    assert all(place in said for place in (first, second, third))


def test_the_splits_of_a_folder(tmp_path: Path) -> None:
    lines(tmp_path / "train.jsonl", pairs(20))
    write(tmp_path / "validation.txt", "a||b\nc||d\n")
    write(tmp_path / "test.json", json.dumps(pairs(3, 40)))
    splits, notes = read_conversations(str(tmp_path), "x")
    assert [len(splits[name]) for name in ("train", "dev", "test")] == [20, 2, 3]
    assert notes == []
    lines(tmp_path / "train.json", pairs(20))
    with pytest.raises(DataError, match="has train.jsonl, train.json for one split. Keep one"):
        read_conversations(str(tmp_path))
    (tmp_path / "train.json").unlink()
    (tmp_path / "train.jsonl").unlink()
    splits, notes = read_conversations(str(tmp_path))  # E2E's training file is not public here
    assert [len(splits[name]) for name in ("train", "dev", "test")] == [1, 1, 3]
    assert "has no train split: dev is used for training" in notes[0]
    (tmp_path / "validation.txt").unlink()
    with pytest.raises(DataError, match="has no training rows, found test. Pass a folder"):
        read_conversations(str(tmp_path))


def test_a_split_column_is_followed(tmp_path: Path) -> None:
    names = ["train", "validation", "test", "train"]
    rows = [pair | {"split": name} for pair, name in zip(pairs(4), names, strict=True)]
    splits, notes = read_conversations(lines(tmp_path / "x.jsonl", rows))
    assert [one.references for one in splits["train"]] == [("c0",), ("c3",)]
    assert notes == []
    path = write(tmp_path / "y.jsonl", "{\n" + (tmp_path / "x.jsonl").read_text())
    bad = BadRows(1)
    broken, notes = read_conversations(path, bad=bad)
    assert {name: len(some) for name, some in broken.items()} == {"train": 2, "dev": 1, "test": 1}
    assert "1 row skipped" in bad.judge()[0]
    del rows[3]["split"]
    with pytest.raises(DataError, match="line 4: no split, but other rows have one"):
        read_conversations(lines(tmp_path / "x.jsonl", rows))


@settings(deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=120), st.booleans())
def test_no_prompt_stands_on_both_sides(prompts: list[int], cut: bool) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        rows = [
            {"prompt": f"p{p}", "completion": f"c{i}"} | ({} if cut else {"split": "train"})
            for i, p in enumerate(prompts)
        ]
        path = lines(Path(folder) / "x.jsonl", rows)
        least = 3 if cut else 2
        if len(set(prompts)) < least:
            with pytest.raises(DataError, match="prompts are too few|too few prompts"):
                read_conversations(path)
            return
        splits, notes = read_conversations(path)
        assert read_conversations(path)[0] == splits
    sides = [{one.prompt for one in some} for some in splits.values()]
    assert sum(map(len, sides)) == len(set(prompts))
    found = [one.references for some in splits.values() for one in some]
    assert sorted(found) == sorted((f"c{i}",) for i in range(len(prompts)))
    assert all(splits[name] for name in ("train", "dev"))
    assert bool(splits["test"]) == cut
    assert len(notes) == 1


def test_texts_without_a_prompt_are_cut_one_by_one(tmp_path: Path) -> None:
    splits, _ = read_conversations(write(tmp_path / "x.txt", "\n".join(map(str, range(100)))))
    assert {name: len(some) for name, some in splits.items()} == {
        "train": 80,
        "dev": 10,
        "test": 10,
    }


def test_a_file_to_score_on_is_read_whole(tmp_path: Path) -> None:
    path = lines(tmp_path / "x.jsonl", pairs(7))
    found, name = read_one_split(path)
    assert (len(found), name) == (7, "test")
    assert read_one_split(path, split="dev")[1] == "dev"
    lines(tmp_path / "folder" / "dev.jsonl", pairs(2))
    assert read_one_split(str(tmp_path / "folder"))[1] == "dev"
    with pytest.raises(DataError, match="has no test split, found dev"):
        read_one_split(str(tmp_path / "folder"), split="test")


def test_no_such_place() -> None:
    with pytest.raises(DataError, match="nowhere.jsonl: no such file"):
        read_conversations("nowhere.jsonl")
    with pytest.raises(DataError, match="no such file or folder"):
        read_conversations("./nowhere")


def test_the_hubs_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """They come as texts, lists among them as JSON."""
    turns = json.dumps([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    rows = [("train", "owner/name, train row 0", {"messages": turns})]
    rows += [
        (split, f"owner/name, test row {i}", {"prompt": "p", "completion": str(i)})
        for split in ("train", "dev") for i in range(2)
    ]  # fmt: skip
    monkeypatch.setattr("lora.finetune.data.rows.read_hub", lambda _: rows)
    splits, _ = read_conversations("owner/name")
    assert splits["train"][0].prompt == (Message("user", "a"),)
    assert splits["dev"][1].place == "owner/name, test row 1"
    assert holds_conversations("owner/name")


def test_the_seed_tasks() -> None:
    path = needs_shared("self-instruct") / "seed_tasks.jsonl"
    splits, _ = read_conversations(str(path))
    assert sum(map(len, splits.values())) == 175
    assert holds_conversations(str(path))


def test_e2e() -> None:
    folder = needs_shared("e2e")
    found, _ = read_one_split(str(folder / "test.txt"))
    scored = grouped(found)
    assert (len(found), len(scored)) == (4693, 630)
    assert sum(len(one.references) for one in scored) == 4693
    splits, _ = read_conversations(str(folder / "valid.txt"))
    prompts = [{one.prompt for one in some} for some in splits.values()]
    assert sum(map(len, prompts)) == len(set().union(*prompts)) == 547
