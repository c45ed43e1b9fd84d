"""DST.part: a build on its way. What is finished in it counts after a kill, and nothing else does.

    DST.part/settings.json   what is built from what: a continuation must ask for the same
    DST.part/journal.jsonl   a line a finished unit: where its ids end in the files, and the CRCs of its input and output
    DST.part/tokens.bin ...  see store.py; whatever is beyond the last whole journal line is cut off and done again
    DST.part/meta.json       everything is done; what is missing is the new name

Files grow first, then the journal. No torch. Test: pytest tests/unit/test_corpus.py
"""

import fcntl
import json
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .. import log
from . import store, tfrecord
from .corpus_encode import CorpusArgs, Encoded
from .readers import Source, Unit

SHOWN = 5  # bad lines that are printed; all are in the report
FEW = 1000  # lines before a share of bad ones means anything
REPORT, SETTINGS, JOURNAL, LOCK, RECORDS = "bad_lines.txt", "settings.json", "journal.jsonl", "lock", "corpus.tfrecord"


class Work:
    """DST.part: the files that grow, the journal, and the counts that go with them. One process at a time."""

    def __init__(self, args: CorpusArgs, settings: dict[str, Any], sources: list[Source]):
        self.args, self.settings, self.sources = args, settings, sources
        self.dst, self.dtype = Path(args.dst), store.token_dtype(settings["tokenizer"]["vocab_size"])
        self.part = self.dst.with_name(self.dst.name + ".part")
        self.part.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.part / LOCK, "w")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{self.part}: another build is writing it: wait for it, or choose another --dst"
            ) from None
        self.check_settings()
        self.tokens = self.documents = self.lines = self.bad = self.last_end = 0
        self.line_of_source = [0] * len(sources)
        self.crcs = [0] * len(sources)
        self.files = {n: open(self.part / n, "ab") for n in (store.TOKENS, store.ENDS)}
        self.entries = self.replay()
        self.journal = open(self.part / JOURNAL, "ab")

    def check_settings(self) -> None:
        """The same build as the one that is half done here, or none is."""
        wanted = self.settings | {"sources": [s.name for s in self.sources]}
        path, journal, finished = (self.part / name for name in (SETTINGS, JOURNAL, store.META))
        begun = finished.is_file() or (journal.is_file() and journal.stat().st_size > 0)
        if path.is_file() and begun:
            then = json.loads(path.read_bytes())
            if then != wanted:
                what = difference(self.settings, then) or "other sources"
                raise ValueError(f"{self.part} was begun with other settings ({what}): give the same, or remove it")
        elif not finished.is_file():
            for leftover in (JOURNAL, store.TOKENS, store.ENDS):
                (self.part / leftover).unlink(missing_ok=True)
            write_json(path, wanted)

    def replay(self) -> list[dict[str, Any]]:
        """Goes through the journal as far as the files bear it out, and cuts journal and files off there."""
        path, good, size = self.part / JOURNAL, [], 0
        with open(self.part / store.TOKENS, "rb") as tokens, open(self.part / store.ENDS, "rb") as ends:
            for line in path.read_bytes().splitlines(keepends=True) if path.is_file() else ():
                try:
                    entry = json.loads(line)
                    count, documents = entry["tokens"], entry["documents"]
                except (ValueError, KeyError):
                    break
                written = tokens.read(count * self.dtype.itemsize), ends.read(documents * 8)
                if not line.endswith(b"\n") or zlib.crc32(written[1], zlib.crc32(written[0])) != entry["written"]:
                    break
                good.append(entry)
                size += len(line)
                self.count(entry)
                if documents:
                    self.last_end = int(np.frombuffer(written[1][-8:], "<i8")[0])
        if path.is_file():
            os.truncate(path, size)
        self.files[store.TOKENS].truncate(self.tokens * self.dtype.itemsize)
        self.files[store.ENDS].truncate(self.documents * 8)
        return good

    def count(self, entry: dict[str, Any]) -> None:
        source = entry["source"]
        self.tokens += entry["tokens"]
        self.documents += entry["documents"]
        self.lines += entry["lines"]
        self.bad += len(entry["bad"])
        self.line_of_source[source] += entry["lines"]
        self.crcs[source] = zlib.crc32(entry["crc"].to_bytes(4, "little"), self.crcs[source])

    def skipped(self, units: Iterator[Unit], update: Callable[[int], Any]) -> Iterator[Unit]:
        """The units that are not done yet. ValueError where a finished one does not read as it did."""
        for number, entry in enumerate(self.entries):
            unit = next(units, None)  # None: a file that was cut off just where a unit began
            if unit is None or (unit.source, unit.crc) != (entry["source"], entry["crc"]):
                raise ValueError(self.changed(entry["source"], number))
            update(unit.progress)
        yield from units

    def changed(self, source: int, unit: int) -> str:
        return (
            f"{self.sources[source].name} was changed after {self.part} was begun (unit {unit}): remove that directory to "
            "build anew"
        )

    def append(self, unit: Unit, encoded: Encoded) -> None:
        """Writes a unit's ids, then the journal's line that makes them count. ValueError at too many bad lines."""
        ends = self.recut(unit, encoded) if self.args.blocks == "minima" else encoded.ends + self.tokens
        tokens, ends_ = encoded.tokens.tobytes(), ends.astype("<i8").tobytes()
        for name, data in ((store.TOKENS, tokens), (store.ENDS, ends_)):
            self.files[name].write(data)
            self.files[name].flush()
        first = self.line_of_source[unit.source] + 1
        entry = {"source": unit.source, "crc": unit.crc, "tokens": len(encoded.tokens), "documents": len(ends)}
        entry |= {"lines": encoded.lines, "written": zlib.crc32(ends_, zlib.crc32(tokens))}
        entry["bad"] = [(first + line, reason) for line, reason in encoded.bad]
        self.journal.write(json.dumps(entry).encode() + b"\n")
        self.journal.flush()
        for line, reason in entry["bad"][: max(0, SHOWN - self.bad)]:
            log.say(f"left out: {self.sources[unit.source].name}:{line}: {reason}")
        self.count(entry)
        self.entries.append(entry)
        self.last_end = int(ends[-1]) if len(ends) else self.last_end
        self.check_bad(at_end=False)

    def recut(self, unit: Unit, encoded: Encoded) -> np.ndarray:
        """MiniMA's examples: the stream of a file cut every block_size ids, a shorter one at its end."""
        stop, size = self.tokens + len(encoded.tokens), self.args.block_size
        ends = list(range(self.last_end + size, stop + 1, size))
        if unit.last and stop > (ends[-1] if ends else self.last_end):
            ends.append(stop)
        return np.array(ends, np.int64)

    def check_bad(self, at_end: bool) -> None:
        args, enough = self.args, at_end or self.lines >= FEW
        too_many, too_large = self.bad > args.max_bad_lines, enough and self.bad > args.max_bad_share * self.lines
        if self.bad and (too_many or too_large):
            self.write_report()
            name, limit = ("max_bad_lines", args.max_bad_lines) if too_many else ("max_bad_share", args.max_bad_share)
            raise ValueError(
                f"{self.bad} of {self.lines} lines could not be read, more than --{name} {limit}: they are listed in "
                f"{self.part / REPORT}; repair them, or raise it to leave them out"
            )

    def check_end(self) -> None:
        self.check_bad(at_end=True)
        if not self.documents:
            raise ValueError(f"--src {','.join(self.args.src)}: not one document in it: name other files")

    def write_report(self) -> None:
        names = [s.name for s in self.sources]
        lines = [f"{names[e['source']]}:{line}: {reason}\n" for e in self.entries for line, reason in e["bad"]]
        (self.part / REPORT).write_text("".join(lines), encoding="utf-8")

    def is_finished(self) -> bool:
        """Killed between writing meta.json and renaming the directory."""
        path = self.part / store.META
        return path.is_file() and not difference(self.settings, json.loads(path.read_bytes()))

    def publish(self) -> dict[str, Any]:
        """DST.part with everything in it and on the disk -> DST."""
        if not self.is_finished():
            self.finish()
        meta = json.loads((self.part / store.META).read_bytes())
        for name in (JOURNAL, SETTINGS, LOCK):
            (self.part / name).unlink(missing_ok=True)
        sync(self.part)
        os.replace(self.part, self.dst)
        sync(self.dst.parent)
        return meta

    def finish(self) -> None:
        """meta.json, the report, and for --format tfrecord the records in place of the store."""
        self.close()
        (self.part / REPORT).unlink(missing_ok=True)
        if self.bad:
            self.write_report()
        if self.args.format == "tfrecord":
            self.write_records()
        content = sorted(p.name for p in self.part.iterdir() if p.name not in (JOURNAL, SETTINGS, LOCK, store.META))
        for name in content:
            sync(self.part / name)
        files = {n: {"bytes": (self.part / n).stat().st_size, "sha256": store.sha256(self.part / n)} for n in content}
        counts = {"tokens": self.tokens, "documents": self.documents, "lines": self.lines, "bad_lines": self.bad}
        sources = [{"name": s.name, "bytes": s.size, "crc": crc} for s, crc in zip(self.sources, self.crcs)]
        about = {"format": store.FORMAT, "version": store.VERSION, "dtype": self.dtype.str[1:]} | counts
        write_json(self.part / store.META, about | self.settings | {"files": files, "sources": sources})

    def write_records(self) -> None:
        """Each document, or block, as one example {"indices": ids}."""
        shape = {store.TOKENS: (self.dtype, self.tokens), store.ENDS: (np.dtype("<i8"), self.documents)}
        tokens, ends = (store.mapped(self.part, name, *shape[name]) for name in (store.TOKENS, store.ENDS))
        with tfrecord.Writer(self.part / RECORDS) as writer:
            start = 0
            for end in ends.tolist():
                writer.write({"indices": tokens[start:end]})
                start = end
        for name in (store.TOKENS, store.ENDS):
            (self.part / name).unlink()

    def close(self) -> None:
        for file in (*self.files.values(), self.journal):
            file.close()

    def __enter__(self) -> "Work":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        self.lock.close()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Written whole or not at all."""
    part = path.with_name(path.name + ".new")
    part.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    sync(part)
    os.replace(part, path)


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def difference(settings: dict[str, Any], then: dict[str, Any]) -> str:
    """The first setting that is not what it was, in words; empty where all are equal."""
    for part, values in settings.items():
        for key, value in values.items():
            if then.get(part, {}).get(key) != value:
                return f"{key} {then.get(part, {}).get(key)} then, {value} now"
    return ""
