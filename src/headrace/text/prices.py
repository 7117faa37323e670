"""What calls from a chat template cost beyond the reading of their arguments: those that make more than they were
given, or search, or sort. Each function takes the budget, then the arguments as the template gives them, and raises
before the call where an argument that steers the size of the result is out of range."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jinja2.exceptions import TemplateRuntimeError

from .budget import Budget

MAX_INT_BITS = 128
MAX_WIDTH = 1000  # of padding and indentation
MAX_NUMBER_CHARS = 400

DIGITS = re.compile(r"\d+")
_CONVERSION = re.compile(r"%(?:\([^)]*\))?[#0 +-]*(\*|\d+)?(?:\.(\*|\d+))?")
_SPACES = "\t\n\v\f\r\x1c\x1d\x1e\x1f \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(
    map(chr, range(0x2000, 0x200B))
)


def pay_percent(budget: Budget, text: Any, *args: Any, **kwargs: Any) -> None:
    check_widths(width for pair in _CONVERSION.findall(str(text)) for width in pair if width)
    characters, items, _ = budget.read(args, kwargs)
    budget.write(len(str(text)) + str(text).count("%") * (2 * characters + 4 * items + MAX_WIDTH))


def _pay_json(
    budget: Budget,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> None:
    if indent is not None:
        check_widths([str(indent)])
    between = sum(map(len, separators or ()))
    characters, items, depth = budget.read(value)
    budget.spend(20 * characters if sort_keys else 0)
    budget.write(characters * (6 if ensure_ascii else 2) + items * (8 + between + (indent or 0) * depth))


def _pay_text(budget: Budget, text: Any, *args: Any, **kwargs: Any) -> None:
    """At most twice the text, but for rare letters; a set of characters is searched for every character."""
    steering = sum(len(a) for a in (*args, *kwargs.values()) if isinstance(a, str))
    size = len(text) if isinstance(text, str) else 0
    budget.spend(size * steering // 8)
    budget.write(2 * size)


def _pay_words(budget: Budget, text: Any) -> None:
    budget.write(len(str(text)), len(str(text)) // 2)


def _pay_escape(budget: Budget, text: Any) -> None:
    budget.write(5 * len(str(text)))


def _pay_search(budget: Budget, text: str, *args: Any, **kwargs: Any) -> None:
    budget.spend(len(text) * sum(len(a) for a in args if isinstance(a, str)) // 16)


def _pay_replace(budget: Budget, text: Any, old: str, new: str, count: int | None = None) -> None:
    text = str(text)
    _pay_search(budget, text, old)
    found = text.count(old)
    if count is not None and count >= 0:
        found = min(found, count)
    budget.write(len(text) + found * max(0, len(new) - len(old)))


def _pay_split(budget: Budget, text: str, sep: str | None = None, maxsplit: int = -1) -> None:
    budget.spend(len(text) * (len(sep) if sep else len(_SPACES)) // 8)
    found = text.count(sep) if sep else sum(map(text.count, _SPACES))
    budget.write(len(text), 1 + (min(found, maxsplit) if maxsplit >= 0 else found))


def _pay_join(budget: Budget, separator: str, values: Any) -> None:
    characters, items, _ = budget.read(values)
    items = max(items, len(values) if hasattr(values, "__len__") else 0)
    budget.write(2 * characters + items * (4 + len(separator)))


def _pay_join_filter(budget: Budget, value: Any, d: Any = "", attribute: Any = None) -> None:
    _pay_join(budget, str(d), value)


def _pay_indent(budget: Budget, s: str, width: int | str = 4, first: bool = False, blank: bool = False) -> None:
    size = len(width) if isinstance(width, str) else width
    check_widths([str(size)])
    lines = 1 + sum(map(str(s).count, _SPACES))
    budget.write(len(str(s)) + lines * (1 + size), lines)


def _pay_copy(budget: Budget, value: Any, *args: Any, **kwargs: Any) -> None:
    budget.write(0, len(value) if hasattr(value, "__len__") else 0)


def _pay_sort(budget: Budget, value: Any, *args: Any, **kwargs: Any) -> None:
    _pay_copy(budget, value)
    characters, _, _ = budget.read(value)
    budget.spend(20 * characters)  # each is compared about log2(items) times


def _pay_batch(budget: Budget, value: Any, linecount: int, fill_with: Any = None) -> None:
    check_widths([str(linecount)])
    budget.write(0, linecount)


def _pay_round(budget: Budget, value: Any, precision: int = 0, method: str = "common") -> None:
    if abs(precision) > 100:
        raise TemplateRuntimeError(f"round to {precision:.0f} places; at most 100 are allowed")


def _pay_number(budget: Budget, value: Any, *args: Any, **kwargs: Any) -> None:
    if isinstance(value, str) and len(value) > MAX_NUMBER_CHARS:
        raise TemplateRuntimeError(f"a number of {len(value)} characters; at most {MAX_NUMBER_CHARS} are allowed")


def _pay_sum(budget: Budget, iterable: Any, attribute: Any = None, start: Any = 0) -> None:
    if not isinstance(start, (int, float)):
        raise TemplateRuntimeError("sum adds numbers only in a chat template")


def check_widths(widths: Iterable[str]) -> None:
    for width in widths:
        if not width.isdecimal() or len(width) > 9 or int(width) > MAX_WIDTH:
            raise TemplateRuntimeError(f"a width or count of {width:.20}; at most {MAX_WIDTH} is allowed")


def check_bits(bits: int) -> None:
    if bits > MAX_INT_BITS:
        raise TemplateRuntimeError(f"an integer of {bits} bits; at most {MAX_INT_BITS} are allowed")


_CASES = ("capitalize", "casefold", "lower", "swapcase", "title", "upper")
_STRIPS = ("lstrip", "removeprefix", "removesuffix", "rstrip", "strip")
_SEARCHES = ("count", "endswith", "find", "index", "rfind", "rindex", "startswith")

METHOD_GROWTH: Mapping[str, Callable[..., None]] = {
    **dict.fromkeys((*_CASES, *_STRIPS, "partition", "rpartition"), _pay_text),
    **dict.fromkeys(_SEARCHES, _pay_search),
    **dict.fromkeys(("split", "rsplit"), _pay_split),
    "splitlines": lambda budget, text, keepends=False: _pay_split(budget, text),
    "join": _pay_join,
    "replace": _pay_replace,
}

FILTER_GROWTH: Mapping[str, Callable[..., None]] = {
    **dict.fromkeys(("capitalize", "lower", "trim", "truncate", "upper"), _pay_text),
    **dict.fromkeys(("title", "wordcount"), _pay_words),
    **dict.fromkeys(("e", "escape"), _pay_escape),
    **dict.fromkeys(("list", "reverse"), _pay_copy),
    **dict.fromkeys(("dictsort", "sort"), _pay_sort),
    **dict.fromkeys(("float", "int"), _pay_number),
    "batch": _pay_batch,
    "format": pay_percent,
    "indent": _pay_indent,
    "join": _pay_join_filter,
    "replace": _pay_replace,
    "round": _pay_round,
    "sum": _pay_sum,
    "tojson": _pay_json,
}
