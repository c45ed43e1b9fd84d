r"""Text in files -> units of work, a few MB each, always the same ones for the same bytes.

    --src FILE,DIR,-  --find_sources-->  files in order  --read_units-->  Unit, Unit, Unit ...

    .txt .text              documents: the file, or its lines
    .jsonl .ndjson .json    a record a line, the text in one field
    .parquet                a row a document, the text in one column (needs pyarrow)
    .tfrecord               tf.train.Examples: ready ids (int64), or text (bytes)
    any of them .gz .zst    unpacked on the way (.zst needs zstandard);  -  is the standard input

A unit ends where a document or line ends, except in a long text file: there it ends beside a line end where tokenising
can start anew (see `cut`). No torch. Test: pytest tests/unit/test_corpus.py
"""

import gzip
import importlib
import io
import json
import sys
import zlib
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from ..config import unknown_name
from .tfrecord import read_examples

KINDS = {
    **dict.fromkeys((".txt", ".text"), "txt"),
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "jsonl"),
    ".parquet": "parquet",
    **dict.fromkeys((".tfrecord", ".tfrecords"), "tfrecord"),
}
PACKED = (".gz", ".zst")
STDIN = "-"
LINES_A_BATCH = 1000  # datasets.map's batch: what one group of `--blocks cla` is made of
BOM = b"\xef\xbb\xbf"
CONTEXT, MAX_TRIES = 64, 20  # bytes on both sides that a cut is tried out with; places that are tried


class Source(NamedTuple):
    """One file. `name` is how messages and meta.json call it."""

    name: str
    path: Path | None  # None: the standard input
    kind: str  # txt | jsonl | parquet | tfrecord; "" is found out from the first bytes
    packed: str  # "", ".gz", ".zst"
    size: int  # bytes on the disk, 0 for the standard input


class Unit(NamedTuple):
    """What one worker gets at a time.

    text   bytes: a part of one document that is a whole file; `first` and `last` say which part
    lines  bytes: whole lines, each a document        jsonl   bytes: whole lines, each a record
    texts  list of documents (None: a bad row)        ids     list of int64 arrays"""

    source: int  # which of the sources
    kind: str
    payload: Any
    first: bool
    last: bool
    crc: int  # of the bytes read, or of the rows
    progress: int  # bytes of the file on the disk that are done with it


class Options(NamedTuple):
    """What of the build's settings matters to reading."""

    field: str = "text"
    documents: str = "file"  # of a .txt: file | lines
    batched: bool = False  # units of LINES_A_BATCH lines
    joins: Callable[[str, str], bool] = lambda left, right: True  # whether two texts have the ids of the two as one
    unit_bytes: int = 2**21


# --- which files ------------------------------------------------------------------------------------------------------


def find_sources(names: list[str], input_format: str = "auto") -> tuple[list[Source], list[Path]]:
    """Files as named, directories gone through in sorted order -> (sources, files of other kinds in those directories).

    ValueError: nothing there, an empty file, a kind that is not known."""
    sources: list[Source] = []
    passed_over: list[Path] = []
    for name in names:
        path = Path(name).expanduser()
        if name == STDIN:
            sources.append(Source("standard input", None, "" if input_format == "auto" else input_format, "", 0))
        elif path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.is_file())
            known = [p for p in files if kind_of(p)]
            passed_over += [p for p in files if not kind_of(p) and p.suffix != ".index"]
            if not known:
                raise ValueError(f"--src {name}: no file with text there (*{' *'.join(KINDS)}, also .gz, .zst)")
            sources += [source(p, input_format) for p in known]
        elif path.is_file():
            sources.append(source(path, input_format))
        else:
            raise ValueError(f"--src {name}: no such file or directory: correct the path")
    if len({s.name for s in sources}) < len(sources):
        twice = next(s.name for i, s in enumerate(sources) if s in sources[:i])
        raise ValueError(f"--src names {twice} twice: name it once (a larger weight is given at training)")
    return sources, passed_over


def source(path: Path, input_format: str) -> Source:
    kind = kind_of(path) or "" if input_format == "auto" else input_format
    if not kind:
        raise ValueError(f"{path}: unknown kind {path.suffix or 'without a suffix'}: say it with --input_format txt")
    if not path.stat().st_size:
        raise ValueError(f"{path}: an empty file: remove it, or leave it out of --src")
    packed = path.suffix.lower()
    return Source(str(path), path, kind, packed if packed in PACKED else "", path.stat().st_size)


def kind_of(path: Path) -> str | None:
    suffixes = [s.lower() for s in path.suffixes]
    return KINDS.get(suffixes[-2] if len(suffixes) > 1 and suffixes[-1] in PACKED else path.suffix.lower())


def open_source(source: Source) -> tuple[Any, Any]:
    """-> (the stream of its content, the file under it that says how far reading is)."""
    if source.path is None:
        return sys.stdin.buffer, None
    raw = open(source.path, "rb")
    if source.packed == ".gz":
        return gzip.GzipFile(fileobj=raw), raw
    if source.packed == ".zst":
        return io.BufferedReader(ZstdStream(raw, require("zstandard", source.name)), 2**20), raw
    return raw, raw


class ZstdStream(io.RawIOBase):
    """What a .zst file holds, frame after frame. The library's own reader takes a file that is cut off for a whole one."""

    def __init__(self, raw: BinaryIO, library: Any):
        self.raw, self.new, self.frame, self.ready = (
            raw,
            library.ZstdDecompressor().decompressobj,
            None,
            memoryview(b""),
        )

    def readable(self) -> bool:
        return True

    def readinto(self, into: Any) -> int:
        while not self.ready:
            rest = self.frame.unused_data if self.frame is not None and self.frame.eof else b""
            packed = rest or self.raw.read(2**17)
            if not packed:
                if self.frame is not None and not self.frame.eof:
                    raise EOFError("it ends inside a frame")
                return 0
            if self.frame is None or self.frame.eof:
                self.frame = self.new()
            self.ready = memoryview(self.frame.decompress(packed))
        count = min(len(into), len(self.ready))
        into[:count], self.ready = self.ready[:count], self.ready[count:]
        return count


def require(library: str, name: str) -> Any:
    try:
        return importlib.import_module(library)
    except ImportError:
        package = library.partition(".")[0]
        raise ValueError(f"{name} needs the package {package}: pip install {package}") from None


# --- reading ----------------------------------------------------------------------------------------------------------


def read_units(sources: list[Source], options: Options) -> Iterator[Unit]:
    """All units, file by file. ValueError names a file that is damaged, binary, empty, or lacks the field."""
    for number, source in enumerate(sources):
        stream, raw = open_source(source)
        done = 0
        try:
            for kind, payload, first, last in parts(source, stream, options):
                position = source.size if last or raw is None else min(raw.tell(), source.size)
                yield Unit(number, kind, payload, first, last, checksum(payload), max(0, position - done))
                done = max(done, position)
        except (OSError, EOFError, zlib.error) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the disk's, not the content's
            raise damaged(source, error) from None
        except Exception as error:
            if type(error).__module__.partition(".")[0] not in ("zstandard", "zstd", "pyarrow"):
                raise
            raise damaged(source, error) from None
        finally:
            if source.path is not None:
                stream.close()


def damaged(source: Source, error: Exception) -> ValueError:
    what = {".gz": "gzip file", ".zst": "zstd file"}.get(source.packed, f"{source.kind} file")
    return ValueError(f"{source.name}: not a whole {what} ({str(error).strip()}): fetch it again, or leave it out")


def checksum(payload: Any) -> int:
    """CRC-32 of a unit's bytes; of its rows each with its length, so that no row can move into the next."""
    if isinstance(payload, bytes):
        return zlib.crc32(payload)
    crc = 0
    for row in payload:
        data = b"" if row is None else row.encode("utf-8", "surrogatepass") if isinstance(row, str) else row.tobytes()
        crc = zlib.crc32(data, zlib.crc32(b"%d" % (-1 if row is None else len(data)), crc))
    return crc


def parts(source: Source, stream: Any, options: Options) -> Iterator[tuple[str, Any, bool, bool]]:
    """(kind, payload, first, last) of one file."""
    if source.kind == "parquet":
        found = parquet_rows(source, stream, options)
    elif source.kind == "tfrecord":
        found = examples(source, stream, options)
    else:
        found = text_parts(source, stream, options)
    before, first = next(found, None), True
    if before is None:
        raise ValueError(f"{source.name}: empty, nothing to read in it: remove it, or leave it out of --src")
    for following in chain(found, [None]):
        yield *before, first, following is None
        before, first = following, False


def text_parts(source: Source, stream: BinaryIO, options: Options) -> Iterator[tuple[str, bytes]]:
    head = stream.read(options.unit_bytes)
    zero = head.find(b"\0")
    if zero >= 0:
        raise ValueError(f"{source.name}: a binary file (a zero byte at {zero}), not UTF-8 text: convert or remove it")
    head = head.removeprefix(BOM)
    kind = source.kind or ("jsonl" if head.lstrip()[:1] == b"{" else "txt")
    if kind == "jsonl":
        head += stream.readline()
        check_field(source, head, options.field)
        yield from (("jsonl", piece) for piece in whole_lines(head, stream, options.unit_bytes))
    elif options.batched:
        yield from (("lines", piece) for piece in batches_of_lines(head, stream, options.unit_bytes))
    elif options.documents == "lines":
        head += stream.readline()
        yield from (("lines", piece) for piece in whole_lines(head, stream, options.unit_bytes))
    else:
        yield from (("text", piece) for piece in pieces(head, stream, options))


def whole_lines(head: bytes, stream: BinaryIO, size: int) -> Iterator[bytes]:
    while head:
        yield head
        head = stream.read(size) + stream.readline()


def batches_of_lines(head: bytes, stream: BinaryIO, size: int) -> Iterator[bytes]:
    """LINES_A_BATCH lines at a time, counted from the file's first."""
    lines = chain(io.BytesIO(head + stream.readline()), stream)
    while batch := [line for _, line in zip(range(LINES_A_BATCH), lines)]:
        yield b"".join(batch)


def pieces(head: bytes, stream: BinaryIO, options: Options) -> Iterator[bytes]:
    """A text in parts of about unit_bytes that end where tokenising can start anew (see `cut`)."""
    buffer = head
    while buffer:
        more = stream.read(options.unit_bytes)
        if not more:
            yield buffer
            return
        if len(buffer) >= options.unit_bytes:
            place = cut(buffer, options.joins) or last_character(buffer)
            yield buffer[:place]
            buffer = buffer[place:]
        buffer += more


def cut(buffer: bytes, joins: Callable[[str, str], bool]) -> int | None:
    """Where a part of a long text ends: the last place in its second half, beside a line end or else a space, or else
    between two characters, where the text before and the text after have the same ids apart as together; None: nowhere.
    White space all along one side tells nothing: its tokens depend on where it begins and ends."""
    for places in (beside(buffer, b"\n"), beside(buffer, b" "), between_characters(buffer)):
        sides = ((buffer[max(0, end - CONTEXT) : end], buffer[end : end + CONTEXT], end) for end in places)
        for left, right, end in islice((s for s in sides if s[0].strip() and s[1].strip()), 2 * MAX_TRIES):
            if joins(left.decode("utf-8", "ignore"), right.decode("utf-8", "ignore")):
                return end
    return None


def beside(buffer: bytes, mark: bytes) -> Iterator[int]:
    """The places after and before each mark in the second half, from the end on."""
    place = len(buffer) - CONTEXT
    while (place := buffer.rfind(mark, len(buffer) // 2, max(0, place))) > 0:
        yield from (place + 1, place)


def between_characters(buffer: bytes) -> Iterator[int]:
    """The places in the second half where a character begins, from the end on."""
    return (i for i in range(len(buffer) - CONTEXT, len(buffer) // 2, -1) if buffer[i] & 0xC0 != 0x80)


def last_character(buffer: bytes) -> int:
    """Where the last character ends that is whole."""
    place = len(buffer)
    while place > len(buffer) - 4 and buffer[place - 1] & 0xC0 == 0x80:  # a character's later bytes
        place -= 1
    return place - 1 if buffer[place - 1] >= 0xC0 else len(buffer)


def check_field(source: Source, head: bytes, field: str) -> None:
    """ValueError unless the first record that can be read has the field. A list of records is told apart."""
    if head.lstrip()[:1] == b"[":
        raise ValueError(f"{source.name}: a JSON list, not a record a line: write it as .jsonl (jq -c '.[]')")
    for number, line in enumerate(head.split(b"\n"), 1):
        try:
            record = json.loads(line) if line.strip() else None
        except ValueError:
            continue
        if isinstance(record, dict):
            return require_field(field, list(record), f"{source.name}:{number}")


def require_field(field: str, known: list[str], where: str) -> None:
    if field not in known:
        raise ValueError(f"--field {field}: {where}: {unknown_name('field', field, known or ['none'])}")


def parquet_rows(source: Source, stream: BinaryIO, options: Options) -> Iterator[tuple[str, list[str | None]]]:
    parquet = require("pyarrow.parquet", source.name)
    file = parquet.ParquetFile(stream if not source.packed else io.BytesIO(stream.read()))
    require_field(options.field, file.schema_arrow.names, source.name)
    rows: list[str | None] = []
    size = 0
    for batch in file.iter_batches(batch_size=1000, columns=[options.field]):
        rows += [row if isinstance(row, str) else None for row in batch.column(0).to_pylist()]
        size += batch.nbytes
        if size >= options.unit_bytes:
            yield "texts", rows
            rows, size = [], 0
    if rows:
        yield "texts", rows


def examples(source: Source, stream: BinaryIO, options: Options) -> Iterator[tuple[str, list]]:
    """Feature `field`, else "indices": int64 is ready ids, bytes are text, in one file either (ValueError)."""
    rows: list = []
    size, kind = 0, ""
    for number, features in enumerate(read_examples(stream, source.name)):
        name = options.field if options.field in features else "indices"
        require_field(name if name in features else options.field, list(features), f"{source.name}: record {number}")
        value = features[name]
        found = kind if not len(value) else "texts" if isinstance(value, list) else "ids"
        if found == "ids" and len(value) and value.dtype != "<i8":
            raise ValueError(f"{source.name}: record {number}: {name} holds fractions: name another with --field")
        if found != (kind or found):
            raise ValueError(
                f"{source.name}: record {number}: {name} holds {found}, and {kind} before it: write a file for each"
            )
        kind = found
        rows.append(value)
        size += sum(map(len, value)) if isinstance(value, list) else value.nbytes
        if size >= options.unit_bytes:
            yield EXAMPLES[kind](rows)
            rows, size = [], 0
    if rows:
        yield EXAMPLES[kind](rows)


def texts_of(rows: list) -> tuple[str, list[str | None]]:
    """Byte strings as texts; None where there are none, or no UTF-8 (a picture)."""

    def text(value: Any) -> str | None:
        try:
            return b"".join(value).decode() if len(value) else None
        except UnicodeDecodeError:
            return None

    return "texts", [text(value) for value in rows]


def ids_of(rows: list) -> tuple[str, list[np.ndarray]]:
    return "ids", [np.asarray(value, np.int64) for value in rows]


EXAMPLES = {"texts": texts_of, "ids": ids_of, "": ids_of}


def prompt_lines(path: str | Path, flag: str) -> list[str]:
    """The lines of a text that have something on them; only a line feed, or a carriage return and one, ends a line.

    ValueError names the flag."""
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8-sig")  # a byte order mark goes
    except UnicodeDecodeError as error:
        raise ValueError(f"{flag} {path}: byte {error.start} is not UTF-8: save it as UTF-8") from None
    return [line.removesuffix("\r") for line in text.split("\n") if line.strip()]
