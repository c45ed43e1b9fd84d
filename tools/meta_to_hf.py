"""Any checkpoint -> a Hugging Face directory (safetensors, config.json, tokenizer).

python tools/meta_to_hf.py --src DIR --dst DIR [--dtype bf16] [--max_shard_size 5GB] [--tokenizer_path FILE]
"""

from accessory.checkpoint.formats import open_checkpoint
from accessory.checkpoint.formats_write import dtype_of, new_directory, special_ids, write_hf
from accessory.config import run_tool
from accessory.model.args import ModelArgs
from accessory.tokenizer import Tokenizer
from accessory.weights.hf import hf_name
from accessory.weights.report import mapping_lines


def main(
    *, src: str, dst: str, dtype: str | None = None, max_shard_size: str = "5GB", tokenizer_path: str | None = None
) -> None:
    """Writes a directory that transformers, vLLM and llama.cpp's converter load.

    --src is anything that can be read, at any number of shards; LoRA must be merged first (tools/merge_lora.py).
    --dtype is bf16, fp16 or fp32, by default the file's own. The tokenizer beside the weights goes along;
    --tokenizer_path names another. No file is larger than --max_shard_size (5GB, 500MB, ...) unless one tensor is.
    --dst must not exist. At the end every kind of tensor is listed with its old and new name."""
    checkpoint = open_checkpoint(src)
    if checkpoint.adapter:
        raise ValueError(
            f"--src {src} holds LoRA weights: merge them into the model with tools/merge_lora.py --format hf"
        )
    if tokenizer_path:
        tokenizer = Tokenizer.open_for(tokenizer_path, checkpoint.source.shape("tok_embeddings.weight")[0], src)
    else:
        tokenizer = Tokenizer.open(checkpoint.tokenizer) if checkpoint.tokenizer else None
    args, stored = ModelArgs.from_dict(checkpoint.params, source=f"{src}/params.json"), dtype_of(dtype)
    with new_directory(dst) as directory:
        files = write_hf(
            directory,
            checkpoint.source,
            args,
            tokenizer.path if tokenizer else None,
            stored,
            max_shard_size,
            special_ids=special_ids(tokenizer),
            show_progress=True,
        )
    source = checkpoint.source
    stored = stored or source.dtype("tok_embeddings.weight")
    lines = mapping_lines((n, hf_name(n) or n, source.shape(n), stored) for n in source.names())
    print("\n".join(lines + (tokenizer.note_on_export() if tokenizer else [])))
    print(f"{dst}: {len(files)} safetensors file(s), config.json, {'tokenizer' if tokenizer else 'no tokenizer'}")


if __name__ == "__main__":
    run_tool(main)
