"""A checkpoint of any shape with random weights, written without holding it: to try a layout, a machine or a plan.

python tools/random_checkpoint.py --llama_config model_configs/llama2_7b.json --dst /tmp/random_7b [--dtype bf16]
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from accessory import config
from accessory.checkpoint.formats_write import dtype_of, new_directory, write_consolidated
from accessory.model import ModelArgs, Transformer
from accessory.model.llama import global_shape

BLOCK = 2**24  # values drawn once and laid over every tensor


def main(*, llama_config: str, dst: str, dtype: str = "bf16", vocab_size: int = 32000, seed: int = 0) -> None:
    """Writes consolidated.00.pth and params.json with normal weights of std 0.02 (norms 1); a block of values repeats.

    --llama_config is a file such as model_configs/llama2_7b.json; --vocab_size counts where that file says none."""
    stored = dtype_of(dtype)
    args = ModelArgs.from_files([llama_config])
    if args.vocab_size < 1:
        args = ModelArgs.from_dict(args.to_dict() | {"vocab_size": vocab_size})
    specs = {n: (global_shape(args, n), stored) for n, _ in Transformer(args).named_parameters()}
    block = torch.empty(BLOCK).normal_(0, 0.02, generator=torch.Generator().manual_seed(seed)).to(stored)
    with new_directory(dst) as directory:
        tensors = random_tensors(tqdm(specs.items(), "writing", unit="tensor"), block)
        write_consolidated(directory, tensors, args.to_dict(), style="meta_ori", specs=specs)
    print(f"{dst}: {len(specs)} tensors")


def random_tensors(specs, block: Tensor) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) one after the other; each tensor begins elsewhere in the block, so that no two are alike."""
    for i, (name, (shape, dtype)) in enumerate(specs):
        tensor = torch.ones(shape, dtype=dtype)
        if "norm." not in name:
            values = block.roll(-7919 * i)
            for start in range(0, tensor.numel(), BLOCK):
                part = tensor.view(-1)[start : start + BLOCK]
                part.copy_(values[: len(part)])
        yield name, tensor


if __name__ == "__main__":
    config.run_tool(main)
