"""A checkpoint at any number of shards -> Meta-style shards at another.

python tools/reshard.py --src DIR --dst DIR --mp 4 [--embedding_dim 0|1] [--dtype bf16]
"""

from accessory.checkpoint.formats import open_checkpoint
from accessory.checkpoint.formats_write import dtype_of, embedding_dim_of, new_directory, write_meta
from accessory.config import run_tool
from accessory.weights.report import mapping_lines


def main(*, src: str, dst: str, mp: int, embedding_dim: int = 0, dtype: str | None = None) -> None:
    """Writes consolidated.00.pth ... in --mp shards, for programs that want one file per rank; ours read any number.

    --src is anything that can be read; LoRA must be merged first (tools/merge_lora.py). --embedding_dim is how
    tok_embeddings is split: 0 as in Llama 3, 1 as in Llama 1, 2 and Code Llama. --dtype is bf16, fp16 or fp32, by
    default the file's own. --dst must not exist. At the end every kind of tensor is listed with its whole shape."""
    split_on, stored = embedding_dim_of(embedding_dim), dtype_of(dtype)
    checkpoint = open_checkpoint(src)
    if checkpoint.adapter:
        raise ValueError(f"--src {src} holds LoRA weights: merge them into the model with tools/merge_lora.py")
    with new_directory(dst) as directory:
        files = write_meta(
            directory,
            checkpoint.source,
            checkpoint.params,
            checkpoint.tokenizer,
            stored,
            mp,
            split_on,
            show_progress=True,
        )
    source = checkpoint.source
    print("\n".join(mapping_lines((n, n, source.shape(n), stored or source.dtype(n)) for n in source.names())))
    print(f"{dst}: {len(source.names())} tensors in {len(files)} shard(s)")


if __name__ == "__main__":
    run_tool(main)
