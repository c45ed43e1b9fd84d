"""stories260K's oracle values at mp 2 and 4: every layout on disk, the same full logits on every rank.

tests/unit/test_llama.py has them at mp 1."""

import json

import pytest
import torch

from accessory.generation.engine import generate
from accessory.model import Transformer
from tests.helpers import assets, run_ranks

LAYOUTS = ("meta", "meta-mp2-llama2style", "meta-mp2-llama3style", "hf", "gguf/stories260K-f32.gguf")


NEW_TOKENS = 24  # by the cache: each is a dozen all-reduces, and ranks outnumber cores


def answers(path: str, mp: int, prompt: list[int], greedy: list[int]) -> tuple[torch.Tensor, list[int], list[int]]:
    """On a rank: (logits of the prompt, the best token after every prefix of `greedy`, the first ids by the cache)."""
    with torch.no_grad():
        model = Transformer.from_pretrained(path, model_parallel_size=mp, dtype=torch.float32)
        best = model(torch.tensor([greedy[:-1]]))[0].argmax(-1).tolist()
        return model(torch.tensor([prompt]))[0], best, generate(model, [greedy[:1]], NEW_TOKENS)[0]


def mixed_answers(path: str, prompt: list[int]) -> torch.Tensor:
    """At mp 2 x dp 2: the two replicas agree."""
    with torch.no_grad():
        return Transformer.from_pretrained(path, model_parallel_size=2, dtype=torch.float32)(torch.tensor([prompt]))[0]


@pytest.mark.parametrize("mp", [2, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_stories260k(layout: str, mp: int) -> None:
    expected = json.loads(assets("stories260K", "expected.json").read_text())
    ids = expected["greedy_from_bos_ids"]
    results = run_ranks(answers, str(assets("stories260K", layout)), mp, expected["prompt_ids"], ids, world=mp)
    truth = torch.tensor(expected["logits_last_first16"])
    for logits, best, generated in results:
        assert torch.equal(logits, results[0][0])  # replicated, bit for bit
        assert (logits[-1, :16] - truth).abs().max() <= 2e-5 * logits.abs().max()
        assert logits.double().sum().item() == pytest.approx(expected["logits_sum"], abs=2e-5 * logits.numel())
        assert logits.argmax(-1).tolist() == expected["argmax"]
        assert best == ids[1:]  # greedy is this at every step: all 258 ids, in one pass
        assert generated == ids[1 : NEW_TOKENS + 1]


def test_replicas_agree() -> None:
    expected = json.loads(assets("stories260K", "expected.json").read_text())
    results = run_ranks(mixed_answers, str(assets("stories260K", "meta")), expected["prompt_ids"], world=4)
    assert all(torch.equal(logits, results[0]) for logits in results)
    assert results[0].argmax(-1).tolist() == expected["argmax"]
