"""What lies at a path, as plain JSON and as lines for people: a checkpoint, an adapter, a list of them, or a whole run.

    describe(path) -> report  {"path", "format", "files", "dtypes", "model", "adapter", "base", "saved", "problems", ...}
    lines(report)  -> aligned lines

Headers are read, not weights, with two exceptions: a run's checkpoint is hashed against its manifest, and what every shard
holds a copy of is compared. `problems` is what is damaged, each with its file; a base that has moved is only said.
Test: tests/unit/test_inspect.py
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from accessory.checkpoint import resume
from accessory.checkpoint.adapter import base_files, open_adapter
from accessory.checkpoint.formats import Checkpoint, is_adapter, open_checkpoint, paths_of
from accessory.checkpoint.formats_read import file_sha256, read_json, safetensors_header
from accessory.model.args import ModelArgs
from accessory.weights import Source, check_keys
from accessory.weights.report import SHORT, mapping_lines


def describe(
    path: str, pretrained_type: str | None = None, base: str | None = None, show_progress: bool = False
) -> tuple[dict[str, Any], Checkpoint | None]:
    """(the report, the opened checkpoint; None where it cannot be opened). Of a run: its checkpoints, and the latest one.

    Raises ValueError naming the file when there is no checkpoint, or what is there cannot be read at all."""
    first, *more = paths_of(path)
    if not more and is_run(first):
        return _run(first, base, show_progress)
    saved = None if more or not (first / resume.MANIFEST).is_file() else _saved(first, show_progress)
    report: dict[str, Any] = {"path": str(path), "problems": saved.pop("problems") if saved else []}
    if not more and is_adapter(first):
        report |= _adapter(first)
    checkpoint = None
    try:
        checkpoint = open_checkpoint(path, pretrained_type, base)
        report |= _facts(checkpoint)
        _check_copies(checkpoint)
    except ValueError as error:
        if "base" in report and not report["base"]["there"] and base is None:
            report["base"]["state"] = str(error)
        elif report["problems"] or saved or checkpoint:
            report["problems"].append(str(error))
        else:
            raise
    return report | ({"saved": saved} if saved else {}), checkpoint


def is_run(path: Path) -> bool:
    return path.is_dir() and not (path / resume.MANIFEST).is_file() and bool(resume.steps(path))


def _run(path: Path, base: str | None, show_progress: bool) -> tuple[dict[str, Any], Checkpoint | None]:
    """A run directory: every checkpoint (by the sizes of its files), then the latest in full."""
    latest = (path / "latest").resolve().name if (path / "latest").exists() else None
    found = [
        {"step": step, "path": str(p), "problem": resume.problem(p), "latest": p.name == latest}
        for step, p in resume.steps(path)
    ]
    chosen = next((c for c in found if c["latest"]), found[-1])
    report, checkpoint = describe(chosen["path"], None, base, show_progress)
    best = _best(report.get("saved", {}).get("state", {}))
    for c in found:
        c["best"] = best.index(c["step"]) + 1 if c["step"] in best else None
    wrong = [c["problem"] for c in found if c["problem"] and c is not chosen]
    return report | {"run": str(path), "checkpoints": found, "problems": report["problems"] + wrong}, checkpoint


def _best(state: dict[str, Any]) -> list[int]:
    """The steps that --keep_best keeps, best first; of a state from before --keep_best_n its one."""
    if "ranked" in state:
        return [step for _, step in state["ranked"]]
    return [state["best_step"]] if state.get("best_step") else []


def _saved(path: Path, show_progress: bool) -> dict[str, Any]:
    """What a run's checkpoint says of itself: manifest, state, and every file that is not what was written."""
    wrong = resume.problem(path)
    if wrong and wrong.startswith(str(path / resume.MANIFEST)):
        return {"problems": [wrong]}
    manifest = read_json(path / resume.MANIFEST)
    problems = _verify(path, manifest["files"], show_progress)
    state, trained = {}, []
    if not problems and (path / "resume" / resume.STATE).is_file():
        state = read_json(path / "resume" / resume.STATE)
        headers = [safetensors_header(f) for f in sorted((path / "resume").glob("state-*.safetensors"))]
        trained = list(dict.fromkeys(n for header in headers for n in header if "/" not in n))
    keys = ("step", "mp", "dp", "metrics", "tokenizer")
    about = {k: manifest[k] for k in keys if k in manifest}
    files = {name: entry["size"] for name, entry in manifest["files"].items()}
    return about | {"files": files, "state": state, "trained": trained, "problems": problems}


def _verify(path: Path, entries: dict[str, Any], show_progress: bool) -> list[str]:
    """Every file that is missing, has another size or other content than was written, named."""
    from tqdm import tqdm

    problems = []
    total = sum(entry["size"] for entry in entries.values())
    with tqdm(total=total, desc="hashing", unit="B", unit_scale=True, disable=not show_progress) as bar:
        for name, entry in entries.items():
            file = path / name
            if not file.is_file():
                problems.append(f"{file} is missing")
            elif (size := file.stat().st_size) != entry["size"]:
                problems.append(f"{file} has {size} bytes, {entry['size']} were written")
            elif file_sha256(file) != entry["sha256"]:
                problems.append(f"{file} is damaged: its sha256 is not the one written")
            bar.update(entry["size"])
    return problems


def _adapter(path: Path) -> dict[str, Any]:
    """An adapter without its base: terms, tensors, and whether the base is where it says and as large."""
    terms, tensors = open_adapter(path)
    record = terms.get("base") or {}
    where = record.get("path")
    there = bool(where) and all(Path(p).exists() for p in ([where] if isinstance(where, str) else where))
    state = "is there" if there else "is not there: say where it is with --base"
    for file, size in (base_files(record) if there else {}).items():
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            there, state = (
                False,
                f"is another: {file.name} {'is gone' if found is None else f'has {found} bytes, not {size}'}",
            )
            break
    else:
        state += ", its files have the same sizes" if there and record.get("size") else ""
    shown = {k: v for k, v in terms.items() if k not in ("base", "format_version")}
    return {
        "adapter": shown,
        "base": {"path": where, "there": there, "state": state},
        "adapter_tensors": _mapped(tensors),
        "adapter_parameters": sum(_count(tensors, n) for n in tensors.names()),
    }


def _facts(checkpoint: Checkpoint) -> dict[str, Any]:
    source, names = checkpoint.source, checkpoint.source.names()
    kinds: Counter = Counter()
    for name in names:
        kinds[SHORT.get(source.dtype(name), str(source.dtype(name)))] += _count(source, name)
    facts = {
        "format": checkpoint.kind,
        "parts": [str(p) for p in checkpoint.parts],
        "files": {str(f): f.stat().st_size for f in checkpoint.files},
        "tensors": len(names),
        "parameters": sum(kinds.values()),
        "dtypes": dict(kinds),
        "embedding_dim": checkpoint.embedding_dim,
        "tokenizer": {"path": str(checkpoint.tokenizer)} if checkpoint.tokenizer else None,
    }
    if checkpoint.kind in ("meta_ori", "consolidated"):
        facts["mp"] = sum(f.parent == checkpoint.parts[0] for f in checkpoint.files)
    if checkpoint.adapter and not is_adapter(checkpoint.parts[-1]):
        facts["adapter"] = {k: v for k, v in checkpoint.adapter.items() if k not in ("base", "format_version")}
    return facts | (_model(checkpoint) if checkpoint.params else {})


def _model(checkpoint: Checkpoint) -> dict[str, Any]:
    """Sizes and constants, and what stands between the tensors and a model of these."""
    args = ModelArgs.from_dict(checkpoint.params, str(checkpoint.path))
    source = checkpoint.source
    shape = source.shape("tok_embeddings.weight") if "tok_embeddings.weight" in source.names() else (0,)
    derived = {
        "n_kv_heads": args.kv_heads,
        "head_dim": args.head_size,
        "hidden_dim": args.ffn_dim,
        "vocab_size": shape[0],
    }
    tied = "output.weight" not in source.names() if args.tie_word_embeddings is None else args.tie_word_embeddings
    keys = {k: v for k, v in check_keys(source, args, checkpoint.adapter).items() if v}
    return {"model": args.to_dict() | derived | {"tie_word_embeddings": tied}, "keys": keys}


def _check_copies(checkpoint: Checkpoint) -> None:
    """Raises ValueError naming the file when shards hold other copies of a norm: they are of two checkpoints."""
    for name in checkpoint.source.names():
        if name.endswith("norm.weight"):
            checkpoint.source.read(name)


def _mapped(source: Source) -> list[str]:
    return mapping_lines((n, n, source.shape(n), source.dtype(n)) for n in source.names())


def _count(source: Source, name: str) -> int:
    count = 1
    for size in source.shape(name):
        count *= size
    return count


# --- for people -------------------------------------------------------------------------------------------------------


def lines(report: dict[str, Any]) -> list[str]:
    """The report as `label  value` lines, aligned; what is not there has no line."""
    rows: list[tuple[str, str]] = [(label, text) for label, text in _rows(report) if text]
    shown = [f"{label:<12}{text}" for label, text in rows]
    return shown + [f"{'PROBLEM':<12}{p}" for p in report["problems"]]


def _rows(r: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [("run", r.get("run", ""))] + [("", _step(c)) for c in r.get("checkpoints", [])] + [("path", r["path"])]
    if "format" in r:
        size, split = sum(r["files"].values()), {0: "its rows", 1: "its columns", None: ""}[r["embedding_dim"]]
        rows += [("format", r["format"] + (f", {r['mp']} model-parallel file(s)" if "mp" in r else ""))]
        rows += [("", f"tok_embeddings is split over {split}" if split else "")]
        rows += [("part", part) for part in (r["parts"] if len(r["parts"]) > 1 else [])]
        rows += [("files", f"{len(r['files'])}, {_size(size)}")]
        rows += [("", f"{Path(f).name}  {_size(n)}") for f, n in r["files"].items()]
        rows += [("parameters", f"{r['parameters']:,} in {r['tensors']} tensors")]
        rows += [("dtypes", ", ".join(f"{name} {count:,}" for name, count in r["dtypes"].items()))]
    rows += _model_rows(r) + [("tokenizer", _tokenizer(r.get("tokenizer")) if "format" in r else "")]
    if "adapter" in r:
        rows += [
            (
                "adapter",
                ", ".join(f"{k} {_short(v)}" for k, v in r["adapter"].items() if v not in (None, [], {}, False)),
            )
        ]
        rows += [("", f"{r['adapter_parameters']:,} parameters trained" if "adapter_parameters" in r else "")]
        rows += [("", line) for line in r.get("adapter_tensors", [])]
    if "base" in r:
        rows += [("base", f"{_short(r['base']['path'])} {r['base']['state']}")]
    return rows + _saved_rows(r.get("saved"))


def _model_rows(r: dict[str, Any]) -> list[tuple[str, str]]:
    if "model" not in r:
        return []
    m = r["model"]
    scaling = m.get("rope_scaling")
    biases = [k for k in ("attention_bias", "qkv_bias", "mlp_bias", "qk_norm", "sliding_window") if m.get(k)]
    sizes = (
        f"dim {m['dim']}, {m['n_layers']} layers, {m['n_heads']} heads of {m['head_dim']}, {m['n_kv_heads']} kv heads"
    )
    return [
        ("model", f"{sizes}, feed-forward {m['hidden_dim']}, vocabulary {m['vocab_size']}"),
        ("", f"output {'tied to' if m['tie_word_embeddings'] else 'apart from'} the embedding; norm_eps {m['norm_eps']:g}"),
        ("", f"rope theta {m['rope_theta']:g}, scaling {json.dumps(scaling) if scaling else 'none'}"),
        ("", f"with {', '.join(biases)}" if biases else ""),
        *((kind, f"{len(names)}: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}") for kind, names in r["keys"].items()),
    ]  # fmt: skip


def _saved_rows(saved: dict[str, Any] | None) -> list[tuple[str, str]]:
    if not saved or "step" not in saved:
        return []
    state = saved["state"]
    metrics = ", ".join(f"{k} {v:.5g}" for k, v in (saved.get("metrics") or {}).items() if isinstance(v, (int, float)))
    shown = [f"{k} {state[k]}" for k in ("epoch", "tokens", "skipped_steps", "best_step") if state.get(k) is not None]
    kinds = list(dict.fromkeys(".".join("*" if p.isdigit() else p for p in n.split(".")) for n in saved["trained"]))
    return [
        ("saved", f"step {saved['step']} by mp {saved['mp']} x dp {saved['dp']}; {len(saved['files'])} files hashed"),
        ("state", ", ".join(shown)),
        ("metrics", metrics),
        (
            "trained",
            f"{len(saved['trained'])} tensors: {', '.join(kinds[:6])}{', ...' if kinds[6:] else ''}" if kinds else "",
        ),
    ]


def _step(c: dict[str, Any]) -> str:
    marks = ["latest"] if c["latest"] else []
    marks += [f"best {c['best']}" if c["best"] > 1 else "best"] if c["best"] else []
    return f"{Path(c['path']).name}  {c['problem'] or 'whole'}{'  (' + ', '.join(marks) + ')' if marks else ''}"


def _tokenizer(found: dict[str, Any] | None) -> str:
    if found is None:
        return "none beside the weights"
    tokens = f": {found['kind']}, {found['vocab_size']} tokens, {found['fits']}" if "kind" in found else ""
    return found["path"] + tokens


def _short(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _size(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} bytes"
