"""Rendering a template that may be hostile, in this process, with limits that hold.

A model file brings its chat template, and a template is a program. A child process with resource limits would stop any
program, but it costs a start (50 ms, of the 400 ms in which a first token is due) or a servant to keep alive, and its
memory limit does not exist on every system. So the program is restrained instead, by three rules:

1. Nothing is allowed that is not listed: node types, filters, tests, functions, and methods by type.
2. Every operation whose cost can grow pays a `Budget` for its operands and its result before it runs. Jinja calls back
   for operators, calls, filters and output; loops, macros, literals, comparisons, slices, `~` are rewritten to do so.
3. The template itself is bounded (characters, nodes), so what runs between two payments is short.
"""

from __future__ import annotations

import json
from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, ValuesView
from datetime import datetime
from functools import wraps
from string import Formatter
from types import BuiltinMethodType, MethodType
from typing import Any

import markupsafe
from jinja2 import Template, Undefined, nodes, pass_context
from jinja2.exceptions import SecurityError, TemplateRuntimeError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from ..errors import TemplateError
from .budget import OPERATION, Budget
from .prices import DIGITS, FILTER_GROWTH, MAX_WIDTH, METHOD_GROWTH, check_bits, check_widths, pay_percent

MAX_TEMPLATE_CHARS = 1 << 17
MAX_TEMPLATE_NODES = 20_000
MAX_RANGE = 100_000
MAX_MESSAGE_CHARS = 1000  # of raise_exception

_NODES = (
    *(nodes.Template, nodes.Output, nodes.TemplateData, nodes.For, nodes.If, nodes.Macro, nodes.CallBlock),
    *(nodes.FilterBlock, nodes.With, nodes.Assign, nodes.AssignBlock, nodes.ExprStmt, nodes.Break, nodes.Continue),
    *(
        nodes.Scope,
        nodes.Name,
        nodes.NSRef,
        nodes.Const,
        nodes.Tuple,
        nodes.List,
        nodes.Dict,
        nodes.Pair,
        nodes.Keyword,
    ),
    *(nodes.CondExpr, nodes.Filter, nodes.Test, nodes.Call, nodes.Getitem, nodes.Getattr, nodes.Slice, nodes.Concat),
    *(nodes.Compare, nodes.Operand, nodes.BinExpr, nodes.UnaryExpr),
)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_FILTERS = _words(
    "abs batch capitalize count d default dictsort first float format indent int items join last length list lower map "
    "max min reject rejectattr replace reverse round select selectattr sort string sum title trim truncate unique "
    "upper wordcount"
)
_TEXT_FILTERS = _words(  # these make text of whatever they are given
    "capitalize e escape float format indent int lower replace safe string title trim truncate upper wordcount"
)
_TESTS = _words(
    "!= < <= == > >= boolean callable defined divisibleby eq equalto even false float ge greaterthan gt in integer "
    "iterable le lessthan lower lt mapping ne none number odd sameas sequence string true undefined upper"
)
_METHODS: Mapping[type, frozenset[str]] = {
    str: _words(
        "capitalize casefold count endswith find format index isalnum isalpha isascii isdecimal isdigit isidentifier "
        "islower isnumeric isprintable isspace istitle isupper join lower lstrip partition removeprefix removesuffix "
        "replace rfind rindex rpartition rsplit rstrip split splitlines startswith strip swapcase title upper"
    ),
    list: _words("count index"),
    tuple: _words("count index"),
    dict: _words("get items keys values"),
    range: _words(""),
    LoopContext: _words(
        "changed cycle depth depth0 first index index0 last length nextitem previtem revindex revindex0"
    ),
}

_CONTAINERS = (list, tuple, dict)
_SCALARS = (str, int, float, bool, type(None))


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja as transformers sets it up for chat templates, under the rules above.

    Set `budget` before rendering; one rendering at a time. Raises TemplateError, or what Jinja and Python raise.
    """

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})
    budget: Budget

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # constant folding would run operations before there is a budget
            extensions=[LoopControlExtension, _Generation],
            finalize=self._printable,
        )
        self.filters = {name: self._priced_filter(name, self.filters[name]) for name in _FILTERS}
        for name, plain in (("tojson", _tojson), ("safe", _same_text), ("e", _escape), ("escape", _escape)):
            self.filters[name] = self._priced_filter(name, plain)
        self.tests = {name: self._priced(self.tests[name]) for name in _TESTS}
        self._functions = (_bounded_range, dict, _Namespace, _raise_exception, _strftime_now)
        names = ("range", "dict", "namespace", "raise_exception", "strftime_now")
        self.globals = dict(zip(names, self._functions))

    def prepare(self, source: str) -> Template:
        """Compile `source`, rewritten so that its loops and operations pay."""
        if len(source) > MAX_TEMPLATE_CHARS:
            raise TemplateError(
                f"the chat template has {len(source)} characters; at most {MAX_TEMPLATE_CHARS} are allowed"
            )
        tree = self.parse(source)
        for node in _walk(tree):
            if not isinstance(node, _NODES):
                raise TemplateError(f"the chat template uses {type(node).__name__!r}, which chat templates may not")
        if (count := _size(tree)) > MAX_TEMPLATE_NODES:
            raise TemplateError(f"the chat template has {count} parts; at most {MAX_TEMPLATE_NODES} are allowed")
        return Template.from_code(self, self.compile(_Rewriter().visit(tree)), self.make_globals(None))

    # --- called by compiled templates in place of what they would do themselves

    def pay_body(self, size: int) -> str:
        """At the start of a loop's or a macro's body of `size` nodes."""
        self.budget.spend(size * OPERATION)
        return ""

    def pay_test(self, size: int) -> bool:
        self.budget.spend(size * OPERATION)
        return True

    def join_text(self, *parts: Any) -> str:
        return self._concat([self._text(part) for part in parts])

    def made(self, value: Any) -> Any:
        """A list, tuple or dictionary that was just written out."""
        self.budget.write(0, len(value))
        if type(value) is dict:
            self.budget.read(*value)  # its keys were hashed
        return value

    def compared(self, value: Any) -> Any:
        self.budget.read(value)
        return value

    def sliced(self, value: Any, start: Any, stop: Any, step: Any) -> Any:
        if type(value) in (str, list, tuple, range):
            self._pay_sequence(value, len(range(len(value))[start:stop:step]))
        return value[start:stop:step]

    def concat(self, parts: Any) -> str:  # type: ignore[override]  # what macros and blocks make of their output
        return self._concat(parts)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self.budget.spend(0)
        if operator == "%" and type(left) is str:
            pay_percent(self.budget, left, right)
            return left % right
        if operator == "*" and isinstance(left, int):
            left, right = right, left
        if operator == "+" and isinstance(left, (str, list, tuple)) and isinstance(right, (str, list, tuple)):
            self._pay_sequence(left, len(left) + len(right))
        elif operator == "*" and isinstance(left, (str, list, tuple)) and isinstance(right, int):
            self._pay_sequence(left, len(left) * max(right, 0))
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            check_bits(left.bit_length() * abs(right))
        result = self.binop_table[operator](left, right)
        if isinstance(result, int):
            check_bits(result.bit_length())
        return result

    def getattr(self, obj: Any, attribute: str) -> Any:
        if isinstance(obj, (Undefined, Namespace)):
            return super().getattr(obj, attribute)
        if attribute in _METHODS.get(type(obj), ()):
            if type(obj) is str and attribute == "format":
                return _Format(self, obj)
            return getattr(obj, attribute)
        if type(obj) is dict and attribute in obj:
            return obj[attribute]
        return (
            self.unsafe_undefined(obj, attribute)
            if hasattr(obj, attribute)
            else self.undefined(obj=obj, name=attribute)
        )

    def getitem(self, obj: Any, argument: Any) -> Any:
        if type(obj) not in _METHODS or isinstance(argument, str):
            if isinstance(obj, Undefined) or (type(obj) is dict and argument in obj):
                return obj[argument]
            return self.getattr(obj, argument) if isinstance(argument, str) else self.undefined(obj=obj)
        if type(argument) is tuple:
            self.budget.read(argument)
        try:
            return obj[argument]
        except (TypeError, LookupError):
            return self.undefined(obj=obj, name=argument)  # type: ignore[arg-type]

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        owner = getattr(obj, "__self__", None)
        if owner is self and isinstance(obj, MethodType):
            return obj(*args)
        for name in ("_loop_vars", "_block_vars"):  # Jinja's own, for functions that take the context: none here does
            kwargs.pop(name, None)
        self.budget.read(args, kwargs)
        if isinstance(obj, BuiltinMethodType) and obj.__name__ in _METHODS.get(type(owner), ()):
            self.budget.read(owner)
            growth = METHOD_GROWTH.get(obj.__name__) if type(owner) is str else None
            if growth is not None:
                growth(self.budget, owner, *args, **kwargs)
        elif not (
            isinstance(obj, (Macro, LoopContext, Undefined, _Format))
            or any(obj is function for function in self._functions)
            or (isinstance(obj, MethodType) and type(owner) is LoopContext and obj.__name__ in ("cycle", "changed"))
        ):
            raise SecurityError(f"{type(obj).__name__} cannot be called from a chat template")
        return self._kept(context.call(obj, *args, **kwargs))

    # --- paying

    def _priced_filter(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        return self._priced(function, FILTER_GROWTH.get(name), name in _TEXT_FILTERS)

    def _priced(
        self, function: Callable[..., Any], growth: Callable[..., None] | None = None, takes_text: bool = False
    ) -> Callable[..., Any]:
        """A filter or test that pays for what it reads and for what it will make; `takes_text`: of a list or an object
        it takes the text."""
        hidden = 1 if hasattr(function, "jinja_pass_arg") else 0  # Jinja's own first argument

        @wraps(function)
        def priced(*args: Any, **kwargs: Any) -> Any:
            if takes_text:
                args = (*args[:hidden], *(self._text(a) if type(a) in _CONTAINERS else a for a in args[hidden:]))
            _, items, _ = self.budget.read(args[hidden:], kwargs)
            steering = sum(len(a) for a in (*args[hidden + 1 :], *kwargs.values()) if type(a) is str)
            self.budget.spend(
                0 if takes_text else items * steering * OPERATION
            )  # an attribute's name is a path to walk
            if growth is not None:
                growth(self.budget, *args[hidden:], **kwargs)
            return self._kept(function(*args, **kwargs))

        return priced

    def _pay_sequence(self, like: Any, size: int) -> None:
        self.budget.write(size if type(like) is str else 0, 0 if type(like) is str else size)

    def _kept(self, value: Any) -> Any:
        """The result of a call as plain data: what is lazy is made now, an item at a time."""
        if isinstance(value, str):
            self.budget.write(len(value))
            return value if type(value) is str else "".join((value,))
        if isinstance(value, int):
            check_bits(value.bit_length())
        elif type(value) in _CONTAINERS:
            self.budget.write(0, len(value))
        elif isinstance(value, (Iterator, KeysView, ValuesView, ItemsView)) and not isinstance(value, LoopContext):
            items = []
            for item in value:
                self.budget.write(0, 1)
                items.append(item)
            return items
        return value

    def _text(self, value: Any) -> str:
        """str(value), paid for; only plain data has a text."""
        if type(value) is str:
            return value
        if type(value) in _CONTAINERS:
            characters, items, _ = self.budget.read(value)
            self.budget.write(2 * characters + 4 * items)
        elif type(value) not in _SCALARS and not isinstance(value, Undefined):
            raise SecurityError(f"a chat template cannot print a {type(value).__name__}")
        return str(value)

    def _concat(self, parts: Any) -> str:
        parts = list(parts)
        self.budget.write(sum(map(len, parts)))
        return "".join(parts)

    @pass_context  # so that it is called at run time only
    def _printable(self, context: Context, value: Any) -> str:
        self.budget.spend(0)
        return self._text(value)


class _Namespace(Namespace):
    """Jinja's, without underscore names, and printed without what it holds (which may hold itself)."""

    def __init__(self, /, *args: Any, **kwargs: Any) -> None:
        for name in dict(*args, **kwargs):
            _check_name(name)
        super().__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"


class _Format:
    """str.format of one string, bounded."""

    def __init__(self, environment: BoundedEnvironment, text: str) -> None:
        self._environment, self._text = environment, text

    def __call__(self, *args: Any, **kwargs: Any) -> str:
        budget = self._environment.budget
        fields = list(Formatter().parse(self._text))
        for _, _, spec, _ in fields:
            if "{" in (spec or ""):
                raise TemplateRuntimeError("a format's width cannot be a field of its own in a chat template")
            check_widths(DIGITS.findall(spec or ""))
        characters, items, _ = budget.read(args, kwargs)
        budget.write(len(self._text) + len(fields) * (2 * characters + 4 * items + MAX_WIDTH))
        return SandboxedFormatter(self._environment).vformat(self._text, args, kwargs)


class _Generation(Extension):
    """`{% generation %}` marks what the model wrote, for training; here it changes nothing."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Rewriter(NodeTransformer):
    """Puts calls of the environment's paying methods where Jinja has no callback of its own."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        size = _size(node)
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_hook(node, "pay_body", nodes.Const(size)), lineno=node.lineno))
        if node.test is not None:
            node.test = nodes.And(_hook(node, "pay_test", nodes.Const(size)), node.test, lineno=node.lineno)
        return node

    def visit_Macro(self, node: nodes.Macro | nodes.CallBlock) -> nodes.Node:
        size = _size(node)
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_hook(node, "pay_body", nodes.Const(size)), lineno=node.lineno))
        return node

    visit_CallBlock = visit_Macro

    def visit_Call(self, node: nodes.Call | nodes.Filter | nodes.Test) -> nodes.Node:
        self.generic_visit(node)
        if node.dyn_args is not None:
            node.dyn_args = _hook(node, "made", node.dyn_args)
        if node.dyn_kwargs is not None:
            node.dyn_kwargs = _hook(node, "made", node.dyn_kwargs)
        return node

    visit_Filter = visit_Test = visit_Call

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _hook(node, "join_text", *node.nodes)

    def visit_List(self, node: nodes.List | nodes.Tuple | nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        return node if getattr(node, "ctx", "load") != "load" else _hook(node, "made", node)

    visit_Tuple = visit_Dict = visit_List

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        for part in (node, *node.ops):
            if not isinstance(part.expr, nodes.Const):
                part.expr = _hook(node, "compared", part.expr)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            return node
        bounds = (node.arg.start, node.arg.stop, node.arg.step)
        return _hook(node, "sliced", node.node, *(nodes.Const(None) if b is None else b for b in bounds))


def _hook(node: nodes.Node, method: str, *args: nodes.Expr) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(method), list(args), [], None, None, lineno=node.lineno)


def _walk(tree: nodes.Node) -> Iterator[nodes.Node]:
    pending = [tree]
    while pending:
        node = pending.pop()
        yield node
        pending.extend(node.iter_child_nodes())


def _size(node: nodes.Node) -> int:
    return sum(1 for _ in _walk(node))


def _check_name(name: Any) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"a namespace cannot hold the underscore name {name!r:.40}")


def _bounded_range(*args: int) -> range:
    values = range(*args)
    if len(values) > MAX_RANGE:
        raise TemplateRuntimeError(f"range of {len(values)} numbers; at most {MAX_RANGE} are allowed")
    return values


def _raise_exception(message: Any) -> None:
    raise TemplateError(str(message)[:MAX_MESSAGE_CHARS])


def _strftime_now(pattern: str) -> str:
    if len(pattern) > MAX_WIDTH or any(len(digits) > 2 for digits in DIGITS.findall(pattern)):
        raise TemplateRuntimeError("the pattern of strftime_now is too long or too wide")
    return datetime.now().strftime(pattern)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _same_text(value: Any) -> str:
    return str(value)


def _escape(value: Any) -> str:
    return str(markupsafe.escape(str(value)))
