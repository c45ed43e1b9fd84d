"""A checkpoint at any number of shards -> Meta-style shards at another.

python tools/reshard.py --src DIR --dst DIR --model_parallel_size 4 [--embedding_dim 0|1] [--dtype bf16]
"""

from accessory.checkpoint.formats import open_checkpoint
from accessory.checkpoint.formats_write import dtype_of, new_directory, write_meta
from accessory.config import run_tool


def main(*, src: str, dst: str, model_parallel_size: int, embedding_dim: int = 0, dtype: str | None = None) -> None:
    """Writes consolidated.00.pth ... for programs that want one file per rank; ours read any number.

    --embedding_dim is how tok_embeddings is split: 0 as in Llama 3, 1 as in Llama 1, 2 and Code Llama. --dtype is
    bf16, fp16 or fp32, by default the file's own. --dst must not exist."""
    if embedding_dim not in (0, 1):
        raise ValueError(f"--embedding_dim {embedding_dim}: choose 0 (Llama 3) or 1 (Llama 1, 2, Code Llama)")
    checkpoint = open_checkpoint(src)
    with new_directory(dst) as directory:
        files = write_meta(
            directory,
            checkpoint.source,
            checkpoint.params,
            checkpoint.tokenizer,
            dtype_of(dtype),
            model_parallel_size,
            embedding_dim,
            show_progress=True,
        )
    print(f"{dst}: {len(files)} shard(s)")


if __name__ == "__main__":
    run_tool(main)
