"""Generation: the cache against no cache, batches against single prompts, greedy against transformers, sampling by its statistics."""

import itertools

import pytest
import torch

from accessory.generation.engine import KVCache, choose, generate
from accessory.model import Transformer
from tests.unit.test_llama import LLAMA3, assert_near, carry, peer, tokens_of

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def pair() -> tuple:
    model = peer(LLAMA3, n_kv_heads=2, tie_word_embeddings=True)
    return carry(model, LLAMA3), model


def prompts_of(*lengths: int) -> list[list[int]]:
    return [tokens_of(1, n, seed=n)[0].tolist() for n in lengths]


@pytest.mark.parametrize("steps", [[20], [1] * 20, [7, 1, 1, 11], [19, 1]], ids=str)
@torch.no_grad()
def test_logits_with_a_cache_are_those_without(pair: tuple, steps: list[int]) -> None:
    model, _ = pair
    tokens = tokens_of(3, 20)
    cache, parts = KVCache(len(model.layers), 3, 25), []
    for start, stop in itertools.pairwise([0, *itertools.accumulate(steps)]):
        positions = torch.arange(start, stop).expand(3, -1)
        cache.begin(positions)
        parts.append(model(tokens[:, start:stop], positions=positions, cache=cache))
    assert_near(torch.cat(parts, 1), model(tokens), 2e-6)


def test_a_batch_of_different_lengths_is_its_prompts_one_by_one(pair: tuple) -> None:
    model, _ = pair
    prompts = prompts_of(3, 17, 1, 8, 17)
    together = generate(model, prompts, 12)
    assert together == [generate(model, [p], 12)[0] for p in prompts]
    assert [len(a) for a in together] == [12] * 5 and len({tuple(a) for a in together}) > 2


@torch.no_grad()
def greedy_without_cache(model: Transformer, prompt: list[int], n: int) -> list[int]:
    ids = list(prompt)
    for _ in range(n):
        ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
    return ids[len(prompt) :]


def test_greedy_is_that_of_transformers(pair: tuple) -> None:
    model, theirs = pair
    prompts = prompts_of(2, 9, 30)
    for prompt, answer in zip(prompts, generate(model, prompts, 60)):  # past the old context of 64
        assert answer == greedy_without_cache(model, prompt, 60)
        ids = torch.tensor([prompt])
        truth = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=60,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert answer == truth[0, len(prompt) :].tolist()


def test_end_tokens_end_a_row_and_are_not_returned(pair: tuple) -> None:
    model, theirs = pair
    prompts = prompts_of(4, 9, 30)
    free = generate(model, prompts, 20)
    ends = [free[0][5], free[1][2]]
    cut = [row[: min((row.index(e) for e in ends if e in row), default=20)] for row in free]
    assert generate(model, prompts, 20, eos_ids=ends) == cut
    assert len(cut[0]) <= 5 and len(cut[1]) <= 2
    ids = torch.tensor([prompts[0]])
    truth = theirs.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, eos_token_id=ends, pad_token_id=0
    )
    assert truth[0, 4:].tolist()[: len(cut[0])] == cut[0] and truth[0, -1].item() in ends
    first = [row[0] for row in free]
    assert generate(model, prompts, 20, eos_ids=first) == [[], [], []]


def test_lengths_modes_and_errors(pair: tuple) -> None:
    model, _ = pair
    assert [len(a) for a in generate(model, prompts_of(3, 5), 1)] == [1, 1]
    assert generate(model, prompts_of(3, 5), 0) == [[], []]
    for prompts in ([], [[1], []]):
        with pytest.raises(ValueError, match="a prompt is empty"):
            generate(model, prompts, 4)
    for training in (True, False):
        model.train(training)
        generate(model, prompts_of(2), 2)
        assert model.training is training
    assert not any(p.grad is not None for p in model.parameters())


def test_a_sliding_window_is_refused_when_generation_reaches_it() -> None:
    model = peer(mistral=True, sliding_window=16)
    ours, prompt = carry(model, sliding_window=16), prompts_of(10)[0]
    ids = torch.tensor([prompt])
    truth = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=7, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert generate(ours, [prompt], 7) == [truth[0, 10:].tolist()]  # the 17th token is chosen from 16
    with pytest.raises(ValueError, match="17 tokens, .* sliding window of 16"):
        generate(ours, [prompt], 8)


# --- sampling ---------------------------------------------------------------------------------------------------------


def test_sampling_depends_on_the_seed_alone(pair: tuple) -> None:
    model, _ = pair
    prompts = prompts_of(6) * 2

    def draw(seed: int, **options) -> list[list[int]]:
        return generate(model, prompts, 15, temperature=1.0, seed=seed, **options)

    torch.manual_seed(1)
    once = draw(0)
    torch.manual_seed(2)  # nobody else's randomness plays a part
    assert draw(0) == once != draw(1)
    assert once[0] != once[1]  # nor do rows repeat each other
    greedy = generate(model, prompts, 15)
    assert (
        greedy
        == generate(model, prompts, 15, temperature=1e-4)
        == generate(model, prompts, 15, temperature=1.0, top_p=1e-6)
    )
    assert once[0] != greedy[0]


def assert_distributed(counts: torch.Tensor, probabilities: torch.Tensor) -> None:
    """Pearson's chi-square within 5 standard deviations of its mean, and nothing where the probability is zero."""
    assert not counts[probabilities == 0].any()
    expected = probabilities[probabilities > 0] * counts.sum()
    chi, freedom = ((counts[probabilities > 0] - expected) ** 2 / expected).sum().item(), len(expected) - 1
    assert abs(chi - freedom) <= 5 * (2 * freedom) ** 0.5 + 1, (chi, freedom)


@pytest.mark.parametrize(
    "temperature, top_p", [(1.0, 1.0), (0.5, 1.0), (2.0, 1.0), (1.0, 0.7), (1.5, 0.95), (0.7, 0.3)]
)
def test_the_draws_follow_the_softmax(temperature: float, top_p: float) -> None:
    logits = torch.randn(9, generator=torch.Generator().manual_seed(3))
    warped = logits.unsqueeze(0) / temperature
    if top_p < 1:
        warped = transformers.TopPLogitsWarper(top_p)(None, warped)
    draws = choose(logits.expand(40000, 9), temperature, top_p, torch.Generator().manual_seed(0))
    assert_distributed(draws.bincount(minlength=9).float(), warped.softmax(-1)[0])
    if top_p < 1:
        assert 1 < len(draws.unique()) < 9 or top_p == 0.3


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
def test_top_p_keeps_what_transformers_keeps(top_p: float) -> None:
    logits = 2 * torch.randn(40, 101, generator=torch.Generator().manual_seed(4))
    kept = transformers.TopPLogitsWarper(top_p)(None, logits).isfinite()
    generator = torch.Generator().manual_seed(5)
    seen = torch.zeros_like(kept)
    for _ in range(300):
        seen[torch.arange(40), choose(logits, 1.0, top_p, generator)] = True
    assert not (seen & ~kept).any()
    assert (seen.sum(-1) == kept.sum(-1)).all() or top_p > 0.05
