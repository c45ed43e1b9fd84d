"""A checkpoint of any shape with random weights, written without holding it: to try a layout, a machine or a plan.

python tools/random_checkpoint.py --llama_config model_configs/llama2_7b.json --dst /tmp/random_7b [--dtype bf16]
"""

import mmap

import torch
from tqdm import tqdm

from accessory import config
from accessory.checkpoint.formats_write import DTYPES, new_directory, write_json
from accessory.model import ModelArgs, Transformer
from accessory.model.llama import global_shape

BLOCK = 2**24  # values drawn once and laid over every tensor


def main(llama_config: str, dst: str, dtype: str = "bf16", vocab_size: int = 32000, seed: int = 0) -> None:
    """Writes consolidated.00.pth and params.json with normal weights of std 0.02 (norms 1); a block of values repeats."""
    args = ModelArgs.from_files([llama_config])
    if args.vocab_size < 1:
        args = ModelArgs.from_dict(args.to_dict() | {"vocab_size": vocab_size})
    shapes = {n: global_shape(args, n) for n, _ in Transformer(args).named_parameters()}
    block = torch.empty(BLOCK).normal_(0, 0.02, generator=torch.Generator().manual_seed(seed)).to(DTYPES[dtype])
    with new_directory(dst) as directory:
        file = directory / "consolidated.00.pth"
        with torch.serialization.skip_data():  # the file's shape now, its content below
            torch.save({n: torch.empty(s, dtype=DTYPES[dtype]) for n, s in shapes.items()}, file)
        torch.serialization.set_default_mmap_options(mmap.MAP_SHARED)
        for name, tensor in tqdm(torch.load(file, mmap=True, weights_only=True).items(), "writing", unit="tensor"):
            flat = tensor.view(-1)
            if "norm." in name:
                flat.fill_(1.0)
            for start in range(0, 0 if "norm." in name else len(flat), BLOCK):
                part = flat[start : start + BLOCK]
                part.copy_(block[: len(part)])
        write_json(directory / "params.json", args.to_dict())


if __name__ == "__main__":
    config.run_tool(main)
