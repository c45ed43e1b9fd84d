"""The core claim: how a run is divided changes nothing. mp x dp x what is trained x the model's shape, against one rank;
one rank against a dense LLaMA in plain torch, in fp64, written here from Meta's formulae.

Each case trains six optimizer steps through loop.fit: windows of 8 sequences of 2 to 40 tokens, the last of an epoch short
(fillers on some ranks), V = 101, which no size divides. Compared: every parameter's first gradient, the norm, the loss curve, validation.
"""

import collections
import functools
import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from accessory.data.loader import num_targets, train_windows
from accessory.parallel import groups
from accessory.parallel.fsdp import local
from tests.dist import runs
from tests.dist.runs import Case
from tests.helpers import run_ranks

TOLERANCE = 1e-6
LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2), (3, 1), (4, 1)]
HEADS = [
    "12/2",
    "24/24",
    "24/6",
    "12/1",
]  # query / kv: at mp 4 two ranks share a kv head of 12/2, and four that of 12/1
MODES = ["fsdp", "sdp", "ddp"]
CUTS = {1: [(2, 4), (8, 1), (1, 8)], 2: [(1, 4), (2, 2), (4, 1)]}  # batch_size, accum_iter


def fits(mp: int, heads: str) -> bool:
    query, kv = map(int, heads.split("/"))
    return query % mp == 0 and (kv % mp == 0 or mp % kv == 0)


def candidates(mp: int, dp: int, tuning: str, tied: bool) -> list[Case]:
    options = itertools.product(filter(lambda h: fits(mp, h), HEADS), (True, False), MODES, CUTS[dp])
    return [
        Case(mp, dp, tuning, tied, heads, checkpointing=ck, data_parallel=mode, cut=cut)
        for heads, ck, mode, cut in options
    ]


def pairs(case: Case) -> set[frozenset]:
    values = [("layout", (case.mp, case.dp)), ("tuning", case.tuning), ("tied", case.tied), ("heads", case.heads)]
    values += [
        ("checkpointing", case.checkpointing),
        ("mode", case.data_parallel),
        ("cut", CUTS[case.dp].index(case.cut)),
    ]
    return {frozenset(pair) for pair in itertools.combinations(values, 2)}


@functools.cache
def all_cases() -> list[Case]:
    """Every layout with every tuning, tied and not; the other options so that any two options meet in all their values."""
    chosen, seen = [], collections.Counter()
    for (mp, dp), tuning, tied in itertools.product(LAYOUTS, runs.TUNINGS, (True, False)):
        rare = {case: sum(0.25 ** seen[pair] for pair in pairs(case)) for case in candidates(mp, dp, tuning, tied)}
        chosen.append(max(rare, key=rare.__getitem__))
        seen.update(pairs(chosen[-1]))
    return chosen


def cases(mp: int, dp: int) -> list[Case]:
    return [case for case in all_cases() if (case.mp, case.dp) == (mp, dp)]


def test_the_cases_hold_every_pair_of_options():
    possible = itertools.product(LAYOUTS, runs.TUNINGS, (True, False))
    every = set().union(*(pairs(c) for (mp, dp), tuning, tied in possible for c in candidates(mp, dp, tuning, tied)))
    assert every == set().union(*map(pairs, all_cases()))


def baseline(case: Case) -> Case:
    return Case(1, 1, case.tuning, case.tied, case.heads)


# --- inside the ranks -------------------------------------------------------------------------------------------------


def train_all(these: list[Case]) -> list[dict]:
    """Each case's loss and norm by step; on rank 0 also its first gradients and, of one rank alone, the weights before."""
    results = []
    for case in these:
        run = runs.prepare(case)
        before = {n: local(p.detach()).clone() for n, p in run.model.named_parameters()}
        gradients = runs.keep_first_gradients(run)
        runs.train(run)
        for name, parameter in run.model.named_parameters():  # what is trained moves, all else stays, to the bit
            moved = (local(parameter.detach()) - before[name]).abs()
            assert moved.numel() == 0 or bool(moved.any()) == (name in run.trained), (case, name)
        odd = runs.mp_copies_differ(run)
        assert not odd, f"{case}: mp ranks no longer hold the same {odd}"
        result = {"loss": [line["loss"] for line in run.lines], "norm": [line["grad_norm"] for line in run.lines]}
        result |= {
            "validation": [line[key] for line in run.validations for key in ("step", "val_loss", "val_accuracy")],
            "gradients": gradients if groups.rank() == 0 else {},
            "before": before if case.mp * case.dp == 1 else {},
        }
        results.append(result)
    return results


# --- the reference ----------------------------------------------------------------------------------------------------


class Dense:
    """Meta's formulae on whole fp64 matrices, one sequence at a time, gradients by autograd."""

    def __init__(self, case: Case, trained: list[str], initial: dict[str, torch.Tensor]):
        self.case, self.args = case, case.args
        self.w = {n: t.double().requires_grad_(n in trained) for n, t in initial.items()}

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        y = x @ self.w[f"{name}.weight"].t()
        if f"{name}.lora_a.weight" in self.w:
            low = x @ self.w[f"{name}.lora_a.weight"].t() @ self.w[f"{name}.lora_b.weight"].t()
            y = (
                y + {"lora": 6.0 / 4, "lora+saved": 1.0}[self.case.tuning] * low
            )  # alpha / rank; alpha is rank by default
        return y + self.w[f"{name}.bias"] if f"{name}.bias" in self.w else y

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.args.norm_eps) * self.w[f"{name}.weight"]

    def attention(self, x: torch.Tensor, at: str) -> torch.Tensor:  # (T, D)
        length, a = len(x), self.args
        angles = torch.outer(
            torch.arange(length).double(), a.rope_theta ** -(torch.arange(0, a.head_size, 2).double() / a.head_size)
        )
        turn = torch.polar(torch.ones_like(angles), angles).unsqueeze(1)  # (T, 1, Dh/2) complex

        def rotated(y: torch.Tensor) -> torch.Tensor:
            return torch.view_as_real(torch.view_as_complex(y.unflatten(-1, (-1, 2))) * turn).flatten(-2)

        q, k, v = (self.linear(x, f"{at}.{name}").view(length, -1, a.head_size) for name in ("wq", "wk", "wv"))
        q, k = rotated(q), rotated(k)
        k, v = (t.repeat_interleave(a.n_heads // a.kv_heads, dim=1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(a.head_size)
        scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -math.inf)
        return self.linear(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1), f"{at}.wo")

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.w["tok_embeddings.weight"][ids]
        for i in range(self.args.n_layers):
            at = f"layers.{i}"
            x = x + self.attention(self.norm(x, f"{at}.attention_norm"), f"{at}.attention")
            h = self.norm(x, f"{at}.ffn_norm")
            gate = F.silu(self.linear(h, f"{at}.feed_forward.w1")) * self.linear(h, f"{at}.feed_forward.w3")
            x = x + self.linear(gate, f"{at}.feed_forward.w2")
        return (
            self.norm(x, "norm")
            @ self.w["tok_embeddings.weight" if self.args.tie_word_embeddings else "output.weight"].t()
        )

    def first_step(self) -> tuple[float, dict[str, torch.Tensor]]:
        """Mean loss of the first window and its gradient for every trained parameter."""
        data = runs.examples()
        window = next(train_windows(data, batch_size=runs.GROUP, sequences_per_step=runs.GROUP, dp_rank=0, dp_size=1, seed=3, epoch=0))
        loss, count = torch.zeros((), dtype=torch.float64), 0
        for example in (data[i] for i in window.sample_ids):
            ids = torch.from_numpy(example.ids).long()
            first = max(example.prompt_len, 1)
            if first < len(ids):
                loss = loss + F.cross_entropy(self.logits(ids)[first - 1 : -1], ids[first:], reduction="sum")
            count += num_targets(example)
        (loss / count).backward()
        return loss.item() / count, {n: t.grad for n, t in self.w.items() if t.grad is not None}


def differences(found: list[float], expected: list[float]) -> list[float]:
    return [abs(a - b) / b for a, b in zip(found, expected, strict=True)]


def same_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> str:
    """Fails unless every gradient is there, no entry is off by more than 1e-6 of the whole gradient's norm, and none by
    more than 1e-5 of its own tensor's largest: sums that cancel, such as wk.bias's, keep fewer digits in fp32. Returns the
    figures, with the relative L2 difference of the whole."""
    assert set(found) == set(expected)
    norm = math.sqrt(sum(g.double().square().sum().item() for g in expected.values()))
    total, largest, own = 0.0, 0.0, {}
    for name, gradient in expected.items():
        assert found[name].shape == gradient.shape, name
        assert gradient.any(), f"{name}: its gradient is zero, which proves nothing"
        error = (found[name].double() - gradient.double()).abs()
        total += error.square().sum().item()
        largest = max(largest, error.max().item())
        own[name] = error.max().item() / gradient.abs().max().item()
    total, largest, name = math.sqrt(total) / norm, largest / norm, max(own, key=own.__getitem__)
    assert largest <= TOLERANCE and own[name] <= 10 * TOLERANCE, (total, largest, name, own[name])
    return f"gradient {total:.1e}, an entry {largest:.1e}, of its tensor's largest {own[name]:.1e} ({name})"


def same_run(result: dict, alone: dict) -> str:
    """Fails unless losses, norms and first gradients agree. The first norm is that of equal weights; later ones of weights
    that AdamW moved by sign(g) where g is nothing but rounding."""
    loss, norm = differences(result["loss"], alone["loss"]), differences(result["norm"], alone["norm"])
    gradients = same_gradients(result["gradients"], alone["gradients"])
    assert max(loss) <= TOLERANCE, loss
    assert len(alone["validation"]) == 9  # before, between the two epochs, at the end
    assert result["validation"] == pytest.approx(alone["validation"], rel=TOLERANCE)
    assert norm[0] <= TOLERANCE and max(norm) <= 10 * TOLERANCE, norm
    return f"loss {max(loss):.1e}, norm {norm[0]:.1e} then {max(norm):.1e}, {gradients}"


# --- tests ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone() -> dict[Case, dict]:
    """Every kind of run on one rank, in its plainest form."""
    these = sorted({baseline(case) for case in all_cases()}, key=str)
    return dict(zip(these, run_ranks(train_all, these, world=1, timeout=120)[0]))


def test_one_rank_equals_a_dense_llama(alone):
    for case, result in alone.items():
        loss, gradients = Dense(case, list(result["gradients"]), result["before"]).first_step()
        norm = math.sqrt(sum(g.square().sum().item() for g in gradients.values()))
        figures = same_gradients(result["gradients"], gradients)
        error = differences([result["loss"][0], result["norm"][0]], [loss, norm])
        assert max(error) <= TOLERANCE, (case, error)
        assert norm > runs.OPTIM.clip_grad, "nothing is clipped"
        print(f"{case}: loss {error[0]:.1e}, norm {error[1]:.1e}, {figures}")


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout[0]}x{layout[1]}")
def test_every_layout_equals_one_rank(layout, alone):
    mp, dp = layout
    for case, result in zip(
        cases(mp, dp), run_ranks(train_all, cases(mp, dp), world=mp * dp, timeout=120)[0], strict=True
    ):
        print(f"{case}: {same_run(result, alone[baseline(case)])}")
