"""Reasoning, tools and masks: learned as the template writes them, or refused by name."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from test_templates import SPECIAL, TEMPLATES, bart_like, learned, made, of, t5_like

from lora.errors import DataError
from lora.finetune.data.conversations import from_row, read_conversations
from lora.finetune.data.encoding import encode, encode_pairs, prompt_ids
from lora.finetune.data.messages import Message
from lora.finetune.data.templates import Template, template_of
from lora.finetune.generate import row_of

# After the models' own templates: what they write of reasoning and tools, and when.
QWEN3 = (
    "{% if tools %}{{ '<|im_start|>system\n# Tools\n<tools>' }}{% for tool in tools %}"
    "{{ '\n' + tool | tojson }}{% endfor %}{{ '\n</tools><|im_end|>\n' }}{% endif %}"
    "{% set ns = namespace(last=messages|length - 1, found=false) %}{% for m in messages[::-1] %}"
    "{% if not ns.found and m.role == 'user' %}"
    "{% set ns.found = true %}{% set ns.last = messages|length - loop.index %}{% endif %}"
    "{% endfor %}{% for m in messages %}"
    "{% if m.role == 'assistant' %}{% set thought = m.reasoning_content or '' %}"
    "{{ '<|im_start|>assistant\n' }}"
    "{% if loop.index0 > ns.last and (loop.last or thought) %}"
    "{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}{% endif %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{% if not loop.first or m.content %}{{ '\n' }}{% endif %}"
    "{% if call.function %}{% set call = call.function %}{% endif %}"
    '{{ \'<tool_call>\n{"name": "\' + call.name + \'", "arguments": \' }}'
    "{% if call.arguments is string %}{{ call.arguments }}{% else %}{{ call.arguments | tojson }}"
    "{% endif %}{{ '}\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% elif m.role == 'tool' %}{{ '<|im_start|>user\n<tool_response>\n' + m.content }}"
    "{{ '\n</tool_response><|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
LLAMA31 = (
    "{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\n"
    "{% if tools %}{% for t in tools %}{{ t | tojson(indent=4) + '\n\n' }}{% endfor %}{% endif %}"
    "<|eot_id|>{% for m in messages %}"
    "{% if m.tool_calls %}{% if m.tool_calls | length != 1 %}"
    "{{ raise_exception('This model only supports single tool-calls at once!') }}{% endif %}"
    "{% set call = m.tool_calls[0].function %}<|start_header_id|>assistant<|end_header_id|>\n\n"
    '{{ \'{"name": "\' + call.name + \'", "parameters": \' }}{{ call.arguments | tojson }}}'
    "<|eot_id|>{% elif m.role == 'tool' %}<|start_header_id|>ipython<|end_header_id|>\n\n"
    "{{ m.content | tojson }}<|eot_id|>{% else %}"
    "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}"
    "<|eot_id|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n"
    "{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
    "{% if tools and loop.index0 == (messages | selectattr('role', 'equalto', 'user') | list"
    " | length - 1) * 4 %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "[INST] {{ m.content }}[/INST]{% elif m.tool_calls %}[TOOL_CALLS] ["
    "{% for call in m.tool_calls %}{{ call.function | tojson | replace('}}', '}, ') }}"
    "{{ '\"id\": \"' + call.id + '\"}' }}{{ ', ' if not loop.last }}{% endfor %}]{{ eos_token }}"
    '{% elif m.role == \'tool\' %}[TOOL_RESULTS] {"content": {{ m.content }}, "call_id":'
    ' "{{ m.tool_call_id }}"}[/TOOL_RESULTS]{% else %}'
    "{{ ' ' + m.content + eos_token }}{% endif %}"
    "{% endfor %}"
)
DEEPSEEK = (
    "{{ bos_token }}{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}"
    "{% if m.role == 'user' %}<|User|>{{ m.content }}{% elif m.role == 'tool' %}"
    "<|tool_output|>{{ m.content }}<|end_output|>{% elif m.role == 'assistant' %}<|Assistant|>"
    "{% set said = m.content.split('</think>')[-1] %}{{ said }}{% for call in m.tool_calls or [] %}"
    "<|tool_call|>{{ call.function.name + '\n```json\n' }}"
    "{{ call.function.arguments }}{{ '\n```' }}"
    "<|end_call|>{% endfor %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
GPT_OSS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% if m.thinking and loop.last %}"
    "<|im_start|>assistant<|channel|>analysis{{ m.thinking }}<|end|>{% endif %}"
    "<|im_start|>assistant<|channel|>final{{ m.content }}<|im_end|>"
    "{% else %}<|im_start|>{{ m.role + m.content }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"city": "string"}}}


def call(arguments: Any, name: str = "weather") -> dict[str, Any]:
    return {
        "id": "abcdefgh1", "type": "function", "function": {"name": name, "arguments": arguments}
    }  # fmt: skip


def asking(arguments: Any, content: str | None = None, **more: Any) -> dict[str, Any]:
    """A row that calls a tool and answers by what it said."""
    return {
        "tools": [TOOL],
        "messages": [
            {"role": "user", "content": "Rain in Rome?"},
            {"role": "assistant", "content": content, "tool_calls": [call(arguments)], **more},
            {"role": "tool", "content": '17 "mm"', "tool_call_id": "abcdefgh1", "name": "weather"},
            {"role": "assistant", "content": "Yes, much."},
        ],
    }  # fmt: skip


def template(jinja: str, kind: str = "gpt2") -> Template:
    tokenizer = made(kind)
    tokenizer.chat_template = jinja
    return template_of(tokenizer)


def stretches(own: Template, row: dict[str, Any]) -> list[str]:
    """What is learned of a row: each answer, by the spans of the text and by its tokens."""
    (one,) = from_row(row, "f.jsonl, line 9")
    rendered = own.render(one)
    texts = [rendered.text[slice(*span)] for span in rendered.spans]
    tensors, counts = encode(own, [one], 10_000)
    ids, labels = tensors["input_ids"].tolist(), tensors["labels"].tolist()
    assert [own.tokenizer.decode(some) for some in learned(own.tokenizer, ids, labels)] == texts
    assert counts.straddling == 0
    return texts


def theirs(own: Template, row: dict[str, Any], messages: list[dict[str, Any]]) -> str:
    """transformers' own text of a row with other messages."""
    text: str = own.tokenizer.apply_chat_template(
        messages, tools=row.get("tools"), tokenize=False, **row.get("chat_template_kwargs", {})
    )
    return text


@pytest.mark.parametrize("kind", ["gpt2", "llama3"])
def test_reasoning_is_learned_where_the_template_writes_it(kind: str) -> None:
    row = {"messages": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "reasoning_content": "so one thinks\nof it"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d", "reasoning_content": "and of that"},
    ]}  # fmt: skip
    own = template(QWEN3, kind)
    assert stretches(own, row) == [
        "b<|im_end|>",  # of earlier answers the template leaves it out, as it will when it is asked
        "<think>\nand of that\n</think>\n\nd<|im_end|>",
    ]
    (one,) = from_row(row, "f")
    assert own.render(one).text == theirs(own, row, row["messages"])
    note = encode(own, [one], 1000)[1].note(1000)
    assert note == "1 lose the reasoning of an answer in the template"
    assert stretches(template(GPT_OSS), {"messages": row["messages"][:2]}) == [
        "<|channel|>analysisso one thinks\nof it<|end|><|im_start|>assistant<|channel|>finalb"
        "<|im_end|>"
    ]


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_has_the_names_that_people_give_it(name: str) -> None:
    row = {"messages": [{"role": "user", "content": "a"},
                        {"role": "assistant", "content": "b", name: "hm"}]}  # fmt: skip
    assert stretches(template(QWEN3), row) == ["<think>\nhm\n</think>\n\nb<|im_end|>"]
    for jinja in (TEMPLATES["llama-3"], TEMPLATES["zephyr"], TEMPLATES["qwen-3"]):
        own = template(str(jinja))
        with pytest.raises(
            DataError, match="line 9: .*does not write the reasoning_content of mess"
        ):
            stretches(own, row)
    with pytest.raises(DataError, match="f: tools or thoughts need a template"):
        template_of(made("gpt2"), "none").render(from_row(row, "f")[0])


CALLS = {
    "qwen-3": (
        QWEN3,
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>',
        "<think>\n\n</think>\n\nYes, much.<|im_end|>",
    ),
    "llama-3.1": (
        LLAMA31,
        '{"name": "weather", "parameters": {"city": "Rome"}}<|eot_id|>',
        "Yes, much.<|eot_id|>",
    ),
    "mistral": (
        MISTRAL,
        '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Rome"}, "id": "abcdefgh1"}]'
        "<|end_of_text|>",
        " Yes, much.<|end_of_text|>",
    ),
    "deepseek": (
        DEEPSEEK,
        '<|tool_call|>weather\n```json\n{"city": "Rome"}\n```<|end_call|><|end_of_text|>',
        "Yes, much.<|end_of_text|>",
    ),
}


@pytest.mark.parametrize("form", ["object", "text"])
@pytest.mark.parametrize("name", CALLS)
def test_a_call_is_learned_with_the_end_of_its_turn(name: str, form: str) -> None:
    """Whether its arguments are an object or, as OpenAI has them, JSON's text."""
    jinja, called, answer = CALLS[name]
    arguments: Any = {"city": "Rome"} if form == "object" else '{"city": "Rome"}'
    own = template(jinja)
    row = asking(arguments)
    assert stretches(own, row) == [called, answer]
    (one,) = from_row(row, "f")
    text = own.render(one).text
    written = asking('{"city": "Rome"}' if name == "deepseek" else {"city": "Rome"}, "")
    assert text == theirs(own, row, written["messages"])
    assert '"parameters": {' in text  # the tools
    assert '"city": "string"' in text
    assert encode(own, [one], 1000)[1].unlike == (name == "deepseek")
    (asked,) = from_row({**row, "messages": row["messages"][:3]}, "f", answered=False)
    ahead = own.prompt(asked)
    assert '"city": "string"' in ahead
    if name != "deepseek":
        assert text.startswith(ahead)


def test_a_call_with_words_and_thoughts_is_learned_whole() -> None:
    row = asking({"city": "Rome"}, "Let me see.", reasoning_content="A tool knows.")
    row["messages"][1]["tool_calls"].append(call({"city": "né"}, "wind"))
    assert stretches(template(QWEN3), row)[0] == (
        "<think>\nA tool knows.\n</think>\n\nLet me see.\n"
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "wind", "arguments": {"city": "né"}}\n</tool_call><|im_end|>'
    )
    with pytest.raises(DataError, match="refuses.*only supports single tool-calls"):
        stretches(template(LLAMA31), row)
    row["messages"] = row["messages"][:2]  # a call may come last
    assert len(stretches(template(QWEN3), row)) == 1
    assert from_row(asking({}) | {"messages": asking({})["messages"][:2]}, "f")[0].references == ()


@pytest.mark.parametrize("name", ["llama-3", "zephyr", "plain"])
def test_a_template_that_leaves_out_calls_or_tools_is_refused(name: str) -> None:
    own = of(made("gpt2"), name)
    with pytest.raises(DataError, match="line 9: .*does not write the tool_calls of message 2"):
        stretches(own, asking({"city": "Rome"}))
    tools = {"tools": [TOOL], "question": "a", "answer": "b"}
    with pytest.raises(DataError, match="line 9: .*does not write tools, so the model would"):
        stretches(own, tools)
    thinking = {"chat_template_kwargs": {"enable_thinking": False}, "question": "a", "answer": "b"}
    with pytest.raises(DataError, match="line 9: .*does not write enable_thinking"):
        stretches(own, thinking)


def test_what_a_tool_said_is_in_the_text() -> None:
    own = template(
        "{% for m in messages if m.role != 'tool' %}{{ m.content + eos_token }}{% endfor %}"
    )
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "tool", "content": "one"},
                        {"role": "assistant", "content": "b"}]}  # fmt: skip
    with pytest.raises(DataError, match="does not write the tool's message 2"):
        stretches(own, row)


def test_a_template_is_given_what_its_row_says() -> None:
    own = template(QWEN3)
    row = {"question": "a", "answer": "b"}
    fast = row | {"chat_template_kwargs": {"enable_thinking": False}}
    (one,) = from_row(fast, "f")
    assert own.prompt(one).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert stretches(own, fast) == ["b<|im_end|>"]
    assert stretches(own, row) == ["<think>\n\n</think>\n\nb<|im_end|>"]
    assert from_row({"question": "a", "answer": "b", "tools": json.dumps([TOOL])}, "f")[
        0
    ].given == (json.dumps({"tools": [TOOL]}))


def test_a_recorded_prompt_is_read_back_as_it_was() -> None:
    row = asking({"city": "né"}, "So:", reasoning_content="hm") | {
        "chat_template_kwargs": {"enable_thinking": False}, "documents": [{"title": "x"}]
    }  # fmt: skip
    (one,) = from_row(row, "f")
    (again,) = from_row(row_of(one, "x"), "f", answered=False)
    assert (again.messages, again.given) == (one.prompt, one.given)
    assert again.content() != from_row(asking({"city": "n"}, "So:"), "f")[0].content()


MASKED = [
    {"weight": 0}, {"train": False}, {"training": False}, {"trainable": 0}, {"loss_mask": 0},
    {"loss": False}, {"train_on_turn": False}, {"masked": True}, {"weight": 0.0},
    {"train": "false"},
    {"train": False, "weight": 0},
]  # fmt: skip
LEARNED = [
    {"weight": 1},
    {"train": True},
    {"loss_mask": 1},
    {"masked": False},
    {"weight": None},
    {},
]


@pytest.mark.parametrize("mask", [*MASKED, *LEARNED])
def test_an_answer_is_learned_as_its_mask_says(mask: dict[str, Any]) -> None:
    row = {"messages": [
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "one", **mask},
        {"role": "user", "content": "c"}, {"role": "assistant", "content": "two"},
    ]}  # fmt: skip
    first = [] if mask in MASKED else ["one<|eot_id|>"]
    own = of(made("gpt2"), "llama-3")
    assert stretches(own, row) == [*first, "two<|eot_id|>"]
    (one,) = from_row(row, "f")
    rendered = own.render(one, "all")
    left = "".join(rendered.text[slice(*span)] for span in rendered.spans)
    assert left == rendered.text.replace("" if first else "one<|eot_id|>", "")


@pytest.mark.parametrize(
    ("turn", "says"),
    [
        ({"weight": 0.5}, "message 2 has weight '0.5': it must be 0 or 1"),
        ({"train": "no"}, "message 2 has train 'no'"),
        ({"train": True, "weight": 0}, "message 2 has weight and train, which differ"),
        ({"train_detail": [{"begin_offset": 0}]}, "message 2: train_detail is not supported"),
        ({"loss_scale": "react"}, "message 2: loss_scale is not supported"),
        ({"function_call": {"name": "f"}}, "message 2: function_call is not .*write tool_calls"),
        ({"audio": {"id": 1}}, "message 2: audio is not supported: only texts"),
        ({"refusal": "no"}, "message 2: refusal is not supported: write it as content"),
        ({"value": "other"}, "message 2 has content and value, which differ"),
        (
            {"thinking": "a", "reasoning": "b"},
            "message 2 has .*reasoning and thinking, which differ",
        ),
        (
            {"reasoning_content": ["a"]},
            "message 2: only an answer can have reasoning",
        ),
        (
            {"tool_calls": {"name": "f"}},
            "message 2: tool_calls belong to an answer and must",
        ),
        (
            {"tool_calls": [{"function": {"name": "f"}}]},
            "message 2: tool_calls belong to an",
        ),
    ],
)
def test_a_message_with_what_cannot_be_honoured_is_refused(turn: Any, says: str) -> None:
    row = {"messages": [{"role": "user", "content": "a"},
                        {"role": "assistant", "content": "b", **turn}]}  # fmt: skip
    with pytest.raises(DataError, match=f"^f.jsonl, line 9: {says}"):
        from_row(row, "f.jsonl, line 9")


def deep(count: int) -> Any:
    value: Any = 1
    for _ in range(count):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"messages": [{"role": "user", "content": "a", "train": True},
                       {"role": "assistant", "content": "b"}]},
         "message 1 has the role user, and train asks to learn it: only answers"),
        ({"question": "a", "answer": "b", "images": ["x.png"]}, "images is not supported"),
        ({"question": "a", "answer": "b", "functions": [{}]}, "functions .*write tools"),
        ({"question": "a", "answer": "b", "weight": 0}, "weight 0: nothing in this row"),
        ({"question": "a", "answer": "b", "weight": 0.3}, "weight '0.3'"),
        ({"prompt": "a", "completion": "b", "label": False}, "label false: the answer was"),
        ({"question": "a", "answer": "b", "tools": {"x": 1}}, "tools is a dict, not a list"),
        ({"prompt": "a", "completion": "b", "system": "c"}, "prompt and completion are read, "),
        ({"instruction": "a", "question": "b", "answer": "c"}, "instruction and answer are read"),
        ({"instruction": "a", "output": "b", "response": "c"}, "instruction and output are read"),
        ({"instruction": "a", "input": "b", "context": "d", "output": "c"}, ".*and context is not"),
        ({"question": "a", "answer": "b", "system": "c", "system_prompt": "d"}, "two different"),
        ({"system": "c", "messages": [{"role": "system", "content": "d"},
                                      {"role": "assistant", "content": "b"}]}, "two different"),
        ({"instruction": "a", "output": "b", "history": [["c"]]}, "history must be a list of"),
        ({"instruction": "a", "output": "b", "history": 5}, "history must be a list of"),
        ({"question": "a", "answer": "b", "tools": [date(2026, 1, 1)]},
         "tools cannot be written.*date"),
        ({"question": "a", "answer": "b", "documents": [deep(200_000)]},
         "documents cannot be written"),
    ],
)  # fmt: skip
def test_a_row_with_what_cannot_be_honoured_is_refused(row: Any, says: str) -> None:
    with pytest.raises(DataError, match=f"^f.jsonl, line 9: {says}"):
        from_row(row, "f.jsonl, line 9")


def test_the_history_of_an_alpaca_row_comes_before_it() -> None:
    row = {"instruction": "c", "input": "", "output": "d", "history": [["a", "b"]], "system": "s"}
    for history in ([["a", "b"]], '[["a", "b"]]'):
        (one,) = from_row(row | {"history": history}, "f")
        assert [(message.role, message.content) for message in one.messages] == [
            ("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"),
        ]  # fmt: skip


def test_fields_that_are_not_read_are_listed_once(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"a{i}", "ts": 3},
                      {"role": "assistant", "content": "b", "weight": 1, "ts": None}],
         "id": i, "prompt": "x", "tools": None}
        for i in range(9)
    ]  # fmt: skip
    rows[4]["category"] = "x"
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    notes = read_conversations(str(path))[1]
    said = [note for note in notes if "not read" in note]
    assert said == [f"{path} has fields that are not read: category, id, prompt, ts of messages"]
    for row in rows:
        del row["id"], row["prompt"], row["messages"][0]["ts"]  # type: ignore[attr-defined]
        row.pop("category", None)
    path.write_text("\n".join(map(json.dumps, rows)))
    assert not [note for note in read_conversations(str(path))[1] if "not read" in note]


PAIRS = [
    {"text": "{bos}[INST] hello [/INST] there{eos}"},
    {"prompt": "{bos}[INST] hello [/INST]", "completion": " there{eos}"},
    {"prompt": "[INST] hello [/INST]", "completion": " there"},
    {"prompt": "{bos}[INST] hello [/INST]", "completion": " there"},
    {"text": "[INST] hello [/INST] there{eos}\n"},
    {"prompt": " {bos}[INST] hello [/INST]", "completion": " there {eos} "},
]


@pytest.mark.parametrize("row", PAIRS)
@pytest.mark.parametrize("kind", ["gpt2", "llama3", "llama2", "mistral"])
def test_a_text_that_is_written_out_has_its_special_tokens_once(
    kind: str, row: dict[str, str]
) -> None:
    tokenizer = made(kind)
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    row = {name: text.format(bos=bos, eos=eos) for name, text in row.items()}
    own = template_of(tokenizer, "none")
    (one,) = from_row(row, "f")
    text = own.render(one).text
    tensors, counts = encode(own, [one], 1000)
    ids, labels = tensors["input_ids"].tolist(), tensors["labels"].tolist()
    assert ids.count(tokenizer.eos_token_id) == 1
    assert ids[-1] == tokenizer.eos_token_id
    begun = kind != "gpt2" or bos in row.get("prompt", row.get("text", ""))
    assert ids.count(tokenizer.bos_token_id) == int(begun)
    assert text.endswith(eos)
    given = "".join(row.values())
    if bos in given:  # transformers' tokens of the text as it is written out
        assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        bare = text.removeprefix(bos).removesuffix(eos)
        assert ids == [*tokenizer(bare)["input_ids"], tokenizer.eos_token_id]
    if "completion" in row:
        (prompt,) = prompt_ids(own, from_row({"prompt": row["prompt"]}, "f", answered=False))
        assert ids[: len(prompt)] == prompt
        assert tokenizer.decode([one for one in labels if one >= 0]).strip() in (
            f"there{eos}", f"there {eos}",
        )  # fmt: skip
    assert counts.unlike == 0


def test_a_token_that_stands_twice_in_the_data_is_named() -> None:
    own = template_of(made("llama2"), "none")
    for text in ("<s><s>a</s>", "<s>a</s></s>"):
        with pytest.raises(DataError, match="^f: </?s> occurs twice in a row"):
            own.render(from_row({"text": text}, "f")[0])


@pytest.mark.parametrize(
    ("name", "content", "token"),
    [
        ("llama-2", "<s>[INST] a [/INST]", "<s>"), ("llama-2", "a</s>", "</s>"),
        ("llama-2", " a </s>\n", "</s>"), ("plain", "a</s>", "</s>"), ("zephyr", "a</s>", "</s>"),
        ("llama-3", "a<|eot_id|>", r"<\|eot_id\|>"), ("qwen-2.5", "a<|im_end|>", r"<\|im_end\|>"),
        ("gemma", "<s>a", "<s>"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("turn", [0, 1])
def test_a_message_with_the_templates_tokens_at_its_edge_is_refused(
    name: str, content: str, token: str, turn: int
) -> None:
    said = ["x", "y"]
    said[turn] = content
    own = of(made("llama2"), name)
    row = {"question": said[0], "answer": said[1]}
    with pytest.raises(DataError, match=f"f: message {turn + 1} begins or ends with {token}.*none"):
        own.render(from_row(row, "f")[0])


def test_special_tokens_inside_a_message_are_noted() -> None:
    own = of(made("gpt2"), "qwen-2.5")
    rows = [{"question": f"what is {token} for?", "answer": "b"} for token in (SPECIAL[1], "it")]
    some = [from_row(row, "f")[0] for row in rows]
    counts = encode(own, some, 1000)[1]
    assert counts.special == 1
    assert counts.note(1000) == "1 have special tokens of the tokenizer in a message"


@pytest.mark.parametrize("make", [t5_like, bart_like])
def test_an_encoder_and_a_decoder_frame_a_text_once(make: Any) -> None:
    tokenizer = make()
    own = template_of(tokenizer, "none")
    bos = tokenizer.bos_token if make is bart_like else ""
    row = {
        "prompt": f"{bos}hello{tokenizer.eos_token}",
        "completion": f"there{tokenizer.eos_token}",
    }
    found, _ = encode_pairs(own, from_row(row, "f"), 1000)
    assert found["input_ids"].tolist() == tokenizer("hello")["input_ids"]
    assert found["labels"].tolist() == tokenizer(text_target="there")["input_ids"]


def test_a_decoder_of_its_own_learns_texts_as_their_masks_say() -> None:
    own = template_of(t5_like(), "none")
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    some = from_row({"messages": turns}, "f")
    muted = from_row({"messages": [turns[0], turns[1] | {"weight": 0}]}, "g")
    found, counts = encode_pairs(own, [*muted, *some], 1000)
    assert found["rows"].tolist() == [1]
    assert (counts.examples, counts.lost) == (2, 1)
    thinking = from_row({"messages": [turns[0], turns[1] | {"reasoning_content": "hm"}]}, "h")
    with pytest.raises(DataError, match="h: the answer has reasoning_content, but an encoder-dec"):
        encode_pairs(own, thinking, 1000)


def test_a_message_has_the_fields_of_its_row() -> None:
    (one,) = from_row(asking({"city": "Rome"}, "So:"), "f")
    assert [message.fields() for message in one.messages] == [
        {**turn, "content": turn["content"]} for turn in asking({"city": "Rome"}, "So:")["messages"]
    ]
    assert Message("user", "a").fields() == {"role": "user", "content": "a"}
