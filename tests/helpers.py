"""What tests share. Import by name: `from tests.helpers import run_ranks, tiny_args, write_tiny_checkpoint, assets`.

    run_ranks(function, *args, world=2)  [function(*args) of rank 0, of rank 1, ...] in a pool of gloo workers, begun once.
                                         `function` is a module-level function of a test file. In it `groups.init(mp)`
                                         divides the ready process group (`groups.forget_model_parallel()` before the
                                         next mp). Arguments and results are pickled. A rank that raises fails the test.
    tiny_args(**keys)                    a ModelArgs: 12 heads, 4 kv heads, dim 48, 2 layers, V 101 (for mp 1, 2, 4; for
                                         mp 3 give n_kv_heads=12 or 1)
    random_weights(args, seed)           {Meta's name: whole fp32 tensor}, made without the model's code
    write_tiny_checkpoint(directory, .)  consolidated.NN.pth + params.json + tokenizer.model; returns the directory
    tiny_tokenizer()                     bytes of a sentencepiece model (BPE, byte fallback) of 320 pieces
    write_tiny_data(directory, n)        train.jsonl, val.jsonl and data.yaml (for --data_config); returns data.yaml
    assets(*parts)                       a path under ../shared/assets beside the repository; skips the test without it

Fixtures are in tests/conftest.py. The pool itself is tested in tests/dist/test_pool.py.
"""

import functools
import gc
import io
import json
import multiprocessing
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest
import torch

from accessory.model.args import ModelArgs

ROOT = Path(__file__).resolve().parent.parent
POOL_SIZE = 4
TINY = {"dim": 48, "n_layers": 2, "n_heads": 12, "n_kv_heads": 4, "vocab_size": 101, "hidden_dim": 72, "norm_eps": 1e-5}
THINGS = {"grass": "green", "the sky": "blue", "snow": "white", "coal": "black", "a lemon": "yellow", "blood": "red"}
QUESTIONS = ("What colour is {}?", "Tell me the colour of {}.", "Name the colour that {} has.", "Which colour has {}?")


# --- tiny models ------------------------------------------------------------------------------------------------------


def tiny_args(**keys: Any) -> ModelArgs:
    return ModelArgs.from_dict(TINY | keys)


def random_weights(args: ModelArgs, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Whole tensors under Meta's names, no output.weight when `args` says tied; the norms are not quite 1."""
    from accessory.weights import expected_shapes

    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in expected_shapes(args, bool(args.tie_word_embeddings)).items():
        noise = torch.randn(shape, generator=generator)
        value = 1 + 0.1 * noise if "norm." in name else noise * (0.5 if len(shape) == 1 else shape[-1] ** -0.5)
        weights[name] = value.to(dtype)
    return weights


def write_tiny_checkpoint(
    directory: Path,
    args: ModelArgs | None = None,
    *,
    shards: int = 1,
    embedding_dim: int = 0,
    style: str = "meta_ori",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Path:
    """Random weights as `shards` files. Without `args`: tiny_args with the tokenizer's 320 rows."""
    from accessory.checkpoint.formats_write import write_meta
    from accessory.weights import TensorSource

    directory.mkdir(parents=True, exist_ok=True)
    args = args or tiny_args(vocab_size=320)
    (directory / "tokenizer.model").write_bytes(tiny_tokenizer())
    source = TensorSource(random_weights(args, seed, dtype))
    write_meta(directory, source, args.to_dict(), shards=shards, embedding_dim=embedding_dim, style=style)
    return directory


@functools.cache
def tiny_tokenizer(**options) -> bytes:
    from sentencepiece import SentencePieceTrainer

    text, model = [sentence for row in _rows(24) for sentence in (row["instruction"], row["output"])], io.BytesIO()
    kind = {"model_type": "bpe", "vocab_size": 320, "byte_fallback": True, "hard_vocab_limit": False} | options
    SentencePieceTrainer.train(sentence_iterator=iter(text), model_writer=model, minloglevel=2, **kind)
    return model.getvalue()


def write_tiny_data(directory: Path, n: int = 24) -> Path:
    """`n` rows in Alpaca's form for training and 6 for validation."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", _rows(n)), ("val", _rows(30)[24:])):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    entries = [f"  - {{path: {split}.jsonl, type: text, split: {split}}}\n" for split in ("train", "val")]
    (directory / "data.yaml").write_text("META:\n" + "".join(entries))
    return directory / "data.yaml"


def _rows(n: int) -> list[dict[str, str]]:
    pairs = [(q, thing, colour) for q in (*QUESTIONS, "Colour of {}:") for thing, colour in THINGS.items()]
    chosen = [pairs[i % len(pairs)] for i in range(n)]
    answers = [" ".join(["It is"] + [colour] * (1 + i % 5)) + "." for i, (_, _, colour) in enumerate(chosen)]
    return [{"instruction": q.format(t), "input": "", "output": a} for (q, t, _), a in zip(chosen, answers)]


def assets(*parts: str) -> Path:
    path = ROOT.parent.joinpath("shared", "assets", *parts)
    if not path.exists():
        pytest.skip(f"needs {'/'.join(('shared', 'assets', *parts))} beside the repository")
    return path


def least_cpu_seconds(work: Callable[[], Any], times: int = 3) -> tuple[float, Any]:
    """(CPU seconds of all threads, the least of some times; what `work` gives): what it takes, whatever the machine, the tests
    before it and the collector of garbage do meanwhile."""
    taken = []
    for _ in range(times):
        start = time.process_time()
        result = work()
        taken.append(time.process_time() - start)
    return min(taken), result


# --- the pool of ranks ------------------------------------------------------------------------------------------------


def run_ranks(function: Callable, *args: Any, world: int, timeout: float = 90) -> list:
    """Calls `function(*args)` on `world` <= 4 ranks, each in its worker, with a fresh process group; results by rank.

    Fails the test with the first failing rank's traceback, or after `timeout` seconds; the pool is then made anew."""
    global _pool
    assert 1 <= world <= POOL_SIZE, world
    if _pool is None:
        _pool = Pool()
    try:
        return _pool.run(function, args, world, timeout)
    except BaseException:
        close_pool(broken=True)
        raise


def close_pool(broken: bool = False) -> None:
    global _pool
    if _pool is not None:
        _pool.close(broken)
        _pool = None


class Pool:
    """Workers that wait on a pipe each. A server imports torch once and forks them: quicker than four imports."""

    PRELOAD = (
        *("torch", "torch.distributed.fsdp", "torch.distributed.checkpoint", "fairscale.nn.model_parallel.layers"),
        *("torch._dynamo", "torch._inductor", "torch.distributed.tensor"),  # which the first optimizer imports
    )

    def __init__(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(self.PRELOAD))
        self.pipes: list[Connection] = []
        self.processes = []
        for _ in range(POOL_SIZE):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)
        self.directory = tempfile.TemporaryDirectory(prefix="ranks-")
        self.runs = 0

    def run(self, function: Callable, args: tuple, world: int, timeout: float) -> list:
        self.runs += 1
        store = f"{self.directory.name}/store-{self.runs}"
        for rank, pipe in enumerate(self.pipes[:world]):
            pipe.send_bytes(pickle.dumps((function, args, rank, world, store, timeout)))
        deadline, results, waiting = time.monotonic() + timeout, {}, dict(zip(self.pipes, range(world)))
        while waiting:
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                late = sorted(waiting.values())
                pytest.fail(f"{function.__name__}: rank(s) {late} still running after {timeout:.0f} s", pytrace=False)
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    fine, value = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    pytest.fail(f"{function.__name__}: the worker of rank {rank} died", pytrace=False)
                if not fine:
                    pytest.fail(f"{function.__name__}: rank {rank} of {world}:\n{value}", pytrace=False)
                results[rank] = value
        return [results[rank] for rank in range(world)]

    def close(self, broken: bool) -> None:
        for process in self.processes if broken else ():
            process.kill()
        for pipe in self.pipes:
            pipe.close()  # an idle worker leaves by itself
        for process in self.processes:
            process.join(5)
            process.kill()
            process.join()
        self.directory.cleanup()


_pool: Pool | None = None


def _serve(pipe: Connection) -> None:
    """A worker's life: one call after another. After an exception it reports and waits for its end."""
    torch.set_num_threads(1)
    gc.freeze()  # all that was imported, which each collection would go through again, a third of a second
    while True:
        try:
            request = pipe.recv_bytes()
        except EOFError:
            return
        try:
            answer = pickle.dumps((True, _call(*pickle.loads(request))))
        except BaseException:
            answer = pickle.dumps((False, traceback.format_exc()))
        pipe.send_bytes(answer)


def _call(function: Callable, args: tuple, rank: int, world: int, store: str, timeout: float) -> Any:
    from datetime import timedelta

    import torch.distributed as dist

    from accessory.parallel import groups

    patience = timedelta(seconds=timeout)
    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world, timeout=patience)
    value = function(*args)
    if dist.is_initialized():  # a test may have ended it, to play other ranks
        dist.barrier()  # nobody leaves while a neighbour still listens
        groups.forget_model_parallel()
        dist.destroy_process_group()
    _forget_meshes()
    return value


def _forget_meshes() -> None:
    """DTensor caches results with their mesh, and takes the next world's equal mesh, with other groups, for that one."""
    from torch.distributed.tensor import debug

    debug._clear_sharding_prop_cache()


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    """The dp ranks' parts put together: this mp rank's slice. Collective over dp."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gather_over_mp(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The mp ranks' tensors, of one shape, in rank order, on every mp rank. Collective over mp."""
    from accessory.parallel import groups

    parts = [torch.empty_like(tensor) for _ in range(groups.mp_size())]
    torch.distributed.all_gather(parts, tensor.contiguous(), group=groups.mp_group())
    return parts


def sharded_alone(model: torch.nn.Module) -> torch.nn.Module:
    """FSDP over the one rank there is, where a run would leave it out: parameters become DTensors."""
    from torch.distributed.fsdp import fully_shard

    from accessory.parallel import groups

    groups.ensure()
    return fully_shard(model, mesh=groups.dp_mesh("fsdp"))
