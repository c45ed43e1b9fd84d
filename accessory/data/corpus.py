"""Text -> token store, with several processes; killed, it goes on where it was.

    sources --readers.py--> units --N workers, corpus_encode.py--> ids, in order --corpus_work.py--> DST.part/ --rename--> DST/

The bytes of the store depend on the sources, the tokenizer and the settings, not on the number of processes or on kills.
A continuation reads the finished units again (no tokenising) and notices text that was changed meanwhile.

A document longer than a unit is tokenised in parts, cut at line ends where the parts' ids are the ids of the whole: each
place is tried out with the text around it. So memory does not grow with a file.

No torch, here and in what this imports: a worker is small and starts at once. Test: pytest tests/unit/test_corpus.py
"""

import contextlib
import json
import multiprocessing
import os
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from .. import log
from ..tokenizer import Tokenizer
from . import store
from .corpus_encode import CorpusArgs, Encoded, Encoder, start_worker, work
from .corpus_work import Work, difference
from .readers import Options, Source, Unit, find_sources, read_units

__all__ = ["CorpusArgs", "build"]


def build(args: CorpusArgs, show_progress: bool = False) -> dict[str, Any]:
    """Builds args.dst, or goes on with it, or finds it up to date. -> its meta.json.

    ValueError in one line: bad sources, another build in args.dst, too many bad lines."""
    encoder = Encoder(args)
    sources, passed_over = find_sources(args.src, args.input_format)
    if args.blocks == "cla" and any(s.kind not in ("txt", "") for s in sources):
        raise ValueError("--blocks cla is for lines of .txt files: give those only, or leave --blocks out")
    if passed_over:
        log.say(f"{len(passed_over)} file(s) of other kinds left out, the first: {passed_over[0]}")
    settings = settings_of(args, encoder.tokenizer)
    units = read_units(
        sources, Options(args.field, args.documents, args.blocks == "cla", encoder.joins, args.unit_bytes)
    )
    if Path(args.dst).exists():
        return up_to_date(args, settings, sources, units)
    with log.naming(Path(args.dst)), Work(args, settings, sources) as work_:
        if work_.is_finished():
            return work_.publish()
        total = sum(s.size for s in sources)
        with bar_of(total, show_progress) as update:
            for unit, encoded in encoded_units(args, encoder, work_.skipped(units, update)):
                work_.append(unit, encoded)
                update(unit.progress)
        work_.check_end()
        return work_.publish()


def settings_of(args: CorpusArgs, tokenizer: Tokenizer) -> dict[str, Any]:
    """What the store's bytes depend on beside the sources; a part of meta.json."""
    names = (
        "input_format",
        "field",
        "documents",
        "append_eos",
        "prepend_bos",
        "blocks",
        "block_size",
        "format",
        "unit_bytes",
    )
    about = {"name": tokenizer.path.name, "kind": tokenizer.kind, "vocab_size": tokenizer.vocab_size}
    ids = {"bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id, "fingerprint": tokenizer.fingerprint}
    return {"tokenizer": about | ids, "settings": {name: getattr(args, name) for name in names}}


def encoded_units(args: CorpusArgs, encoder: Encoder, units: Iterable[Unit]) -> Iterator[tuple[Unit, Encoded]]:
    """Every unit with its ids, in order; at most three units a process are in memory."""
    count = args.num_processes or len(os.sched_getaffinity(0))
    if count == 1:
        yield from ((unit, encoder(unit)) for unit in units)
        return
    context, ahead = multiprocessing.get_context("spawn"), deque()
    with ProcessPoolExecutor(count, context, start_worker, (args,)) as pool:
        try:
            for unit in units:
                ahead.append((unit._replace(payload=None), pool.submit(work, unit)))
                if len(ahead) > 2 * count:
                    done, future = ahead.popleft()
                    yield done, future.result()
            for done, future in ahead:
                yield done, future.result()
        except BrokenProcessPool:
            raise ValueError(
                "a worker process died, perhaps for want of memory: run the same command again to go on, with a smaller "
                "--num_processes"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def bar_of(total: int, show: bool) -> Iterator[Callable[[int], Any]]:
    from tqdm import tqdm

    with tqdm(total=total or None, desc="tokenise", unit="B", unit_scale=True, disable=not show) as bar:
        yield bar.update


def up_to_date(
    args: CorpusArgs, settings: dict[str, Any], sources: list[Source], units: Iterator[Unit]
) -> dict[str, Any]:
    """meta.json of a finished build of the same text with the same settings. ValueError where it is another."""
    path = Path(args.dst, store.META)
    meta = json.loads(path.read_bytes()) if path.is_file() else {}
    if meta.get("format") != store.FORMAT or any(s.path is None for s in sources):
        raise ValueError(f"--dst {args.dst} is already there: choose another, or remove it first")
    differing = difference(settings, meta)
    if not differing and [s["name"] for s in meta["sources"]] == [s.name for s in sources]:
        crcs = [0] * len(sources)
        for unit in units:
            crcs[unit.source] = zlib.crc32(unit.crc.to_bytes(4, "little"), crcs[unit.source])
        if crcs == [s["crc"] for s in meta["sources"]]:
            log.say(f"{args.dst} is up to date: nothing to do")
            return meta
    raise ValueError(
        f"--dst {args.dst} was built from other text or settings ({differing or 'sources'}): choose another, or remove it"
    )
