"""Sequence parallel changes nothing but memory: each mapping against plain torch, whole runs against one rank's, as those without
it are in test_parity.py: losses, norms, first gradients, validation; logits, at mp 2 and 4.

Micro batches of 1 to 8 sequences of 2 to 40 tokens: most numbers of tokens no mp divides. Packed rows and padded ones.
"""

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from accessory.generation.engine import generate
from accessory.model.llama import replicated
from accessory.model.lora import partial_grad
from accessory.parallel import groups, layers
from tests.dist import runs
from tests.dist.runs import Case
from tests.dist.test_families import FamilyCase
from tests.dist.test_parity import same_run, train_all
from tests.helpers import run_ranks
from tests.unit.test_checkpointing import kept_per_layer, tiny

B, T, D = 3, 7, 6  # 21 tokens


# --- the mappings -----------------------------------------------------------------------------------------------------


def mappings(mp: int) -> None:
    groups.init(mp)
    rank, rows = groups.mp_rank(), -(-B * T // mp)
    addends = torch.randn(mp, B, T, D, generator=torch.Generator().manual_seed(0))
    summed = F.pad(addends.sum(0).flatten(0, 1), (0, 0, 0, mp * rows - B * T))
    mine = summed[rank * rows : (rank + 1) * rows]

    addend = addends[rank].clone().requires_grad_()
    part = layers.scatter_tokens(addend)
    torch.testing.assert_close(part, mine)
    part.backward(mine)
    torch.testing.assert_close(addend.grad, addends.sum(0))  # all tokens, from every rank

    part = mine.clone().requires_grad_()
    whole = layers.gather_tokens(part, (B, T))
    torch.testing.assert_close(whole, addends.sum(0))
    whole.backward(addends[rank])  # each rank's addend
    torch.testing.assert_close(part.grad, mine)

    for numbers in ([0, 2, 3, 20], list(range(B * T)), [19], []):  # some ranks have many of them, or none
        part, chosen = mine.clone().requires_grad_(), torch.tensor(numbers, dtype=torch.long)
        found = layers.gather_rows(part, chosen)
        torch.testing.assert_close(found, summed[chosen])
        found.backward(addends[rank].flatten(0, 1)[chosen])
        expected = torch.zeros_like(summed).index_copy(0, chosen, summed[chosen])
        torch.testing.assert_close(part.grad, expected[rank * rows : (rank + 1) * rows])


@pytest.mark.parametrize("mp", [1, 2, 3, 4])
def test_each_mapping_is_a_sum_or_a_copy(mp: int) -> None:
    run_ranks(mappings, mp, world=mp)


# --- whole runs -------------------------------------------------------------------------------------------------------


# tuning, tied, query / kv heads (at mp 4 a kv head of 12/2 is in two copies), checkpointing, data parallel, batch size
RUNS = [
    ("full", False, "12/2", "none", "fsdp", 8),
    ("lora", True, "12/2", "selective", "sdp", 1),
    ("bias+norm", False, "12/1", "none", "ddp", 2),
    ("lora+saved", True, "24/24", "full", "fsdp", 4),
]
LAYOUTS = [(2, 1), (4, 1), (2, 2)]
FAMILIES = [("qwen2", "bias+norm"), ("qwen3", "full"), ("qwen3", "lora")]


def cases(mp: int, dp: int) -> list[Case]:
    made = []
    for tuning, tied, heads, checkpointing, mode, batch in RUNS:
        batch = min(batch, runs.GROUP // dp)
        cut = (batch, runs.GROUP // dp // batch)
        made.append(Case(mp, dp, tuning, tied, heads, checkpointing, mode, cut, sequence_parallel=True))
    if (mp, dp) == (2, 1):
        keys = {"heads": "12/1", "cut": (8, 1), "checkpointing": "selective", "sequence_parallel": True}
        made += [FamilyCase(mp, dp, tuning, family=family, **keys) for family, tuning in FAMILIES]
    return made


def plain(case: Case) -> Case:
    alone = {"mp": 1, "dp": 1, "cut": (2, 4), "data_parallel": "fsdp"}
    return dataclasses.replace(case, sequence_parallel=False, checkpointing=False, **alone)


@pytest.fixture(scope="module")
def alone() -> dict[Case, dict]:
    these = sorted({plain(case) for layout in LAYOUTS for case in cases(*layout)}, key=str)
    return dict(zip(these, run_ranks(train_all, these, world=1, timeout=120)[0]))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout[0]}x{layout[1]}")
def test_a_run_is_that_of_one_rank(layout: tuple[int, int], alone: dict[Case, dict]) -> None:
    mp, dp = layout
    for case, found in zip(
        cases(mp, dp), run_ranks(train_all, cases(mp, dp), world=mp * dp, timeout=180)[0], strict=True
    ):
        print(f"{case}: {same_run(found, alone[plain(case)])}")


def gradients_of(model, tokens: torch.Tensor, cu_seqlens: torch.Tensor | None) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and complete gradients: what is an addend is summed over mp."""
    model.zero_grad()
    torch.manual_seed(5)  # of dropout
    loss, _, _ = model(tokens, labels=tokens, cu_seqlens=cu_seqlens)
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    partial = replicated if model.sequence_parallel else partial_grad
    return loss.item(), {n: groups.all_reduce(g, groups.mp_group()) if partial(n) else g for n, g in found.items()}


def with_and_without(mp: int, keys: dict, compiled: bool) -> None:
    groups.init(mp)
    model = tiny(**keys)
    if compiled:
        for layer in model.layers:
            layer.compute = torch.compile(layer.compute, backend="eager")
    random = torch.Generator().manual_seed(1)
    batches = [(torch.randint(101, (1, n), generator=random), torch.tensor([0, 5, n])) for n in (22, 35)]
    if not compiled:
        batches += [(torch.randint(101, shape, generator=random), None) for shape in ((B, T), (4, 8), (1, 2))]
    for tokens, cu_seqlens in batches:
        found = {}
        for divided in (False, True):
            model.sequence_parallel = divided
            found[divided] = gradients_of(model, tokens, cu_seqlens)
        assert found[True][0] == pytest.approx(found[False][0], rel=1e-6)
        # of two tokens the first alone has a target and sees itself alone: no gradient of wq and wk, but rounding of theirs
        rounding = 1e-6 * max(g.abs().max() for g in found[False][1].values())
        for name, gradient in found[True][1].items():
            expected = found[False][1][name]
            assert (gradient - expected).abs().max() <= rounding + 1e-5 * expected.abs().max(), (name, tokens.shape)


@pytest.mark.parametrize("mp", [2, 4])
def test_padded_rows_biases_and_dropout(mp: int) -> None:
    for keys in ({"mlp_bias": True, "attention_bias": True}, {"lora_rank": 4, "dropout": 0.3}):
        run_ranks(with_and_without, mp, keys, False, world=mp)


def test_compiled_layers() -> None:
    run_ranks(with_and_without, 2, {"lora_rank": 4, "n_layers": 1}, True, world=2, timeout=240)


def logits_and_answers(mp: int) -> None:
    groups.init(mp)
    model = tiny().eval()
    tokens = torch.randint(101, (B, T), generator=torch.Generator().manual_seed(1))
    found = []
    for divided in (False, True):
        model.sequence_parallel = divided
        with torch.no_grad():
            found.append((model(tokens), generate(model, [tokens[0].tolist(), tokens[1, :3].tolist()], 6)))
    torch.testing.assert_close(found[1][0], found[0][0])
    assert found[1][1] == found[0][1]


def test_logits_are_the_same_and_generation_goes_without_it() -> None:
    run_ranks(logits_and_answers, 4, world=4)


def memory(mp: int) -> list[tuple[str, bool, float, float]]:
    groups.init(mp)
    return [
        (m, on, *kept_per_layer(m, on, n_kv_heads=4)) for m in ("none", "selective", "full") for on in (False, True)
    ]


@pytest.mark.parametrize("mp", [2, 4])
def test_what_was_kept_whole_is_divided(mp: int) -> None:
    """Bytes alive when backward begins are those of the plan, and with it a mp-th of one rank's."""
    alone = {mode: measured for mode, on, measured, _ in run_ranks(memory, 1, world=1)[0] if not on}
    for found in run_ranks(memory, mp, world=mp):
        for mode, on, measured, planned in found:
            print(f"mp {mp} {mode} sequence parallel {on}: {measured / alone[mode]:.3f} of one rank's")
            assert measured == pytest.approx(planned, rel=0.05), (mode, on)
            if on:
                assert measured == pytest.approx(alone[mode] / mp, rel=0.05), mode
