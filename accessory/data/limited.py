"""Jinja for templates that nobody here wrote: they can put texts together, for a bounded time, and nothing else.

    transformers' dialect   trim_blocks, lstrip_blocks, break and continue, {% generation %}, raise_exception, tojson
    no way out              Jinja's immutable sandbox, no imports or includes, the filters and string methods below only
    steps                   every turn of a loop, call and item of a range counts: STEPS a rendering, SECONDS by the clock
    sizes                   a text or list has TEXT characters or items at most, a rendering writes as many; MADE in all

Test: pytest tests/unit/test_chat_template.py
"""

import functools
import inspect
import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from typing import Any

STEPS, TEXT, MADE, SECONDS = 100_000, 2**22, 2**27, 10.0
FILTERS = (
    *(
        "abs",
        "capitalize",
        "count",
        "d",
        "default",
        "dictsort",
        "e",
        "escape",
        "first",
        "float",
        "int",
        "items",
        "join",
    ),
    *("last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "replace", "reverse", "round"),
    *("safe", "select", "selectattr", "sort", "string", "title", "tojson", "trim", "unique", "upper"),
)
STRING_METHODS = (
    *("capitalize", "casefold", "count", "endswith", "find", "index", "isalnum", "isalpha", "isdigit", "islower"),
    *("isnumeric", "isspace", "isupper", "join", "lower", "lstrip", "partition", "removeprefix", "removesuffix"),
    *("replace", "rfind", "rindex", "rpartition", "rsplit", "rstrip", "split", "splitlines", "startswith", "strip"),
    *("title", "upper"),
)
_budget = threading.local()


class LimitReached(Exception):
    """A template took more than it may."""


class Template:
    """A compiled template. `where`: what an error begins with."""

    def __init__(self, source: str, where: str, functions: dict[str, Callable]):
        import jinja2

        self.where = where
        try:
            env = environment()
            tree = prepared(env.parse(source))
            self.template = jinja2.Template.from_code(env, env.compile(tree), env.make_globals(functions))
        except Exception as error:  # whatever it does is the template's fault
            raise ValueError(f"{where} is not usable: {one_line(error)}") from None

    def render(self, variables: dict[str, Any], marks: tuple[str, str]) -> str:
        """The text. ValueError: it failed, or reached a limit. marks: around {% generation %} blocks."""
        _budget.steps, _budget.written, _budget.made = STEPS, 0, 0
        _budget.until, _budget.marks = time.monotonic() + SECONDS, marks
        try:
            return self.template.render(variables)
        except Exception as error:
            raise ValueError(f"{self.where}: {one_line(error)}") from None


def one_line(error: BaseException) -> str:
    return " ".join(f"{error or type(error).__name__}".split())[:300]


def spend(steps: int = 1) -> None:
    _budget.steps -= steps
    if _budget.steps < 0 or time.monotonic() > _budget.until:
        raise LimitReached("it runs without end, or far too long")


def make(size: int) -> None:
    """Before a text or list of so many characters or items is made."""
    _budget.made += size
    if size > TEXT or _budget.made > MADE:
        raise LimitReached("it makes a text without end, or far too long")


def sized(value: Any) -> Any:
    if isinstance(value, (str, list, tuple)):
        make(len(value) if isinstance(value, str) else 8 * len(value))
    return value


def measured(filter: Callable) -> Callable:
    @functools.wraps(filter)  # also keeps what Jinja notes on a filter that takes the context
    def run(*args: Any, **kwargs: Any) -> Any:
        spend()
        return sized(filter(*args, **kwargs))

    return run


def each(values: Iterable) -> Iterator:
    for value in values:
        spend()
        yield value


def bounded_range(*args: int) -> range:
    found = range(*args)
    spend(len(found))
    return found


def replaced(text: Any, old: Any, new: Any, count: int = -1) -> str:
    text, old, new = str(text), str(old), str(new)
    make(len(text) + text.count(old) * len(new))
    return text.replace(old, new, -1 if count is None else count)


def joined(values: Iterable, separator: Any = "", attribute: Any = None) -> str:
    values = [str(v if attribute is None else v[attribute]) for v in values]
    make(sum(map(len, values)) + len(str(separator)) * len(values))
    return str(separator).join(values)


def tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False):
    """As transformers has it: Jinja's own escapes HTML."""
    if indent is not None and not (isinstance(indent, int) and 0 <= indent <= 16):
        raise LimitReached("tojson: indent is a number up to 16")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def clock(today: datetime) -> Callable[[str], str]:
    def strftime_now(format: str) -> str:
        if len(format) > 64 or re.search(r"\d", format):  # a width
            raise LimitReached("strftime_now: a format of letters, such as %d %b %Y")
        return today.strftime(format)

    return strftime_now


def raise_exception(message: Any) -> None:
    import jinja2

    raise jinja2.TemplateError(str(message))


def prepared(tree: Any) -> Any:
    """The syntax tree with every loop counted, every `~` and every text of its own measured."""
    from jinja2 import nodes
    from jinja2.visitor import NodeTransformer

    class Counted(NodeTransformer):
        def visit_For(self, node: Any) -> Any:
            self.generic_visit(node)
            node.iter = nodes.Filter(node.iter, "each_", [], [], None, None, lineno=node.lineno)
            return node

        def visit_Concat(self, node: Any) -> Any:
            self.generic_visit(node)
            items = nodes.List(node.nodes, lineno=node.lineno)
            return nodes.Filter(items, "joined_", [], [], None, None, lineno=node.lineno)

        def visit_TemplateData(self, node: Any) -> Any:
            return nodes.Const(node.data, lineno=node.lineno)

    return Counted().visit(tree)


@functools.cache
def environment() -> Any:
    """The one environment of all templates."""
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    if tuple(int(n) for n in re.findall(r"\d+", jinja2.__version__)[:3]) < (3, 1, 6):
        raise ValueError(f"jinja2 {jinja2.__version__} has holes in its sandbox: pip install -U jinja2")

    class Generation(Extension):
        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("marked"), [], [], body).set_lineno(line)

        def marked(self, caller: Callable) -> str:
            return caller().join(_budget.marks)

    class Limited(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(["+", "*", "**", "%"])

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            lengths = [len(v) if isinstance(v, (str, list, tuple)) else 1 for v in (left, right)]
            numbers = [abs(v) if isinstance(v, (int, float)) else 1 for v in (left, right)]
            if max(numbers) > 2**64 or operator == "**" and numbers[1] > 64:
                raise LimitReached("it makes a number without end, or far too large")
            if operator == "*" and any(isinstance(v, (str, list, tuple)) for v in (left, right)):
                make(int(max(lengths[0] * numbers[1], lengths[1] * numbers[0])))
            if operator == "%" and isinstance(left, str) and re.search(r"\d{4}|\*", left):
                raise LimitReached("it formats with a width that is far too large")
            make(sum(lengths))
            return super().call_binop(context, operator, left, right)

        def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
            spend()
            owner, name = getattr(inspect.unwrap(obj), "__self__", None), getattr(obj, "__name__", "")
            if isinstance(owner, str):
                plain = name == "format" and not re.search(r"\d{4}|\{[^{}]*[{.\[]", owner)
                if name not in STRING_METHODS and not plain:
                    raise LimitReached(f"the text method {name} is not for templates")
                if name in ("replace", "join"):
                    return replaced(owner, *args) if name == "replace" else joined(*args, separator=owner)
            return sized(super().call(context, obj, *args, **kwargs))

    class Namespace(jinja2.utils.Namespace):
        def __init__(*args: Any, **kwargs: Any) -> None:
            self, *rest = args
            attributes = dict(*rest, **kwargs)
            for name in attributes:
                Namespace._allow(name)
            jinja2.utils.Namespace.__init__(self, attributes)

        def __setitem__(self, name: str, value: Any) -> None:
            Namespace._allow(name)
            jinja2.utils.Namespace.__setitem__(self, name, value)

        @staticmethod
        def _allow(name: Any) -> None:
            if str(name).startswith("_"):
                raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name}")

    @jinja2.pass_context
    def finalize(context: Any, value: Any) -> Any:
        text = str(value)
        _budget.written += len(text)
        if _budget.written > TEXT:
            raise LimitReached("it writes a text without end, or far too long")
        return text

    options = {"trim_blocks": True, "lstrip_blocks": True, "extensions": [Generation, loopcontrols]}
    env = Limited(**options, optimized=False, finalize=finalize)  # optimized: would compute constants without limits
    env.filters = {name: measured(env.filters[name]) for name in FILTERS}
    env.filters |= {"each_": each, "joined_": joined, "join": joined, "replace": replaced, "tojson": measured(tojson)}
    functions = {"range": bounded_range, "raise_exception": raise_exception}
    env.globals = functions | {"dict": lambda *a, **k: dict(*a, **k), "namespace": Namespace}
    return env
