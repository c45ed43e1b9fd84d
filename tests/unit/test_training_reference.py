"""Training against transformers and PEFT: the same 20 losses, gradient norms and weights from a hand loop on their models.

    ours    Hugging Face directory -> open_pretrained, build, mark_trainable, materialise, adamw, loop.fit    (main_finetune's steps)
    theirs  LlamaForCausalLM (+ get_peft_model), padded batches, the window's summed loss over its tokens, clip_grad_norm_,
            torch.optim.AdamW, transformers' schedule

fp32, the same data in the same order, no dropout. 22 examples of different lengths in windows of up to 6: the last is short.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from accessory import log
from accessory.data.loader import train_windows
from accessory.data.sft import Example
from accessory.flags import ParallelArgs
from accessory.model import shard_dim
from accessory.model.llama import kv_copied
from accessory.model.lora import LINEARS, TuningArgs, mark_trainable, partial_grad
from accessory.model.pretrained import build, open_pretrained
from accessory.parallel.grads import GradientRules
from accessory.train import loop, objectives, optim
from accessory.train.start import materialise
from accessory.train.state import TrainState
from tests.helpers import gathered
from tests.unit.test_llama import LLAMA3, meta_name, meta_tensor, peer

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

STEPS = 20
BOUND = 1e-4  # relative, of every loss of the curve
HF_LINEARS = dict(
    zip(
        ("wq", "wk", "wv", "wo", "w1", "w2", "w3"),
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj"),
    )
)
HF_MODULES = {"tok_embeddings": "embed_tokens", "output": "lm_head"}

CASES: dict[str, dict[str, Any]] = {  # model: test_llama.peer's keys; tuning, optim, loop: the flags
    "full, tied, GQA, accumulation, clipping, decay": {
        "model": {"n_kv_heads": 2, "tie_word_embeddings": True},
        "optim": {"lr": 2e-3, "weight_decay": 0.1, "clip_grad": 1.0},
        "loop": {"batch_size": 2, "accum_iter": 3},
    },
    "full, untied, llama3 rope, linear schedule": {
        "model": {"scaling": LLAMA3},
        "optim": {"lr": 1e-3, "clip_grad": 0.0, "lr_scheduler": "linear", "adam_betas": [0.8, 0.99]},
        "loop": {"batch_size": 6},
    },
    "LoRA, all seven, accumulation, clipping": {
        "model": {"n_kv_heads": 2},
        "tuning": {"lora_rank": 4, "lora_alpha": 16.0},
        "optim": {"lr": 5e-3, "clip_grad": 0.5},
        "loop": {"batch_size": 3, "accum_iter": 2},
    },
    "LoRA, wq and wv, no alpha, ddp": {
        "model": {"tie_word_embeddings": True},
        "tuning": {"lora_rank": 3, "lora_targets": ["wq", "wv"]},
        "optim": {"lr": 5e-2},
        "loop": {"batch_size": 6},
        "data_parallel": "ddp",
    },
    "LoRA, modules_to_save, norms, checkpointing": {
        "model": {"n_kv_heads": 1},
        "tuning": {
            "lora_rank": 2,
            "lora_alpha": 4.0,
            "lora_targets": ["wk", "w2"],
            "modules_to_save": ["tok_embeddings", "output"],
            "norm_tuning": True,
        },
        "optim": {"lr": 5e-3},
        "loop": {"batch_size": 1, "accum_iter": 6},
        "checkpointing": True,
    },
    "Qwen2, full, tied, GQA, accumulation, clipping": {
        "model": {"kind": "Qwen2", "n_kv_heads": 2, "tie_word_embeddings": True},
        "optim": {"lr": 2e-3, "weight_decay": 0.1, "clip_grad": 1.0},
        "loop": {"batch_size": 2, "accum_iter": 3},
    },
    "Qwen3, full, GQA": {
        "model": {"kind": "Qwen3", "n_kv_heads": 2, "head_dim": 16},
        "optim": {"lr": 1e-3, "clip_grad": 1.0},
        "loop": {"batch_size": 6},
    },
    "Qwen2, LoRA on the biased three": {
        "model": {"kind": "Qwen2", "n_kv_heads": 2},
        "tuning": {"lora_rank": 4, "lora_alpha": 8.0, "lora_targets": ["wq", "wk", "wv"]},
        "optim": {"lr": 1e-2, "clip_grad": 0.5},
        "loop": {"batch_size": 3, "accum_iter": 2},
    },
    "Qwen3, LoRA, wq and wk, norms": {
        "model": {"kind": "Qwen3", "n_kv_heads": 2, "head_dim": 16},
        "tuning": {"lora_rank": 2, "lora_targets": ["wq", "wk"], "norm_tuning": True},
        "optim": {"lr": 3e-2},
        "loop": {"batch_size": 6},
        "checkpointing": True,
    },
    "biases and norms": {
        "model": {"n_kv_heads": 2},
        "tuning": {"bias_tuning": True, "norm_tuning": True},
        "optim": {"lr": 2e-2},
        "loop": {"batch_size": 2, "accum_iter": 2},
        "data_parallel": "sdp",
    },
}


def examples(n: int = 22) -> list[Example]:
    """Questions and answers with something to learn: the answer counts on from the last token of the prompt."""
    draw = np.random.RandomState(0)
    made = []
    for i in range(n):
        prompt, length = draw.randint(3, 101, size=draw.randint(1, 9)), draw.randint(1, 12)
        answer = (prompt[-1] + np.arange(1, length + 1)) % 101
        made.append(Example(np.concatenate([prompt, answer]).astype(np.int32), 0 if i == 5 else len(prompt)))
    return made


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_twenty_steps_are_those_of_transformers_and_peft(tmp_path: Path, case: dict) -> None:
    data, tuning = examples(), TuningArgs(**case.get("tuning", {}))
    optim_args = optim.OptimArgs(**{"warmup_ratio": 0.0} | case["optim"])
    loop_args = loop.LoopArgs(max_steps=STEPS, eval_steps=1000, save_steps=1000, seed=3, **case["loop"])
    base = peer(**case["model"])
    base.save_pretrained(tmp_path / "hf")

    ours, start, records = train_ours(tmp_path, data, tuning, optim_args, loop_args, case)
    theirs, truth = train_theirs(base, data, tuning, optim_args, loop_args, start, case)

    losses, expected = (np.array([r["loss"] for r in rs]) for rs in (records, truth))
    assert len(losses) == STEPS and expected[-4:].mean() < 0.9 * expected[:4].mean(), expected  # it learns
    assert np.abs(losses / expected - 1).max() <= BOUND, np.abs(losses / expected - 1)
    for key in ("lr", "grad_norm"):
        values, expected = (np.array([r[key] for r in rs]) for rs in (records, truth))
        assert np.abs(values / expected - 1).max() <= (1e-9 if key == "lr" else 1e-3), key
    if optim_args.clip_grad:
        assert max(r["grad_norm"] for r in truth) > optim_args.clip_grad  # so clipping was part of it
    for name, value in ours.items():
        moved = (value - start[name]).abs().max()
        assert (moved > 0) == (name in theirs), name
        if name in theirs:
            assert (value - theirs[name]).abs().max() <= 0.02 * moved, name


def train_ours(
    tmp_path: Path,
    data: list[Example],
    tuning: TuningArgs,
    optim_args: optim.OptimArgs,
    loop_args: loop.LoopArgs,
    case: dict,
):
    """-> (weights after, weights before, lines of metrics.jsonl). main_finetune's own steps, on one rank."""
    parallel = ParallelArgs(
        precision="fp32",
        data_parallel=case.get("data_parallel", "fsdp"),
        checkpointing=case.get("checkpointing", False),
    )
    checkpoint, args = open_pretrained(tmp_path / "hf")
    model = build(checkpoint, args, tuning)
    mark_trainable(model, tuning)
    materialise(model, checkpoint, parallel, loop_args.seed)
    optimizer = optim.adamw(model, optim_args)
    rules = GradientRules(
        model, args.kv_heads, shard_dim, partial_grad, kv_copied, cut_over_dp=parallel.data_parallel != "ddp"
    )
    start = weights_of(model)
    run_log, saved = log.RunLog(tmp_path, 0, (), None, STEPS), []
    state = loop.fit(
        model, optimizer, rules, objectives.next_token, data, TrainState(), loop_args, optim_args,
        precision="fp32", data_parallel=parallel.data_parallel, num_workers=0, run_log=run_log,
        evaluate=None, sample=None, save_best=False, save=lambda s: saved.append(s.step),
    )  # fmt: skip
    run_log.close()
    assert state.step == STEPS and saved == [STEPS] and state.skipped_steps == 0
    return (
        weights_of(model),
        start,
        [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()],
    )


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: gathered(p.detach()).clone() for n, p in model.named_parameters()}


def train_theirs(
    base: Any,
    data: list[Example],
    tuning: TuningArgs,
    optim_args: optim.OptimArgs,
    loop_args: loop.LoopArgs,
    start: dict,
    case: dict,
):
    """-> (trained weights after, under our names; [{loss, lr, grad_norm}] of every step)."""
    model = tuned_peer(base, tuning, start, case)
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": optim_args.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        [g for g in groups if g["params"]],
        lr=optim_args.lr,
        betas=tuple(optim_args.adam_betas),
        eps=optim_args.adam_eps,
        fused=False,
    )
    schedule = transformers.get_scheduler(
        optim_args.lr_scheduler, optimizer, num_warmup_steps=0, num_training_steps=STEPS
    )
    curve, epoch = [], 0
    while len(curve) < STEPS:
        order = train_windows(
            data,
            batch_size=loop_args.batch_size,
            sequences_per_step=loop_args.sequences_per_step(1),
            dp_rank=0,
            dp_size=1,
            seed=loop_args.seed,
            epoch=epoch,
        )
        for ids in [window.sample_ids for window in order][: STEPS - len(curve)]:
            micro = [ids[i : i + loop_args.batch_size] for i in range(0, len(ids), loop_args.batch_size)]
            targets = sum(max(len(data[i].ids) - max(data[i].prompt_len, 1), 0) for i in ids)
            total = 0.0
            for part in micro:
                loss = summed_loss(model, [data[i] for i in part]) / targets
                loss.backward()
                total += loss.item()
            norm = torch.nn.utils.clip_grad_norm_(trained, optim_args.clip_grad or float("inf"))
            curve.append({"loss": total, "lr": schedule.get_last_lr()[0], "grad_norm": norm.item()})
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        epoch += 1
    return trained_weights(model), curve


def tuned_peer(base: Any, tuning: TuningArgs, start: dict[str, torch.Tensor], case: dict) -> Any:
    """Their model with the same things trained; LoRA's A starts as ours did (PEFT draws its own), B at zero."""
    if tuning.bias_tuning:
        biased = peer(**case["model"], attention_bias=True, mlp_bias=True)
        with torch.no_grad():
            for name, p in biased.named_parameters():
                p.copy_(base.get_parameter(name) if not name.endswith(".bias") else torch.zeros_like(p))
                p.requires_grad_(name.endswith(".bias") or "norm" in name)
        return biased
    if not tuning.lora_rank:
        return base
    targets = [HF_LINEARS[t] for t in tuning.lora_targets]
    alpha = tuning.lora_rank if tuning.lora_alpha is None else tuning.lora_alpha
    saved = [HF_MODULES[m] for m in tuning.modules_to_save]
    model = peft.get_peft_model(
        base,
        peft.LoraConfig(
            r=tuning.lora_rank,
            lora_alpha=alpha,
            target_modules=targets,
            lora_dropout=0.0,
            modules_to_save=saved or None,
        ),
    )
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_A" in name:
                p.copy_(start[our_name(name)])
            assert "lora_B" not in name or not p.any()
            if "norm" in name and tuning.norm_tuning:
                p.requires_grad_(True)
    return model


def our_name(name: str) -> str:
    """A parameter of a PEFT model under our name."""
    for word in ("base_model.model.", ".default", "base_layer.", "modules_to_save."):
        name = name.replace(word, "")
    return meta_name(name).replace("lora_A", "lora_a").replace("lora_B", "lora_b")


def trained_weights(model: Any) -> dict[str, torch.Tensor]:
    """q's and k's rows turn to Meta's order in W, in B and in biases, never in A."""
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    return {our_name(n): p.detach() if "lora_A" in n else meta_tensor(n, p, head_dim=16) for n, p in trained}


def summed_loss(model: Any, chosen: list[Example]) -> torch.Tensor:
    """Cross-entropy of the answers' tokens, summed; rows padded on the right."""
    longest = max(len(e.ids) for e in chosen)
    tokens, labels, mask = (
        torch.zeros(len(chosen), longest, dtype=torch.long),
        torch.full((len(chosen), longest), -100),
        torch.zeros(len(chosen), longest),
    )
    for row, example in enumerate(chosen):
        ids, n = torch.from_numpy(example.ids.astype(np.int64)), len(example.ids)
        tokens[row, :n], mask[row, :n] = ids, 1
        labels[row, example.prompt_len : n] = ids[example.prompt_len :]
    logits = model(input_ids=tokens, attention_mask=mask.long()).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")


def test_validation_is_the_mean_over_tokens(tmp_path: Path) -> None:
    data, base = examples(), peer(n_kv_heads=2)
    base.save_pretrained(tmp_path / "hf")
    checkpoint, args = open_pretrained(tmp_path / "hf")
    model = build(checkpoint, args, TuningArgs())
    materialise(model, checkpoint, ParallelArgs(precision="fp32"), 0)
    model.train()
    with torch.no_grad():
        loss = sum(summed_loss(base, [e]).item() for e in data)
        counts = [len(e.ids) - max(e.prompt_len, 1) for e in data]
        right = 0
        for e in data:
            ids = torch.from_numpy(e.ids.astype(np.int64))
            guesses = base(ids.unsqueeze(0)).logits[0, :-1].argmax(-1)
            right += (guesses == ids[1:])[max(e.prompt_len, 1) - 1 :].sum().item()
    for batch_size in (1, 5, 64):
        result = loop.evaluate(model, objectives.next_token, data, batch_size, show_progress=False)
        assert result["val_loss"] == pytest.approx(loss / sum(counts), rel=1e-6)
        assert result["val_perplexity"] == pytest.approx(np.exp(loss / sum(counts)), rel=1e-5)
        assert result["val_accuracy"] == right / sum(counts)
        assert model.training


def test_every_linear_has_a_counterpart() -> None:
    assert set(HF_LINEARS) == set(LINEARS)
