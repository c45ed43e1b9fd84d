"""Qwen2 and Qwen3 divided over ranks: what they add to a LLaMA (biases on q, k, v; a norm over each head of q and k) trains,
saves, loads and generates alike at mp 1, 2, 4 and with 1, 2, 4 kv heads, which at mp 4 are held in copies.

Compared with one rank: loss, gradient norm, every first gradient, the weights after two steps, and what is written.
One rank is held against transformers in tests/unit/test_llama.py and tests/unit/test_training_reference.py.
"""

import contextlib
import functools
import io
import itertools
import json
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from accessory.checkpoint.formats import Checkpoint, open_checkpoint
from accessory.checkpoint.formats_write import write_hf
from accessory.generation.engine import generate
from accessory.model import ModelArgs, Transformer
from accessory.parallel import groups
from accessory.tokenizer import Tokenizer
from tests.dist import runs
from tests.dist.test_parity import differences, same_gradients
from tests.helpers import random_weights, run_ranks, tiny_args, write_tiny_checkpoint, write_tiny_data

FAMILIES: dict[str, dict] = {"qwen2": {"qkv_bias": True}, "qwen3": {"qk_norm": True}}
LAYOUTS = [(2, 1), (4, 1), (2, 2)]
TRAINED = [(kv, tuning) for kv in (1, 2, 4) for tuning in ("full", "lora")] + [(2, "bias+norm")]
STEPS = 2


def family_args(family: str, kv_heads: int, tied: bool = False) -> ModelArgs:
    return tiny_args(
        n_heads=12, n_kv_heads=kv_heads, head_dim=8, rope_theta=1e6, tie_word_embeddings=tied, **FAMILIES[family]
    )


@dataclass(frozen=True)
class FamilyCase(runs.Case):
    family: str = "qwen2"

    @property
    def args(self) -> ModelArgs:
        return family_args(self.family, int(self.heads.split("/")[1]), self.tied)


def cases(mp: int, dp: int) -> list[FamilyCase]:
    """At dp 2, where FSDP cuts what mp cut, two kv heads only."""
    cut = (runs.GROUP // dp, 1)
    return [
        FamilyCase(mp, dp, tuning, tied=kv == 2, heads=f"12/{kv}", cut=cut, checkpointing=kv == 1, family=family)
        for family, (kv, tuning) in itertools.product(FAMILIES, TRAINED)
        if dp == 1 or kv == 2
    ]


def alone(case: FamilyCase) -> FamilyCase:
    return FamilyCase(1, 1, case.tuning, case.tied, case.heads, family=case.family)


# --- inside the ranks -------------------------------------------------------------------------------------------------


def train_all(these: list[FamilyCase], directory: Path) -> list[dict]:
    """Two steps of each case, then its weights, written as its ranks' shards under `directory`."""
    results = []
    for number, case in enumerate(these):
        run = runs.prepare(case)
        before = {n: runs.whole(case.args, n, p).clone() for n, p in run.model.named_parameters()}
        gradients = runs.keep_first_gradients(run)
        runs.train(run, STEPS)
        odd = runs.mp_copies_differ(run)
        assert not odd, f"{case}: mp ranks no longer hold the same {odd}"
        after = {n: runs.whole(case.args, n, p).clone() for n, p in run.model.named_parameters()}
        still = [n for n in run.trained if torch.equal(before[n], after[n])]
        assert not still, f"{case}: {still} did not move"
        into = directory / f"{case.mp}x{case.dp}-{number}"
        if groups.rank() == 0:
            into.mkdir()
        groups.barrier()
        terms = {"lora_alpha": 6.0} if case.tuning == "lora" else {}
        runs.write_model(run, into, case.args.to_dict() | terms, embedding_dim=number % 2)
        groups.barrier()
        result = {"loss": [x["loss"] for x in run.lines], "norm": [x["grad_norm"] for x in run.lines], "into": into}
        if groups.rank() == 0:
            result |= {"gradients": gradients, "before": before, "after": after, "trained": run.trained}
        results.append(result)
    return results


def logits_and_answers(paths: list[Path], mp: int) -> list[tuple[torch.Tensor, list[list[int]]]]:
    found = []
    for path in paths:
        groups.forget_model_parallel()
        model = Transformer.from_pretrained(path, model_parallel_size=mp)
        tokens = torch.randint(0, 101, (2, 20), generator=torch.Generator().manual_seed(5))
        with torch.no_grad():
            logits = model(tokens)
            prompts = [tokens[0, :7].tolist(), tokens[1, :3].tolist()]
            answers = generate(model, prompts, 6)
            for prompt, answer in zip(prompts, answers):  # without the cache
                whole = list(prompt)
                for _ in range(6):
                    whole.append(model(torch.tensor([whole]))[0, -1].argmax().item())
                assert whole == prompt + answer, (path, prompt, answer)
        found.append((logits, answers))
    return found


# --- tests ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


@pytest.fixture(scope="module")
def one_rank(directory: Path) -> dict[FamilyCase, dict]:
    these = sorted({alone(case) for case in cases(1, 1)}, key=str)
    return dict(zip(these, run_ranks(train_all, these, directory, world=1)[0]))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout[0]}x{layout[1]}")
def test_training_is_that_of_one_rank(layout: tuple[int, int], one_rank: dict, directory: Path) -> None:
    these = cases(*layout)
    results = run_ranks(train_all, these, directory, world=layout[0] * layout[1])[0]
    for case, result in zip(these, results, strict=True):
        expected = one_rank[alone(case)]
        assert result["trained"] == expected["trained"]
        assert all(torch.equal(t, expected["before"][n]) for n, t in result["before"].items()), case
        figures = same_gradients(result["gradients"], expected["gradients"])
        loss, norm = (differences(result[key], expected[key]) for key in ("loss", "norm"))
        assert max(loss) <= 1e-6 and norm[0] <= 1e-6 and max(norm) <= 1e-5, (case, loss, norm)
        moves = {n: moved_apart(expected["before"][n], t, expected["after"][n]) for n, t in result["after"].items()}
        assert max(moves.values()) <= 0.03, (case, moves)
        assert all(moves[n] == 0 for n in moves if n not in result["trained"])
        same_file(case, result)
        print(f"{case}: loss {max(loss):.1e}, norm {max(norm):.1e}, {figures}, moves {max(moves.values()):.1e}")


def moved_apart(before: torch.Tensor, found: torch.Tensor, expected: torch.Tensor) -> float:
    """How far apart two runs' weights are, against how far they moved: L2 of the tensor, since AdamW moves an entry whose
    gradient is nothing but rounding by a whole step."""
    apart = (found - expected).norm().item()
    return apart / (expected - before).norm().item() if apart else 0.0


def same_file(case: FamilyCase, result: dict) -> None:
    """The shards that the ranks wrote are the weights, and tell what kind of model it is."""
    checkpoint = open_checkpoint(result["into"])
    assert set(checkpoint.source.names()) == set(result["after"])
    for name, value in result["after"].items():
        assert torch.equal(checkpoint.source.read(name), value), (case, name)
    args = ModelArgs.from_dict(checkpoint.params)
    biased = case.tuning == "bias+norm"  # all seven linears
    assert (args.qk_norm, args.attention_bias, args.mlp_bias) == (case.family == "qwen3", biased, biased)
    assert args.qkv_bias == (case.family == "qwen2")
    assert (checkpoint.adapter is not None) == (case.tuning == "lora")
    assert not (checkpoint.adapter or {}).get("bias_tuning")  # Qwen2's biases are its own, no tuning's


@functools.cache
def prompts_of_one_rank(paths: tuple[Path, ...]) -> list:
    return run_ranks(logits_and_answers, list(paths), 1, world=1)[0]


@pytest.mark.parametrize("mp", [2, 4])
def test_logits_and_generation_are_those_of_one_rank(mp: int, directory: Path) -> None:
    paths = []
    for family, kv in itertools.product(FAMILIES, (1, 2, 4)):
        paths.append(directory / f"{family}-{kv}")
        if not paths[-1].exists():
            write_tiny_checkpoint(paths[-1], family_args(family, kv), shards=kv)
    expected = prompts_of_one_rank(tuple(paths))
    ranks = run_ranks(logits_and_answers, paths, mp, world=mp)
    for found in ranks:
        for (logits, answers), (truth, same) in zip(found, expected, strict=True):
            assert (logits - truth).abs().max() <= 2e-5 * truth.abs().max() and answers == same


def test_lora_inside_and_biases_of_tuning_open_at_two_ranks(one_rank: dict, directory: Path) -> None:
    """What a run wrote beside what the family has: same logits and answers at mp 1 and 2."""
    paths = [
        directory / f"1x1-{i}"
        for i, case in enumerate(one_rank)
        if case.heads == "12/2" and case.tuning in ("lora", "bias+norm")
    ]
    expected = prompts_of_one_rank(tuple(paths))
    for (logits, answers), (truth, same) in zip(run_ranks(logits_and_answers, paths, 2, world=2)[0], expected):
        assert (logits - truth).abs().max() <= 2e-5 * truth.abs().max() and answers == same


# --- main_finetune ------------------------------------------------------------------------------------------------------


def finetune(flags: dict[str, object]) -> None:
    """`python -m accessory.main_finetune`, in the ranks that are there."""
    sys.argv = ["main_finetune", *itertools.chain(*((f"--{k}", str(v)) for k, v in flags.items()))]
    with contextlib.redirect_stdout(io.StringIO()):
        runpy.run_module("accessory.main_finetune", run_name="__main__")


def qwen_directory(directory: Path, kind: str) -> Path:
    """A Hugging Face directory as Qwen's are: config.json, safetensors, tokenizer.json and what lies beside it."""
    pytest.importorskip("transformers")
    from tests.unit.test_llama import peer
    from tests.unit.test_qwen_tokenizer import write_qwen_tokenizer

    sizes = {"vocab_size": 292, "n_kv_heads": 2, "rope_theta": 1e6, "tie_word_embeddings": True}  # 285 tokens: padded
    peer(kind=kind, head_dim=16, **sizes).save_pretrained(directory)
    write_qwen_tokenizer(directory)
    return directory


FLAGS = {"max_steps": 2, "batch_size": 4, "lr": 1e-3, "report_to": "none", "precision": "fp32", "keep_best": "false"}


@pytest.mark.parametrize("mp", [1, 2])
@pytest.mark.parametrize("kind", ["Qwen2", "Qwen3"])
@pytest.mark.parametrize("tuning", [{}, {"lora_rank": 2, "lora_targets": "wq,wk,w2"}], ids=["full", "lora"])
def test_finetuning_from_hugging_face_to_hugging_face(tmp_path: Path, tuning: dict, kind: str, mp: int) -> None:
    base, data = qwen_directory(tmp_path / "base", kind), write_tiny_data(tmp_path / "data", 12)
    flags = FLAGS | {"pretrained_path": base, "data_config": data, "output_dir": tmp_path / "run"} | tuning
    run_ranks(finetune, flags | {"model_parallel_size": mp}, world=mp)
    saved = open_checkpoint((tmp_path / "run/latest").resolve())
    args, there = ModelArgs.from_dict(saved.params), ModelArgs.from_dict(open_checkpoint(base).params)
    assert args == there and (args.qkv_bias, args.qk_norm) == (kind == "Qwen2", kind == "Qwen3")
    written = json.loads((saved.path / "params.json").read_text())
    assert {k: written[k] for k in ("qkv_bias", "qk_norm", "attention_bias")} == {
        "qkv_bias": kind == "Qwen2",
        "qk_norm": kind == "Qwen3",
        "attention_bias": False,
    }
    assert Tokenizer.open(saved.tokenizer).eos_ids == Tokenizer.open(base).eos_ids
    tokens = torch.randint(0, 285, (2, 20), generator=torch.Generator().manual_seed(5))
    groups.forget_model_parallel()
    with torch.no_grad():
        before, after = (Transformer.from_pretrained(path)(tokens) for path in (base, saved.path))
    assert (after - before).abs().max() > 0.01
    if tuning:
        assert saved.adapter["lora_rank"] == 2 and not saved.adapter["bias_tuning"]
    else:
        the_same_in_transformers(tmp_path / "hf", saved, f"{kind}ForCausalLM", tokens, after)


def the_same_in_transformers(directory: Path, saved: Checkpoint, kind: str, tokens: torch.Tensor, logits: torch.Tensor):
    import transformers

    directory.mkdir()
    write_hf(directory, saved.source, ModelArgs.from_dict(saved.params), saved.tokenizer)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        truth = theirs(tokens).logits
    assert type(theirs).__name__ == kind and (logits - truth).abs().max() <= 2e-5 * truth.abs().max()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    assert tokenizer("It is 42.")["input_ids"] == Tokenizer.open(saved.tokenizer).encode("It is 42.")


def test_random_weights_have_what_the_family_adds() -> None:
    """The cases above prove something only if these are there and not neutral."""
    for family, name in (("qwen2", "layers.0.attention.wk.bias"), ("qwen3", "layers.1.attention.k_norm.weight")):
        value = random_weights(family_args(family, 2))[name]
        assert value.std() > 0.05
