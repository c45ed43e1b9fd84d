"""Any checkpoint -> a Hugging Face directory (safetensors, config.json, tokenizer).

python tools/meta_to_hf.py --src DIR --dst DIR [--dtype bf16] [--max_shard_size 5GB] [--tokenizer_path FILE]
"""

from accessory.checkpoint.formats import open_checkpoint
from accessory.checkpoint.formats_write import dtype_of, new_directory, special_ids, write_hf
from accessory.config import run_tool
from accessory.model.args import ModelArgs
from accessory.tokenizer import Tokenizer


def main(
    *, src: str, dst: str, dtype: str | None = None, max_shard_size: str = "5GB", tokenizer_path: str | None = None
) -> None:
    """Writes a directory that transformers, vLLM and llama.cpp's converter load.

    --src is anything that can be read, at any number of shards; LoRA must be merged first (tools/merge_lora.py).
    --dtype is bf16, fp16 or fp32, by default the file's own. The tokenizer beside the weights goes along. --dst must
    not exist."""
    checkpoint = open_checkpoint(src)
    if checkpoint.adapter:
        raise ValueError(
            f"--src {src} holds LoRA weights: merge them into the model with tools/merge_lora.py --format hf"
        )
    tokenizer = (
        Tokenizer.open(tokenizer_path or checkpoint.tokenizer) if tokenizer_path or checkpoint.tokenizer else None
    )
    args = ModelArgs.from_dict(checkpoint.params, source=f"{src}/params.json")
    with new_directory(dst) as directory:
        files = write_hf(
            directory,
            checkpoint.source,
            args,
            tokenizer.path if tokenizer else None,
            dtype_of(dtype),
            max_shard_size,
            special_ids=special_ids(tokenizer),
            show_progress=True,
        )
    print(f"{dst}: {len(files)} safetensors file(s), config.json, {'tokenizer' if tokenizer else 'no tokenizer'}")


if __name__ == "__main__":
    run_tool(main)
