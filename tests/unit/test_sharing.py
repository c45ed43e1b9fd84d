"""Beginnings that prompts have in common: found as counting distinct beginnings says, attended to as whole sequences are."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from accessory.data import sharing
from accessory.data.loader import Batch, collate, eval_batches, num_targets
from accessory.data.sft import Example
from accessory.flags import ParallelArgs
from accessory.log import RunLog
from accessory.model import attention, shard_dim
from accessory.model.attention import Segments, causal_varlen
from accessory.model.llama import kv_copied
from accessory.model.lora import TuningArgs, partial_grad
from accessory.model.pretrained import build
from accessory.parallel import groups, products
from accessory.parallel.grads import GradientRules
from accessory.train import loop, optim
from accessory.train.objectives import next_token
from accessory.train.start import materialise
from accessory.train.state import TrainState
from tests.gpu.bodies import TINY, packed_attention_is_that_of_each_sequence, random_checkpoint
from tests.unit.test_device_paths import torch_2_11

CPU = torch.device("cpu")


def example(ids: str, prompt: int, spans: list[list[int]] | None = None) -> Example:
    """A letter a token."""
    return Example(np.array([ord(c) - 96 for c in ids], np.int32), prompt, None if spans is None else np.array(spans))


def wholes(examples: list[Example], after: list[int]) -> list[tuple[list[int], list[bool]]]:
    """(ids, learnt) of every sequence that no other comes after, with all that it comes after."""
    found = []
    for i in set(range(len(after))) - set(after):
        ids, learnt = examples[i].ids.tolist(), examples[i].learnt().tolist()
        while (i := after[i]) >= 0:
            ids, learnt = examples[i].ids.tolist() + ids, examples[i].learnt().tolist() + learnt
        found.append((ids, learnt))
    return sorted(found)


def test_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "LEAST", 2)
    items = [example("pppqqxa", 6), example("pppyb", 4), example("pppqqzcc", 6), example("dd", 1)]
    batch = collate(items, share_prompts=True)
    x = -100
    assert batch.tokens.tolist() == [[4, 4, 16, 16, 16, 25, 2, 17, 17, 24, 1, 26, 3, 3]]
    assert batch.cu_seqlens.tolist() == [0, 2, 5, 7, 9, 11, 14] and batch.after.tolist() == [-1, -1, 1, 1, 3, 3]
    assert batch.positions.tolist() == [[0, 1, 0, 1, 2, 3, 4, 3, 4, 5, 6, 5, 6, 7]]
    assert batch.labels.tolist() == [[x, 4, x, x, x, x, 2, x, x, x, 1, x, 3, 3]]
    assert collate(items).after.tolist() == [-1] * 4 and collate(items).tokens.shape == (1, 22)


@pytest.mark.parametrize("least", [1, 3])
@pytest.mark.parametrize("seed", range(20))
def test_every_distinct_beginning_is_there_once(monkeypatch: pytest.MonkeyPatch, seed: int, least: int) -> None:
    monkeypatch.setattr(sharing, "LEAST", least)
    draw = np.random.default_rng(seed)
    examples = []
    for _ in range(draw.integers(2, 12)):
        ids = draw.integers(0, 2, draw.integers(2, 14)).astype(np.int32)
        prompt = int(draw.integers(0, len(ids)))
        spans = np.array([[prompt, prompt + 1], [len(ids) - 1, len(ids)]], np.int32) if draw.random() < 0.3 else None
        examples.append(Example(ids, prompt, spans))
    row, after = sharing.shared(examples)
    assert wholes(row, after) == sorted((e.ids.tolist(), e.learnt().tolist()) for e in examples)
    assert sum(map(num_targets, row)) == sum(map(num_targets, examples))
    assert all(len(row[i].ids) >= least for i in set(after) - {-1})
    if least == 1:
        before = [len([*itertools.takewhile(lambda learnt: not learnt, e.learnt())]) for e in examples]
        heads = [tuple(e.ids[: max(n - 1, 0)].tolist()) for e, n in zip(examples, before)]
        distinct = {head[:n] for head in heads for n in range(1, len(head) + 1)}
        rest = sum(len(e.ids) - len(head) for e, head in zip(examples, heads))
        saved = sum(map(len, heads)) - len(distinct)
        total = sum(len(e.ids) for e in examples)
        assert sum(len(e.ids) for e in row) == (
            len(distinct) + rest if saved and saved >= sharing.WORTH * total else total
        )


@pytest.mark.parametrize(
    "items",
    [
        [example("abcdefghijk", 10)],  # nobody else
        [example("abcdefghij", 9), example("abcdefgxyz", 9)],  # 7 tokens alike
        [example("abcdefghij", 0), example("abcdefghij", 1)],  # all is learnt
        [example("abcdefghij" * 10, 9), example("abcdefghxx" + "a" * 80, 9)],  # 8 of 190
    ],
    ids=["alone", "short", "learnt", "little"],
)
def test_what_is_not_worth_it_stays_as_it_is(items: list[Example]) -> None:
    one, other = collate(items), collate(items, share_prompts=True)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    "item",
    [example("abcdefghijkl", 15), example("abcdefghijklmnop", 14, [[12, 13], [15, 16]])],
    ids=["all", "spans first"],
)
def test_a_prompt_that_says_it_is_longer(item: Example) -> None:
    row, after = sharing.shared([item, item, item])
    assert wholes(row, after) == [(item.ids.tolist(), item.learnt().tolist())] * 3
    assert after == [-1, 0, 0, 0] and all(len(e.ids) for e in row)


def test_a_thousand_nested_prompts() -> None:
    items = [Example(np.zeros(8 * n + 10, np.int32), 8 * n + 9) for n in range(1, 1001)]
    row, after = sharing.shared(items)
    assert sum(len(e.ids) for e in row) == 8 * 1001 + 2 * 1000
    assert wholes(row, after) == sorted((e.ids.tolist(), e.learnt().tolist()) for e in items)


# --- attention --------------------------------------------------------------------------------------------------------

BOUNDS, AFTER = [0, 20, 33, 40, 41, 60, 75, 80], [-1, 0, 1, 1, 0, -1, 5]
CHAINS = [[0, 1, 2], [0, 1, 3], [0, 4], [5, 6]]


@pytest.mark.parametrize("kernel", [False, True])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_attention_is_that_of_whole_sequences(monkeypatch, dtype: torch.dtype, bound: float, kernel: bool) -> None:
    monkeypatch.setitem(products.CPU_MULTIPLIES, torch.bfloat16, True)  # bf16: by blocks, where there is no kernel
    if kernel:
        monkeypatch.setattr(attention, "_varlen_kernel", lambda device: causal_varlen(torch_2_11))
    lengths = [b - a for a, b in itertools.pairwise(BOUNDS)]
    packed_attention_is_that_of_each_sequence("cpu", dtype, 4, 2, 16, lengths, bound, AFTER)


def test_positions_and_the_longest_count_what_comes_before() -> None:
    packed = Segments(torch.tensor(BOUNDS), CPU, torch.tensor(AFTER))
    expected = [0] * BOUNDS[-1]
    for chain in CHAINS:
        for place, row in enumerate(itertools.chain(*(range(BOUNDS[i], BOUNDS[i + 1]) for i in chain))):
            expected[row] = place
    assert packed.positions.tolist() == [expected] and packed.longest == 40


@pytest.mark.parametrize("after", [[0, -1], [-1, 1], [-1, -2], [1, -1], [-1], [-1, 0, 0]])
def test_sequences_come_after_earlier_ones_only(after: list[int]) -> None:
    with pytest.raises(ValueError, match="after"):
        Segments(torch.tensor([0, 3, 5]), CPU, torch.tensor(after))


# --- the loop ---------------------------------------------------------------------------------------------------------


class Data(list):
    def epoch_order(self, seed: int, epoch: int) -> range:
        return range(len(self))


def data() -> Data:
    """Two system messages, a question that comes twice, a dialog."""
    draw = np.random.default_rng(1)
    systems = [draw.integers(1, 101, n) for n in (20, 12)]
    made = Data()
    for i, n in enumerate([5, 17, 9, 3, 30, 8, 11, 6]):
        ids = np.concatenate([systems[i % 3 == 0], draw.integers(1, 101, n)]).astype(np.int32)
        spans = np.array([[len(ids) - n + 2, len(ids) - n + 3], [len(ids) - 1, len(ids)]]) if i == 4 else None
        made.append(Example(ids, len(ids) - n + 2, spans))
    made.append(Example(np.append(made[0].ids[:-2], [7, 8]).astype(np.int32), made[0].prompt_len))
    return made


def run(tmp_path, share: bool, checkpointing: str = "none") -> tuple[list[Tensor], list[int]]:
    """Losses and the trained weights of a run over the data, and how many tokens the layers saw of each batch."""
    groups.init(1, on="cpu")
    checkpoint, args = random_checkpoint(TINY, torch.float32)
    model = build(checkpoint, args, TuningArgs())
    materialise(model, checkpoint, ParallelArgs(precision="fp32", checkpointing=checkpointing), 0)
    seen: list[int] = []
    results: list[Tensor] = []

    def objective(model: torch.nn.Module, batch: Batch):
        seen.append(batch.tokens.shape[1])
        loss, count, metrics = next_token(model, batch)
        results.extend((loss.detach(), count.float(), metrics["correct"].float()))
        return loss, count, metrics

    rules = GradientRules(model, args.kv_heads, shard_dim, partial_grad, kv_copied)
    loop_args = loop.LoopArgs(batch_size=9, max_steps=3, eval_steps=10, save_steps=10, share_prompts=share)
    how, log = (
        optim.OptimArgs(lr=1e-3, lr_scheduler="constant", adam_eps=1e-3),
        RunLog(tmp_path / str(share), 0, (), None, 3),
    )
    loop.fit(
        model, optim.adamw(model, how), rules, objective, data(), TrainState(), loop_args, how, precision="fp32",
        data_parallel="fsdp", num_workers=0, run_log=log, evaluate=None, sample=None, save_best=0, save=lambda state: None,
    )  # fmt: skip
    log.close()
    measured = loop.evaluate(model, objective, data(), 9, False, share_prompts=share)
    return [*results, torch.tensor(list(measured.values())), *(p.detach() for p in model.parameters())], seen


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_a_run_is_the_same_with_and_without(tmp_path, checkpointing: str) -> None:
    (one, tokens), (other, fewer) = (run(tmp_path, share, checkpointing) for share in (False, True))
    total = sum(len(e.ids) for e in data())
    assert tokens == [total] * 4 and fewer == [fewer[0]] * 4 and fewer[0] < 0.65 * total
    for a, b in zip(one, other, strict=True):
        assert (a - b).abs().max() <= 2e-5 * a.abs().max()


@pytest.mark.parametrize("share", [False, True])
def test_a_run_is_the_same_where_rows_are_padded(tmp_path, monkeypatch: pytest.MonkeyPatch, share: bool) -> None:
    one, tokens = run(tmp_path / "as they are", share)
    # a head's rows too
    monkeypatch.setattr(products, "padding", lambda count, dtype, device: -count % 32 if count > 1 else 0)
    other, more = run(tmp_path / "padded", share)
    assert more == [n + -n % 32 for n in tokens] != tokens
    for a, b in zip(one, other, strict=True):
        assert (a - b).abs().max() <= 2e-5 * a.abs().max()


def test_a_window_of_attention_counts_what_comes_before() -> None:
    checkpoint, args = random_checkpoint(TINY, torch.float32)
    model = build(checkpoint, dataclasses.replace(args, sliding_window=40), TuningArgs())
    materialise(model, checkpoint, ParallelArgs(precision="fp32"), 0)
    (batch,) = eval_batches(data(), eval_batch_size=9, dp_rank=0, dp_size=1, share_prompts=True)
    with pytest.raises(ValueError, match="a sequence of 50 tokens"):
        next_token(model, loop.to_device(batch, CPU))
