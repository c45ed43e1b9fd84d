"""Files of m ranks loaded by n ranks: each rank's model is built and filled as in a run, and the ranks' parts, put together
by rules written here, are the original bits. The six ranks of mp 6 are played one by one over torch's fake process group.
"""

import contextlib
import io
import itertools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from accessory.checkpoint.formats_write import write_consolidated, write_meta
from accessory.generation.engine import generate
from accessory.model import ModelArgs, Transformer
from accessory.parallel import groups
from accessory.weights import TensorSource
from tests.helpers import random_weights, run_ranks, tiny_args, write_tiny_checkpoint

SIZES = (1, 2, 3, 4, 6)
WORKERS = 4
CUT_ROWS, CUT_COLUMNS = ("wq", "wk", "wv", "w1", "w3", "tok_embeddings", "output"), ("wo", "w2")
BASE = {"dim": 48, "n_layers": 1, "n_heads": 24, "head_dim": 4, "vocab_size": 101, "hidden_dim": 72}


def args_of(kv_heads: int, **keys) -> ModelArgs:
    return ModelArgs.from_dict(BASE | {"n_kv_heads": kv_heads, "attention_bias": True, "mlp_bias": True} | keys)


def allowed(n: int, kv_heads: int) -> bool:
    return kv_heads % n == 0 or n % kv_heads == 0


@contextlib.contextmanager
def playing(rank: int, world: int):
    """As this rank of that many, with collectives that do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield
    finally:
        groups.forget_model_parallel()
        dist.destroy_process_group()


def held(path: Path, rank: int, n: int) -> dict[str, torch.Tensor]:
    """What rank `rank` of `n` holds after loading."""
    with playing(rank, n):
        return {
            name: p.detach() for name, p in Transformer.from_pretrained(path, model_parallel_size=n).named_parameters()
        }


def together(parts: list[dict[str, torch.Tensor]], args: ModelArgs) -> dict[str, torch.Tensor]:
    """The ranks' parts as whole tensors. Copies must be equal to the bit, padding rows zero."""
    whole, n = {}, len(parts)
    for name in parts[0]:
        tensors, module = [part[name] for part in parts], name.split(".")[-2]
        if module in ("wk", "wv") and n > args.kv_heads:
            copies = n // args.kv_heads
            assert all(torch.equal(t, tensors[i // copies * copies]) for i, t in enumerate(tensors)), name
            tensors = tensors[::copies]
        if module in CUT_ROWS:
            whole[name] = torch.cat(tensors)
        elif module in CUT_COLUMNS and name.endswith("weight"):
            whole[name] = torch.cat(tensors, dim=1)
        else:
            assert all(torch.equal(t, tensors[0]) for t in tensors), name
            whole[name] = tensors[0]
        if module in ("tok_embeddings", "output"):
            assert len(whole[name]) == -(-args.vocab_size // n) * n and not whole[name][args.vocab_size :].any()
            whole[name] = whole[name][: args.vocab_size]
    return whole


def loaded_wrong(path: Path, args: ModelArgs, n: int, original: dict[str, torch.Tensor]) -> list[str]:
    whole = together([held(path, rank, n) for rank in range(n)], args)
    return [name for name in whole.keys() | original.keys() if not torch.equal(whole[name], original[name])]


def check_directories(directories: list[tuple[Path, ModelArgs]]) -> list[str]:
    """This worker's share of the directories, each at every allowed size: what went wrong."""
    mine, wrong = directories[dist.get_rank() :: WORKERS], []
    dist.destroy_process_group()
    for path, args in mine:
        original = random_weights(args, dtype=torch.bfloat16)
        for n in (n for n in SIZES if allowed(n, args.kv_heads)):
            if names := loaded_wrong(path, args, n, original):
                wrong.append(f"{path.name} at {n}: {names[:3]}")
    return wrong


def test_shards_of_any_size_load_at_any_other(tmp_path):
    directories = []
    for kv_heads, m, embedding_dim in itertools.product((24, 4, 12, 1, 2, 3), SIZES, (0, 1)):
        if not allowed(m, kv_heads) or (m == 1 and embedding_dim):
            continue
        args = args_of(kv_heads, tie_word_embeddings=kv_heads == 12)
        style = "consolidated" if (m + embedding_dim) % 2 else "meta_ori"
        path = tmp_path / f"kv{kv_heads}-{m}-shards-dim{embedding_dim}"
        path.mkdir()
        source = TensorSource(random_weights(args, dtype=torch.bfloat16))
        files = write_meta(path, source, args.to_dict(), shards=m, embedding_dim=embedding_dim, style=style)
        assert len([f for f in path.iterdir() if f.suffix == ".pth"]) == m and files
        directories.append((path, args))
    assert len(directories) == 44
    assert run_ranks(check_directories, directories, world=WORKERS) == [[]] * WORKERS


@pytest.mark.parametrize(
    "rows", [(24976, 24977), (24977, 24976), (16651, 16651, 16651), (30000, 19953), (12488, 12488, 12488, 12489)]
)
def test_vocabularies_split_as_published_files_have_them(tmp_path, rows):
    args = ModelArgs.from_dict(
        BASE | {"vocab_size": sum(rows), "dim": 8, "n_heads": 12, "n_kv_heads": 12, "head_dim": 2}
    )
    original, m = random_weights(args, dtype=torch.bfloat16), len(rows)
    for index in range(m):
        first, shard = sum(rows[:index]), {}
        for name, tensor in original.items():
            module = name.split(".")[-2]
            if module in ("tok_embeddings", "output"):
                shard[name] = tensor[first : first + rows[index]]
            else:
                dim = 0 if module in CUT_ROWS else 1 if module in CUT_COLUMNS else None
                shard[name] = tensor if dim is None else tensor.chunk(m, dim)[index]
        write_consolidated(tmp_path, shard.items(), args.to_dict(), index, m, style="meta_ori")
    for n in SIZES:
        assert not run_ranks(check_one, tmp_path, args, n, world=1)[0]


def check_one(path: Path, args: ModelArgs, n: int) -> list[str]:
    dist.destroy_process_group()
    return loaded_wrong(path, args, n, random_weights(args, dtype=torch.bfloat16))


# --- used -------------------------------------------------------------------------------------------------------------


def logits_and_answers(path: Path, mp: int) -> tuple[torch.Tensor, list[list[int]]]:
    """As in a notebook or under torchrun: load, logits of a batch, greedy continuations."""
    model = Transformer.from_pretrained(path, model_parallel_size=mp)
    tokens = torch.arange(1, 25).view(2, 12)
    with torch.no_grad():
        return model(tokens), generate(model, [[1, 2, 3], [7, 5]], max_new_tokens=12)


@pytest.mark.parametrize("kv_heads, embedding_dim", [(12, 1), (2, 0)])
def test_every_rank_gives_the_same_full_logits_and_answers(tmp_path, kv_heads, embedding_dim):
    path = write_tiny_checkpoint(tmp_path, tiny_args(n_kv_heads=kv_heads), shards=2, embedding_dim=embedding_dim)
    [(alone, answers)] = run_ranks(logits_and_answers, path, 1, world=1)
    assert alone.shape == (2, 12, 101)
    for mp, world in [(2, 2), (4, 4), (2, 4)] + [(3, 3)] * (kv_heads == 12):
        results = run_ranks(logits_and_answers, path, mp, world=world)
        for logits, found in results:
            assert (logits - alone).abs().max() <= 1e-5 * alone.abs().max()
            assert torch.equal(logits, results[0][0]) and found == answers


# --- refused ----------------------------------------------------------------------------------------------------------


def refusals(path: Path, sizes: list[int]) -> list[str]:
    dist.destroy_process_group()
    messages = []
    for n in sizes:
        with pytest.raises(ValueError) as caught:
            held(path, 0, n)
        messages.append(str(caught.value))
    return messages


def test_sizes_that_do_not_fit_the_heads_are_refused_with_those_that_do(tmp_path):
    cases = [
        (
            args_of(4),
            {
                3: "n_kv_heads is 4: use 1, 2, 4, 8, 12 or 24",
                6: "n_kv_heads is 4: use 1, 2, 4, 8, 12 or 24",
                5: "n_heads is 24: use",
            },
        ),
        (args_of(12), {8: "n_kv_heads is 12: use 1, 2, 3, 4, 6, 12 or 24"}),
        (
            args_of(24, hidden_dim=64),
            {3: "the feed-forward is 64 wide: use 1, 2, 4 or 8", 6: "the feed-forward is 64 wide: use 1, 2, 4 or 8"},
        ),
        (args_of(1, n_heads=1), {2: "n_heads is 1: use 1"}),
    ]
    for index, (args, expected) in enumerate(cases):
        path = tmp_path / str(index)
        path.mkdir()
        source = TensorSource(random_weights(args))
        write_meta(path, source, args.to_dict())
        for n, message in zip(expected, run_ranks(refusals, path, list(expected), world=1)[0], strict=True):
            assert message.startswith(f"--model_parallel_size {n} but {expected[n]}"), message
            with pytest.raises(ValueError, match=f"{n} .*{expected[n].split(':')[0]}"):  # nor are such files written
                write_meta(tmp_path, source, args.to_dict(), shards=n)
    assert not list(tmp_path.glob("*.pth"))


def wrong_world() -> list[str]:
    messages = []
    for mp in (2, 4, 0):
        with pytest.raises(ValueError) as caught, contextlib.redirect_stdout(io.StringIO()):
            groups.init(mp)
        messages.append(str(caught.value))
    groups.init(3)
    groups.init(3)
    with pytest.raises(ValueError, match="model_parallel_size 1: this process already runs at 3"):
        groups.init(1)
    return messages


def test_a_size_that_does_not_divide_the_processes_is_refused():
    for messages in run_ranks(wrong_world, world=3):
        for mp, message in zip((2, 4, 0), messages):
            assert message.startswith(f"--model_parallel_size {mp} does not fit the 3 running process(es): use 1 or 3")
