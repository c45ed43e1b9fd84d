"""Flags from dataclasses, and the one place where a user's mistake becomes one line.

    argv -> fire (only splits) -> names checked -> strings converted by the field's type -> dataclasses -> main(*sections)

`fire` on its own runs the function before it reports an unknown flag and retypes values (`a,b` -> tuple, `007` -> 7), so it
gets a function that takes everything as raw strings, and all checks happen here, before any work.
"""

import dataclasses
import difflib
import json
import os
import re
import signal
import sys
import threading
import time
import types
import typing
from pathlib import Path
from typing import Any, Callable, Sequence

FLAG = re.compile(r"--|-[a-zA-Z]")  # what fire takes for a flag: -1e-5 is a value
TRUE, FALSE = {"true", "1", "yes", "on"}, {"false", "0", "no", "off"}


def flag(default: Any, help: str, choices: Sequence[str] | None = None) -> Any:
    """A dataclass field that is also a command-line flag: its default, its sentence in --help, its allowed values."""
    metadata = {"help": help, "choices": tuple(choices) if choices else None}
    if isinstance(default, (list, tuple, dict)):
        copy = dict if isinstance(default, dict) else list
        return dataclasses.field(default_factory=lambda: copy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def run(main: Callable, *sections: type, doc: str = "", argv: list[str] | None = None) -> Any:
    """Parses argv into one instance per dataclass in `sections`, calls `main(*instances)`, ends the process on a user's error.

    ValueError and OSError are the user's: one line, exit code 1. Anything else is ours: a traceback. Under torchrun the
    line goes to the launcher, which prints it once and last whatever number of ranks hit it."""
    argv = sys.argv[1:] if argv is None else argv
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        stop_with_launcher()
    try:
        instances = parse(argv, *sections, doc=doc)
        return main(*instances)
    except (ValueError, OSError) as error:
        fail(error)


def parse(argv: list[str], *sections: type, doc: str = "") -> list[Any]:
    """argv -> dataclass instances. Raises ValueError naming the flag; prints the help and exits 0 on --help."""
    fields = {f.name: f for section in sections for f in dataclasses.fields(section) if f.init}
    assert len(fields) == sum(len([f for f in dataclasses.fields(s) if f.init]) for s in sections), (
        "one flag in two sections"
    )
    if any(a in ("--help", "-h") for a in argv):
        print(help_text(sections, doc))
        raise SystemExit(0)
    types_ = {name: hint for section in sections for name, hint in typing.get_type_hints(section).items()}
    given = {
        name: convert(name, raw, types_[name], fields[name].metadata.get("choices"))
        for name, raw in split(argv, list(fields), switches(types_)).items()
    }
    instances = [
        section(**{f.name: given[f.name] for f in dataclasses.fields(section) if f.name in given})
        for section in sections
    ]
    for instance in instances:
        instance.given = frozenset(given)  # which flags were written out: they win over configuration files
    return instances


def switches(hints: dict[str, Any]) -> set[str]:
    """The flags that may stand alone, meaning true."""
    return {name for name, hint in hints.items() if hint is bool or bool in typing.get_args(hint)}


def split(argv: list[str], known: list[str], alone: set[str]) -> dict[str, str]:
    """argv -> {name: raw string}, through fire. Unknown flags and stray words are errors that name the nearest flag.

    A flag without a value is "true" if it is in `alone`, and an error if it is not."""
    import fire

    given: dict[str, str] = {}
    argv = [with_value(word, following, known, alone) for word, following in zip(argv, [*argv[1:], "--"])]

    @fire.decorators.SetParseFn(str)
    def collect(*words: str, **flags: str) -> None:
        if words:
            raise ValueError(
                f"{words[0]!r} is not a flag: write --name value, or --name=value where the value starts with a dash"
            )
        given.update(flags)

    if argv:
        fire.Fire(collect, command=[*argv, "--", "--separator=\x00"])  # or a lone "-" would end the arguments
    for name in given:
        if name not in known:
            raise ValueError(unknown_name("flag", f"--{name}", [f"--{k}" for k in known]))
    return given


def with_value(word: str, following: str, known: list[str], alone: set[str]) -> str:
    """A flag that no value follows, with one. (fire would take --norm_tuning alone for rm_tuning set to false.)"""
    if word == "--":
        raise ValueError("'--' is not a flag: write --name value")
    if not FLAG.match(word) or "=" in word or not FLAG.match(following):
        return word
    name = word.lstrip("-").replace("-", "_")
    if name in known and name not in alone:
        raise ValueError(
            f"--{name} has no value: write --{name} value, or --{name}=value where the value starts with a dash"
        )
    return f"{word}=true"


def unknown_name(kind: str, name: str, known: Sequence[str]) -> str:
    """'unknown KIND NAME', with the nearest known one or, without a near one, where to look."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    shown = name if name.isprintable() and len(name) <= 100 else ascii(name[:100])  # it may come from a file
    return f"unknown {kind} {shown}: " + (
        f"did you mean {near[0]}?"
        if near
        else "--help lists them all"
        if kind == "flag"
        else f"known: {', '.join(known)}"
    )


def convert(name: str, raw: str, hint: Any, choices: Sequence[str] | None = None) -> Any:
    """One raw string by the field's type: str, int, float, bool, comma-separated list of those, any of them or None ('none')."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        if raw.lower() in ("none", "null", ""):
            return None
        hint = next(h for h in typing.get_args(hint) if h is not type(None))
    try:
        if typing.get_origin(hint) is list:
            return [
                convert(name, part.strip(), typing.get_args(hint)[0], choices)
                for part in raw.split(",")
                if part.strip()
            ]
        if typing.get_origin(hint) is dict:
            pairs = [part.strip().rpartition("=") for part in raw.split(",") if part.strip()]
            if not all(key for key, _, _ in pairs):
                raise ValueError(f"--{name} {raw}: expected name=value pairs with commas between")
            return {key: convert(name, value, typing.get_args(hint)[1]) for key, _, value in pairs}
        if hint is bool:
            if raw.lower() not in TRUE | FALSE:
                raise ValueError
            value: Any = raw.lower() in TRUE
        else:
            value = hint(raw)
            if hint is float and value != value:
                raise ValueError
    except ValueError as error:
        if str(error).startswith("--"):
            raise
        article = {int: "a whole number", float: "a number", bool: "true or false"}.get(hint, str(hint))
        raise ValueError(f"--{name} {raw}: not {article}") from None
    if choices and value not in choices:
        raise ValueError(f"--{name} {raw}: choose one of {', '.join(choices)}")
    return value


def help_text(sections: Sequence[type], doc: str) -> str:
    """Every flag of every section, with its default, allowed values and meaning."""
    lines = [doc.strip(), ""] if doc else []
    for section in sections:
        lines.append((section.__doc__ or section.__name__).strip().splitlines()[0])
        for f in dataclasses.fields(section):
            if not f.init:
                continue
            default = f.default_factory() if f.default is dataclasses.MISSING else f.default  # type: ignore[misc]
            shown = ",".join(map(str, default)) if isinstance(default, list) else default
            choices = f.metadata.get("choices")
            values = " {" + ",".join(choices) + "}" if choices else ""
            lines.append(f"  --{f.name}{values}  (default: {shown if shown not in ('', None, {}) else 'none'})")
            lines.append(f"        {f.metadata.get('help', '')}")
        lines.append("")
    return "\n".join(lines)


def run_tool(function: Callable, argv: list[str] | None = None) -> Any:
    """A tool's command line from a function's keyword parameters (str, int, float, bool, X | None); its docstring is --help."""
    hints = typing.get_type_hints(function)
    code, names = (
        function.__code__,
        function.__code__.co_varnames[: function.__code__.co_argcount + function.__code__.co_kwonlyargcount],
    )
    defaults = dict(
        zip(names[code.co_argcount - len(function.__defaults__ or ()) : code.co_argcount], function.__defaults__ or ())
    )
    defaults |= function.__kwdefaults__ or {}
    if argv is None:  # a process of its own: one that is asked to stop takes away what it has half written
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        sys.unraisablehook = _stop_again
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # Ctrl-C; not where a shell has it ignored
            signal.signal(signal.SIGINT, signal.getsignal(signal.SIGTERM))
        argv = sys.argv[1:]
    if any(a in ("--help", "-h") for a in argv):
        shown = " ".join(
            f"--{n} {hints[n].__name__.upper()}" if n not in defaults else f"[--{n} {defaults[n]}]" for n in names
        )
        print(f"{Path(sys.argv[0]).name} {shown}\n\n{function.__doc__ or ''}")
        raise SystemExit(0)
    try:
        given = {
            name: convert(name, raw, hints[name]) for name, raw in split(argv, list(names), switches(hints)).items()
        }
        missing = [n for n in names if n not in defaults and n not in given]
        if missing:
            raise ValueError(f"--{missing[0]} is missing: --help shows what this tool takes")
        return function(**given)
    except (ValueError, OSError) as error:
        fail(error)


def _stop_again(lost: Any) -> None:
    """sys.unraisablehook: where a signal came in a callback whose exceptions Python drops (the import system has one for every
    module), the process would go on; so it is told once more, out of the callback."""
    stops = {128 + number: number for number in (signal.SIGTERM, signal.SIGINT)}
    if isinstance(lost.exc_value, SystemExit) and lost.exc_value.code in stops:
        threading.Timer(0.01, os.kill, (os.getpid(), stops[lost.exc_value.code])).start()
    else:
        sys.__unraisablehook__(lost)


def stop_with_launcher() -> None:
    """Where the launcher is killed its ranks are told to stop (and save), or they would train on with nobody to end them, and hold
    the GPUs and the run's directory."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def leave_unfinished() -> None:
    """Ends the process of a run that was stopped by a signal and has saved: not with 0, or what waits for it would take it for
    finished. Under torchrun the launcher answers for the code, and a rank that fails would be started again: it finds a file, since
    it may be another node's that was told to stop."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        sys.exit(128 + signal.SIGTERM)
    if "ACCESSORY_UNFINISHED" in os.environ:
        Path(os.environ["ACCESSORY_UNFINISHED"]).touch()


def fail(error: BaseException) -> None:
    """Ends this process with the error's one line and exit code 1; under torchrun the launcher prints it, once for all ranks."""
    where = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
    message = f"error: {where}"
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if error_file:  # the format that torch.distributed.elastic reads back
        record = {"message": {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}}
        Path(error_file).write_text(json.dumps(record))
    else:
        print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)  # not sys.exit: destructors of process groups may wait for peers that are gone
