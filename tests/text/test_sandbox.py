"""Hostile chat templates: each ends soon in a TemplateError, in little memory, and reaches nothing of the process."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from headrace.errors import TemplateError
from headrace.text.chat import render_chat

SECONDS = 5.0  # of the wall: half a second is needed, and other tests run beside this one
ADDRESS_SPACE = 200 << 20  # more than the interpreter has when it begins; a doubling string breaks it at once

_BIG = "{% set s = 'x' * 1000000 %}"
_LOOP = "{% for i in range(99999) %}"

# What would take all time or all memory.
GREEDY = {
    "nested ranges": _LOOP * 4 + "{% endfor %}" * 4,
    "nested ranges that print": _LOOP * 3 + "x" + "{% endfor %}" * 3,
    "a range too long": "{% for i in range(10 ** 12) %}{% endfor %}",
    "a filtered loop": _LOOP + _LOOP + "{% for j in range(99999) if false %}{% endfor %}" + "{% endfor %}" * 2,
    "loop over its own list": "{% set l = [1] %}{% for i in l %}{{ l.append(1) }}{% endfor %}",
    "recursive loop": "{% for a in [[1]] recursive %}{{ loop([a]) }}{% endfor %}",
    "recursive macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "macros twice each": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "mutual macros": "{% macro f() %}{{ g() }}{% endmacro %}{% macro g() %}{{ f() }}{% endmacro %}{{ f() }}",
    "caller recursion": "{% macro f() %}{% call f() %}{{ caller() }}{% endcall %}{% endmacro %}{{ f() }}",
    "string times": "{{ 'x' * 10 ** 10 }}",
    "times string": "{{ 10 ** 10 * 'x' }}",
    "list times": "{{ ([0] * 10 ** 10) | length }}",
    "tuple times": "{{ ((0,) * 10 ** 10) | length }}",
    "doubling by +": "{% set n = namespace(s='x') %}" + _LOOP + "{% set n.s = n.s + n.s %}{% endfor %}",
    "doubling by ~": "{% set n = namespace(s='x') %}" + _LOOP + "{% set n.s = n.s ~ n.s %}{% endfor %}",
    "doubling by join": "{% set n = namespace(s='x') %}" + _LOOP + "{% set n.s = [n.s, n.s] | join %}{% endfor %}",
    "doubling by method": "{% set n = namespace(s='x') %}" + _LOOP + "{% set n.s = n.s.join('abc') %}{% endfor %}",
    "doubling by block": "{% set n = namespace(s='x') %}"
    + _LOOP
    + "{% set t %}{{ n.s }}{{ n.s }}{% endset %}{% set n.s = t %}{% endfor %}",
    "doubling by list": "{% set n = namespace(s=[1]) %}" + _LOOP + "{% set n.s = n.s + n.s %}{% endfor %}",
    "doubling by replace": "{% set n = namespace(s='xx') %}"
    + _LOOP
    + "{% set n.s = n.s.replace('x', 'xx') %}{% endfor %}",
    "doubling by format": "{% set n = namespace(s='x') %}" + _LOOP + "{% set n.s = '{0}{0}'.format(n.s) %}{% endfor %}",
    "doubling by percent": "{% set n = namespace(s='x') %}" + _LOOP + "{% set n.s = '%s%s' % (n.s, n.s) %}{% endfor %}",
    "doubling by tojson": "{% set n = namespace(s='\"') %}" + _LOOP + "{% set n.s = n.s | tojson %}{% endfor %}",
    "nested lists shared": "{% set n = namespace(l=[1]) %}"
    + "{% for i in range(60) %}{% set n.l = [n.l, n.l] %}{% endfor %}{{ n.l }}",
    "nested lists to json": "{% set n = namespace(l=[1]) %}"
    + "{% for i in range(60) %}{% set n.l = [n.l, n.l] %}{% endfor %}{{ n.l | tojson }}",
    "nested lists compared": "{% set n = namespace(l=[1], m=[1]) %}"
    + "{% for i in range(60) %}{% set n.l = [n.l, n.l] %}{% set n.m = [n.m, n.m] %}{% endfor %}{{ n.l == n.m }}",
    "powers": "{{ 9 ** 9 ** 9 }}",
    "powers in a loop": "{% set n = namespace(x=3) %}" + _LOOP + "{% set n.x = n.x * n.x %}{% endfor %}",
    "center": "{{ 'x' | center(10 ** 10) }}",
    "center method": "{{ 'x'.center(10 ** 10) }}",
    "ljust": "{{ 'x'.ljust(10 ** 10) }}",
    "zfill": "{{ 'x'.zfill(10 ** 10) }}",
    "format width": "{{ '{:>10000000000}'.format(1) }}",
    "nested format width": "{{ '{:>{}}'.format(1, 10 ** 10) }}",
    "percent width": "{{ '%10000000000d' % 1 }}",
    "percent star": "{{ '%*d' % (10 ** 10, 1) }}",
    "format filter": "{{ '%10000000000d' | format(1) }}",
    "indent": "{{ 'a\\nb' | indent(10 ** 10) }}",
    "json indent": "{{ [1] | tojson(indent=10 ** 10) }}",
    "json separators": _BIG + "{{ range(9999) | list | tojson(separators=(s, s)) }}",
    "wordwrap": "{{ 'x' | wordwrap(1) }}",
    "batch": "{{ [1] | batch(10 ** 10, 'x') | list }}",
    "slice filter": "{{ [1] | slice(10 ** 10) | list }}",
    "replace by long": _BIG + "{{ s.replace('x', s) }}",
    "replace filter": _BIG + "{{ s | replace('', s) }}",
    "join by long": _BIG + "{{ s.join(s) }}",
    "split": _BIG + _LOOP + "{{ s.split('x') | length }}{% endfor %}",
    "list of characters": _BIG + _LOOP + "{{ s | list | length }}{% endfor %}",
    "slow search": _BIG + _LOOP + "{{ (s ~ 'y') in s }}{{ s.count(s[1:] ~ 'y') }}{% endfor %}",
    "slow strip": _BIG + _LOOP + "{{ s.strip(s) | length }}{% endfor %}",
    "slow sort": _LOOP + "{{ range(99999) | sort | length }}{% endfor %}",
    "sum of lists": "{{ [[1]] * 1000 | sum(start=[]) }}",
    "unique": _LOOP + "{{ range(99999) | unique | list | length }}{% endfor %}",
    "escape": _BIG + _LOOP + "{{ (s | replace('x', '<')) | e | length }}{% endfor %}",
    "a long number": "{{ ('9' * 1000000) | int }}",
    "reversed slices": _BIG + _LOOP + "{{ s[::-1] | length }}{% endfor %}",
    "cycle forever": "{% for i in range(99999) %}{{ loop.cycle('x' * 1000000, 'y') }}{% endfor %}",
    "lipsum": "{{ lipsum(n=10 ** 6) }}",
    "deep expression": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "deep blocks": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "long template": "x" * (1 << 20),
    "many nodes": "{{1}}" * 25_000,
    "strftime": "{{ strftime_now('%1000000000d') }}",
    "dict by range": "{{ dict(a=range(99999) | list) | tojson }}" + _LOOP * 2 + "{% endfor %}" * 2,
    "argument spread": "{% macro f() %}{{ varargs | length }}{% endmacro %}"
    + _LOOP
    + "{{ f(*(range(99999) | list)) }}{% endfor %}",
    "keyword spread": "{% macro f() %}{{ kwargs | length }}{% endmacro %}{% set d = {'a': 'x' * 1000000} %}"
    + _LOOP
    + "{{ f(**d) }}{% endfor %}",
}

# What would reach the process behind the template; nothing of it may be shown or run.
ESCAPES = {
    "class": "{{ ''.__class__ }}",
    "class by subscript": "{{ ''['__class__'] }}",
    "class by attr": "{{ '' | attr('__class__') }}",
    "class chain": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "class by map": "{{ [''] | map(attribute='__class__') | list }}",
    "class by sort": "{{ [''] | sort(attribute='__class__') }}{{ [''] | map(attribute='__class__.__mro__') | list }}",
    "class by format": "{{ '{0.__class__}'.format('') }}",
    "class by format item": "{{ '{0[__class__]}'.format('') }}",
    "class by format map": "{{ '{a.__class__}'.format_map({'a': ''}) }}",
    "class by percent": "{{ ('%s' % ''.__class__) }}",
    "globals of range": "{{ range.__globals__ }}",
    "globals of a filter": "{{ raise_exception.__globals__ }}",
    "init globals": "{{ namespace.__init__.__globals__['os'].system('true') }}",
    "namespace class": "{% set n = namespace() %}{{ n.__class__.__init__.__globals__ }}",
    "namespace underscore": "{% set n = namespace(__class__=1) %}{{ n }}",
    "namespace set": "{% set n = namespace() %}{% set n.__class__ = 1 %}{{ n }}",
    "namespace attributes": "{% set n = namespace() %}{{ n._Namespace__attrs }}",
    "macro internals": "{% macro f() %}{% endmacro %}{{ f._func.__globals__ }}",
    "macro class": "{% macro f() %}{% endmacro %}{{ f.__class__ }}",
    "self": "{{ self.__init__.__globals__ }}",
    "self block": "{{ self._TemplateReference__context.environment }}",
    "loop internals": "{% for i in [1] %}{{ loop._iterable.__class__ }}{{ loop.__class__ }}{% endfor %}",
    "undefined internals": "{{ nothing.__class__ }}",
    "undefined fail": "{{ nothing._fail_with_undefined_error.__globals__ }}",
    "dict class": "{{ dict.__base__.__subclasses__() }}",
    "dict mro": "{{ dict.mro() }}",
    "cycler": "{{ cycler.__init__.__globals__.os }}",
    "joiner": "{{ joiner.__init__.__globals__.os }}",
    "environment": "{{ environment.globals }}",
    "import": "{% import 'os' as os %}",
    "include": "{% include '/etc/passwd' %}",
    "extends": "{% extends '/etc/passwd' %}",
    "a method of a message": "{{ messages[0].update({'role': 'system'}) }}",
    "appending": "{{ messages.append(1) }}",
    "clearing": "{{ messages.clear() }}",
    "do": "{% do messages.clear() %}",
    "encode": "{{ 'x'.encode() }}",
    "translate": "{{ 'x'.translate({120: 'y'}) }}",
    "generator": "{{ (messages | map('upper')).gi_frame }}",
    "calling a filter's name": "{{ messages | map('attr', '__class__') | list }}",
    "print a function": "{{ range }}",
    "print a method": "{{ ''.upper }}",
    "print a macro": "{% macro f() %}{% endmacro %}{{ f }}",
}
# Jinja makes nothing of a name that it may not look up; that is as good as an error, if nothing is shown.
_NOTHING = ("", "[]", "[Undefined]", "<Namespace>")

_LIMITED = f"""
import json, resource, sys, time
from headrace.errors import TemplateError
from headrace.text.chat import render_chat
messages = [{{"role": "user", "content": "x"}}]
render_chat("{{{{ messages }}}}", messages)
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + {ADDRESS_SPACE},) * 2)
results = {{}}
for name, template in json.load(sys.stdin).items():
    start = time.perf_counter()
    try:
        outcome = "wrote %r" % render_chat(template, messages)[:80]
    except TemplateError as error:
        outcome = f"TemplateError: {{error}}"[:200]
    except BaseException as error:
        outcome = repr(error)
    results[name] = (outcome, time.perf_counter() - start)
json.dump(results, sys.stdout)
"""


@pytest.fixture(scope="module")
def greedy_results() -> dict[str, Any]:
    """All greedy templates in one process, whose memory may grow by ADDRESS_SPACE: name to (outcome, seconds)."""
    command = [sys.executable, "-c", _LIMITED]
    done = subprocess.run(command, input=json.dumps(GREEDY), capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on the address space")
@pytest.mark.parametrize("name", GREEDY)
def test_greedy_templates_end_soon(greedy_results: dict[str, Any], name: str) -> None:
    outcome, seconds = greedy_results[name]
    assert outcome.startswith("TemplateError: ")
    assert "MemoryError" not in outcome and "TypeError" not in outcome  # a limit ended it, not an accident
    assert seconds < SECONDS


@pytest.mark.parametrize("name", ESCAPES)
def test_escapes_reach_nothing(name: str) -> None:
    messages = [{"role": "user", "content": "x"}]
    try:
        shown = render_chat(ESCAPES[name], messages)
    except TemplateError:
        shown = ""
    assert shown in _NOTHING
    assert messages == [{"role": "user", "content": "x"}]


def test_the_limits_are_what_stops_them() -> None:
    """The control: the same constructions, small, are rendered."""
    small = {
        "{% for i in range(9) %}{% for j in range(9) %}x{% endfor %}{% endfor %}": "x" * 81,
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}x{% endif %}{% endmacro %}{{ f(20) }}": "x" * 20,
        "{{ 'x' * 1000 }}": "x" * 1000,
        "{{ 2 ** 64 }}": str(2**64),
        "{{ '{:>10}'.format(1) }}{{ '%5d' % 1 }}": "         1    1",
        "{{ 'abc'.replace('b', 'xx') }}{{ '-'.join(['a', 'b']) }}": "axxca-b",
    }
    for template, text in small.items():
        assert render_chat(template, [{"role": "user", "content": "x"}]) == text


def test_the_time_limit_holds_by_itself() -> None:
    with pytest.raises(TemplateError, match=r"ran longer than its 0\.05 s"):
        render_chat(GREEDY["nested ranges"], [{"role": "user", "content": "x"}], seconds=0.05)
