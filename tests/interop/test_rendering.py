"""Templates in a separate process: transformers' text, limits, and no process left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_templates import CONVERSATIONS, TEMPLATES, made, of

from lora.errors import ConfigError, ModelError
from lora.finetune.data.templates import template_of
from lora.interop import rendering
from lora.interop.rendering import LimitError, RenderError, render

TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"n": [1, 2.5, None]}}}]


@pytest.mark.parametrize("opening", [False, True])
@pytest.mark.parametrize("name", [name for name in TEMPLATES if TEMPLATES[name]])
def test_a_text_equals_transformers(name: str, opening: bool) -> None:
    tokenizer = made("llama2")
    tokenizer.chat_template = TEMPLATES[name]
    for talk in CONVERSATIONS.values():
        messages = [{"role": m.role, "content": m.content} for m in talk.messages]
        try:
            theirs = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=opening
            )
        except Exception as error:
            theirs = str(error)
        values = {
            **tokenizer.special_tokens_map, "messages": messages, "add_generation_prompt": opening
        }  # fmt: skip
        (ours,) = render(str(TEMPLATES[name]), [values])
        assert str(ours) == theirs


@pytest.mark.parametrize(
    "jinja",
    [
        "{% for t in tools %}{{ t | tojson }}{{ t | tojson(indent=2, sort_keys=True) }}"
        "{% endfor %}",
        "{{ tools | tojson(ensure_ascii=True, separators=(',', ':')) }}{{ dict(a=1, b=tools) }}",
        "{% set ns = namespace(a=1) %}{% for m in messages %}{% set ns.a = ns.a + 1 %}{% endfor %}"
        "{{ ns.a }}{{ dict.fromkeys(['a', 'b'], 0) }}",
        "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.content }}"
        "{% break %}{% endfor %}",
        "{% macro one(m) %}  {{ m.role }}\n  {%- endmacro %}\n  {% if true %}\n"
        "{{ one(messages[0]) }}\n  {% endif %}\n",
        "{% for m in messages %}{% generation %} {{ m.content }} {% endgeneration %}{% endfor %}",
        "{{ strftime_now('%Y') }}{{ messages[0].content | upper | trim }}{{ missing is defined }}",
        "{{ messages[5].content }}",
        "{{ raise_exception('no ' + messages[0].role) }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__ }}",
        "{{ namespace(_a=1) is defined }}",
        "{{ range(10**9) }}",
        "{% for m in messages %}",
    ],
)
def test_jinja_is_set_up_as_transformers_does(jinja: str) -> None:
    tokenizer = made("gpt2")
    messages = [{"role": "user", "content": "né <a> & 'b'"}, {"role": "assistant", "content": "x"}]
    try:
        theirs = tokenizer.apply_chat_template(
            messages, tools=TOOLS, chat_template=jinja, tokenize=False
        )
    except Exception as error:
        theirs = type(error)
    values = {**tokenizer.special_tokens_map, "messages": messages, "tools": TOOLS}
    (ours,) = render(jinja, [values])
    if isinstance(theirs, type):
        assert isinstance(ours, RenderError)
    else:
        assert ours == theirs


ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
BEYOND = {
    "loops": ENDLESS,
    "one long operation": "{{ 10 ** (10 ** 9) }}",
    "repeats": "{{ 'x' * 10 ** 10 }}",
    "formats": "{{ '%1000000000d' % 1 }}",
    "pads": "{{ 'a' | center(10 ** 10) }}",
    "joins": "{% set s = 'x' * 10 ** 8 %}{{ [s, s, s, s, s, s, s, s, s, s, s, s] | join }}",
    "lists": "{{ ([1] * 10 ** 9) | length }}",
    "calls itself": "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "writes much": "{{ 'x' * 10 ** 7 }}",
    "doubles": "{% set ns = namespace(s='x') %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}"
    "{% endfor %}",
}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process with a shorter time limit."""
    rendering._renderer.close()
    monkeypatch.setattr(rendering, "TIME_LIMIT", 2)
    yield
    rendering._renderer.close()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits memory")
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("what", BEYOND)
def test_a_template_past_a_limit_is_stopped_and_named(what: str) -> None:
    tokenizer = made("gpt2")
    tokenizer.chat_template = BEYOND[what]
    with pytest.raises(ConfigError, match=r"the chat template \(the tokenizer's\) cannot be used"):
        template_of(tokenizer).render(CONVERSATIONS["one turn"])
    # The next text is rendered as usual.
    assert of(tokenizer, "zephyr").render(CONVERSATIONS["one turn"]).text.startswith("<|user|>")


@pytest.mark.usefixtures("quick")
def test_the_texts_beside_one_that_is_stopped_are_rendered() -> None:
    jinja = "{{ n }}{% if n == 1 %}" + ENDLESS + "{% endif %}"
    first, second, third = render(jinja, [{"n": 0}, {"n": 1}, {"n": 2}])
    assert (first, third) == ("0", "2")
    assert isinstance(second, LimitError)
    assert "more than 2 seconds or 1024 MiB of memory" in str(second)


def test_a_long_conversation_is_within_the_limits() -> None:
    values = [{"messages": [{"content": "né" * 1000}] * 2000, "n": n} for n in range(3)]
    texts = render("{{ n }}{% for m in messages %}{{ m.content }}{% endfor %}", values)
    assert texts == [f"{n}" + "né" * 2_000_000 for n in range(3)]


def test_a_process_that_was_ended_is_started_again() -> None:
    assert render("{{ n }}", [{"n": 1}]) == ["1"]
    process = rendering._renderer.process
    assert process is not None
    process.kill()
    process.wait()
    assert render("{{ n }}", [{"n": 2}]) == ["2"]


def test_after_ctrl_c_the_next_request_gets_its_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    render("{{ n }}", [{"n": 0}])

    def interrupted(answer: dict[str, str]) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(rendering, "_result", interrupted)
        with pytest.raises(KeyboardInterrupt):
            render("{{ n }}", [{"n": 1}, {"n": 2}])
    assert render("{{ n }}", [{"n": 3}]) == ["3"]


FORK = """
import os
from lora.interop import rendering
print(rendering.render("{{ n }}", [{"n": 1}]), flush=True)
child = os.fork()
print(rendering.render("{{ n }}", [{"n": 2 if child else 3}]), flush=True)
if child:
    os.waitpid(child, 0)
    print(rendering.render("{{ n }}", [{"n": 4}]), flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_fork_starts_its_own_process() -> None:
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=120)
    assert sorted(done.stdout.split()) == ["['1']", "['2']", "['3']", "['4']"]
    assert done.returncode == 0


PROGRAM = """
import sys
from lora.interop import rendering
rendering.TIME_LIMIT = 3
rendering.render("{{ n }}", [{"n": 1}])
print(rendering._renderer.process.pid, flush=True)
rendering.render(sys.argv[1], [{}])
"""


def alive(pid: int) -> bool:
    state = Path(f"/proc/{pid}/stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("end", [None, signal.SIGKILL])
def test_no_process_is_left_behind(end: signal.Signals | None) -> None:
    """By a program that ends, and by one that is killed while the template loops."""
    jinja = ENDLESS if end else "{{ 1 }}"
    command = [sys.executable, "-c", PROGRAM, jinja]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        pid = int(program.stdout.readline())
        if end:
            assert alive(pid)
            time.sleep(0.2)  # into the loop
            program.send_signal(end)
    for _ in range(600):
        if not alive(pid):
            break
        time.sleep(0.1)
    assert not alive(pid)


def test_without_jinja_the_error_names_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "jinja2.py").write_text("raise ImportError('none here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    rendering._renderer.close()
    try:
        with pytest.raises(ModelError, match="need Jinja: none here. Run pip install"):
            of(made("gpt2"), "zephyr").render(CONVERSATIONS["one turn"])
    finally:
        rendering._renderer.close()
