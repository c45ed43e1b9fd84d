"""Weights from files to a device, nothing computed with them; a process loads once. Imports are not counted, the files are in the
page cache, where whoever wrote them left them.

settings: way (WAYS). data: one (directory with a single .pth), hf (the same as safetensors), parameters. The "losses" are norms of
two matrices, which no format turns: the same numbers came there.
"""

from pathlib import Path
from typing import Callable

import torch

from bench import measure


def ours(data: dict, device: str, files: str) -> Callable[[], dict]:
    from accessory.model import Transformer

    return lambda: dict(Transformer.from_pretrained(data[files], device=device).named_parameters())


def safetensors(data: dict, device: str) -> Callable[[], dict]:
    from safetensors.torch import load_file

    files = sorted(Path(data["hf"]).glob("*.safetensors"))
    return lambda: {name: t for f in files for name, t in load_file(f, device=device).items()}


def transformers(data: dict, device: str) -> Callable[[], dict]:
    import transformers.models.llama.modeling_llama  # noqa: F401  an import, not loading
    from transformers import AutoModelForCausalLM

    def run() -> dict:
        model = AutoModelForCausalLM.from_pretrained(data["hf"], dtype=torch.bfloat16).to(device)
        return dict(model.named_parameters())

    return run


WAYS = {
    "ours_one": lambda data, device: ours(data, device, "one"),
    "ours_hf": lambda data, device: ours(data, device, "hf"),
    "safetensors": safetensors,
    "transformers": transformers,
}
COMPARED = (
    ("tok_embeddings.weight", "layers.1.feed_forward.w2.weight"),
    ("model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"),
)


def main() -> None:
    work = measure.begin()
    data, device, found = work["data"], work["device"], {}
    run = WAYS[work["settings"]["way"]](data, device)
    torch.empty(1, device=device)  # a GPU's context is made once a process, for any of them
    timed = measure.timed(lambda: found.update(run()), 0, 1, device)
    names = next(pair for pair in COMPARED if pair[0] in found)
    norms = [found[name].detach().float().norm().item() for name in names]
    measure.report(loss=norms, tokens=data["parameters"], **timed)


if __name__ == "__main__":
    main()
