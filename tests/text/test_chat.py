"""Conversations as text: equal to transformers' rendering, and malformed ones refused."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from headrace.errors import RequestError, TemplateError
from headrace.text.chat import MAX_RENDERED_CHARS, ChatTemplate, render_chat
from headrace.text.tokenizer import Tokenizer

CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "user": [{"role": "user", "content": "Hello!"}],
    "system": [{"role": "system", "content": "Be terse."}, {"role": "user", "content": "Why?\n\nWhy not?"}],
    "turns": [
        {"role": "user", "content": "  one  "},
        {"role": "assistant", "content": "two <|im_end|> {{ 7 * 7 }} {% raw %}"},
        {"role": "user", "content": "три 👍🏽 & <b>\"'"},
    ],
    "empty": [{"role": "user", "content": ""}],
}

# Features that the templates of well-known models use, each with transformers' own rendering as the reference.
TEMPLATES = {
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ ns.n }}:"
    "{{ m.role }}={{ m['content'] | trim }};{% endfor %}",
    "loop": "{%- for m in messages -%}{{ loop.index0 }}{{ loop.last }}{{ loop.revindex }}\n{%- endfor %}\n  x",
    "blocks": "  {% if messages %}\n    a\n  {% endif %}\n{# comment #}\nb\n",
    "macro": "{% macro show(m, end='!') %}{{ m.role.upper() ~ end }}{% endmacro %}{{ show(messages[0], end='?') }}",
    "slices": "{% for m in messages[1:] %}{{ m.content[:3] }}{% endfor %}{{ messages[-1]['content'][::-1] }}",
    "methods": "{{ messages[0].content.split('l')[-1].strip().replace('o', '0').startswith('!') }}",
    "set in a loop": "{% for m in messages %}{% set c = m.content.replace('o', '0').split('l') %}{{ c | join('-') }}"
    "{{ c[0].strip('H') }}{{ '-'.join(c) }}{{ range(loop.index) | list }}{{ '{}'.format(c[0]) }}{% endfor %}",
    "set in a block": "{% macro f(x) %}{{ caller(x) }}{% endmacro %}{% for m in messages %}{% set y = 1 %}"
    "{% call(v) f(m.role) %}{{ v.title() }}{{ y }}{% endcall %}{% set z %}{{ m.role.upper() }}{% endset %}{{ z }}"
    "{% endfor %}",
    "filters": "{{ messages | map(attribute='role') | join(', ') }}|"
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}|"
    "{{ messages[0].content | default('none') | upper }}",
    "json": "{{ messages | tojson }}\n{{ messages[0] | tojson(indent=2) }}\n{{ {'a': [1, 2.5, none, true]} | tojson }}",
    "undefined": "{% if tools is not defined %}a{% endif %}{% if not nothing %}b{% endif %}{{ nothing }}",
    "break": "{% for m in messages %}{% if loop.index == 2 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
    "arithmetic": "{{ 7 // 2 }} {{ 7 % 3 }} {{ 2 ** 10 }} {{ 'ab' * 2 }} {{ [1] + [2] }} {{ 1 if messages else 2 }}",
    "tests": "{% for m in messages %}{{ m.content is string }}{{ m.x is defined }}{{ 'o' in m.content }}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "bos": "{{ bos_token }}{% if add_generation_prompt %}>{% endif %}{{ eos_token }}",
    "items": "{% for key, value in messages[0].items() %}{{ key }}={{ value }} {% endfor %}",
    "format": "{{ '%s and %d' | format('x', 3) }} {{ '{} {a}'.format(1, a=2) }} {{ 'x%sy' % 4 }}",
    "range": "{% for i in range(2, 9, 3) %}{{ i }}{% endfor %}{% filter upper %}abc{% endfilter %}",
}


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_smollm2_equals_transformers(
    smollm2_tokenizer: Tokenizer, transformers_smollm2: Any, name: str, prompt: bool
) -> None:
    assert smollm2_tokenizer.chat_template is not None
    messages = CONVERSATIONS[name]
    text = render_chat(smollm2_tokenizer.chat_template, messages, add_generation_prompt=prompt)
    options = {"add_generation_prompt": prompt, "tokenize": False}
    theirs = transformers_smollm2.apply_chat_template(
        messages, chat_template=smollm2_tokenizer.chat_template, **options
    )
    assert text == theirs
    assert text.endswith("<|im_start|>assistant\n") is prompt
    assert ("You are a helpful AI assistant named SmolLM" in text) is (messages[0]["role"] != "system")


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_equal_transformers(transformers_smollm2: Any, name: str) -> None:
    tokens = {"bos_token": transformers_smollm2.bos_token, "eos_token": transformers_smollm2.eos_token}
    for messages in CONVERSATIONS.values():
        text = render_chat(TEMPLATES[name], messages, **tokens)
        options = {"add_generation_prompt": True, "tokenize": False}
        assert text == transformers_smollm2.apply_chat_template(messages, chat_template=TEMPLATES[name], **options)


def test_template_says_no() -> None:
    with pytest.raises(TemplateError, match=r"^roles must alternate$"):
        render_chat("{{ raise_exception('roles must alternate') }}", CONVERSATIONS["user"])


def test_tools_and_variables_reach_the_template() -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    template = "{{ tools[0].function.name }} {{ thinking }} {{ add_generation_prompt }}"
    text = render_chat(template, CONVERSATIONS["user"], tools=tools, thinking=False, add_generation_prompt=False)
    assert text == "f False False"


def test_text_parts_become_one_text() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert render_chat("{{ messages[0].content }}", [{"role": "user", "content": parts}]) == "a\nb"
    parts.append({"type": "image"})  # type: ignore[arg-type]
    assert render_chat("{{ messages[0].content | length }}", [{"role": "user", "content": parts}]) == "3"


MALFORMED: dict[str, tuple[Any, str]] = {
    "none": ([], "at least one message"),
    "a text": ("hello", "at least one message"),
    "not an object": (["hello"], "message 0 must be an object"),
    "no role": ([{"content": "x"}], "message 0 must have a role"),
    "role a number": ([{"role": 1, "content": "x"}], "message 0 must have a role"),
    "no content": ([{"role": "user", "content": "x"}, {"role": "user"}], "message 1 has no content"),
    "content a number": ([{"role": "user", "content": 5}], "string or a list of parts"),
    "content bytes": ([{"role": "user", "content": b"x"}], "string or a list of parts"),
    "part without type": ([{"role": "user", "content": [{"text": "x"}]}], "part without a type"),
    "part without text": ([{"role": "user", "content": [{"type": "text"}]}], "text part without a text"),
    "an object inside": ([{"role": "user", "content": "x", "extra": object()}], "plain data"),
    "a class inside": ([{"role": "user", "content": "x", "extra": {"k": [int]}}], "plain data"),
}


@pytest.mark.parametrize("messages, problem", MALFORMED.values(), ids=MALFORMED)
def test_malformed_messages(messages: Any, problem: str) -> None:
    with pytest.raises(RequestError, match=problem):
        render_chat("{{ messages }}", messages)


def test_a_role_without_text_for_tool_calls() -> None:
    messages = [{"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}]
    assert render_chat("{{ messages[0].content is none }}", messages) == "True"


def test_templates_that_do_not_compile() -> None:
    for source in ("{% for x in %}", "{{ 1 + }}", "{% if a %}", "{% unknown %}", "{{ a|nofilter }}", "{{" * 5000):
        with pytest.raises(TemplateError, match="the chat template"):
            ChatTemplate(source).render(CONVERSATIONS["user"])


def test_output_is_bounded_and_long_conversations_fit() -> None:
    message = {"role": "user", "content": "x" * (MAX_RENDERED_CHARS // 4)}
    template = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}")
    assert len(template.render([message] * 4)) == MAX_RENDERED_CHARS
    with pytest.raises(TemplateError, match=f"more than {MAX_RENDERED_CHARS} characters"):
        template.render([message] * 5)
    turns = [{"role": "user", "content": f"turn {i}"} for i in range(2000)]
    assert len(template.render(turns).split("turn")) == 2001


def test_one_template_for_many_threads() -> None:
    template, wrong = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}"), []

    def work(name: str) -> None:
        for _ in range(50):
            if template.render([{"role": "user", "content": name}] * 5) != name * 5:
                wrong.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_what_is_a_string_is_asked_of_the_value() -> None:
    """A test never sees a list or an object as its text, as some filters do."""
    tests = "{{ x is string }},{{ x is float }},{{ x is lower }};"
    template = "{% for x in [none, 1, 1.5, 'a', [1], {'a': 1}] %}" + tests + "{% endfor %}"
    parts = [{"type": "text", "text": "a"}, {"type": "image"}]
    assert render_chat("{{ messages[0].content is string }}", [{"role": "user", "content": parts}]) == "False"
    shown = render_chat(template, CONVERSATIONS["user"])
    assert [text.split(",")[:2] for text in shown.split(";")[:-1]] == [
        ["False", "False"],
        ["False", "False"],
        ["False", "True"],
        ["True", "False"],
        ["False", "False"],
        ["False", "False"],
    ]
