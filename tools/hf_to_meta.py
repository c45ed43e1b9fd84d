"""A Hugging Face directory -> Meta-style shards, params.json and the tokenizer.

python tools/hf_to_meta.py --src DIR --dst DIR [--mp 1] [--embedding_dim 0|1] [--dtype bf16] [--tokenizer_path FILE]
"""

from accessory.checkpoint.formats import open_checkpoint
from accessory.checkpoint.formats_write import dtype_of, embedding_dim_of, new_directory, write_meta
from accessory.config import run_tool
from accessory.tokenizer import Tokenizer
from accessory.weights.hf import hf_name
from accessory.weights.report import mapping_lines


def main(
    *,
    src: str,
    dst: str,
    mp: int = 1,
    embedding_dim: int = 0,
    dtype: str | None = None,
    tokenizer_path: str | None = None,
) -> None:
    """Writes consolidated.00.pth ... in --mp shards, with params.json worked out from config.json and the tensors.

    --src holds config.json and *.safetensors or pytorch_model*.bin. --embedding_dim is how tok_embeddings is split: 0
    as in Llama 3, 1 as in Llama 1, 2 and Code Llama. --dtype is bf16, fp16 or fp32, by default the file's own. The
    tokenizer beside the weights goes along; --tokenizer_path names another, for instance the tokenizer.model that
    Meta's own code wants. --dst must not exist. At the end every kind of tensor is listed with its old and new name."""
    split_on, stored = embedding_dim_of(embedding_dim), dtype_of(dtype)
    checkpoint = open_checkpoint(src, "hf")
    tokenizer = checkpoint.tokenizer
    if tokenizer_path:
        tokenizer = Tokenizer.open_for(tokenizer_path, checkpoint.source.shape("tok_embeddings.weight")[0], src).path
    with new_directory(dst) as directory:
        files = write_meta(
            directory, checkpoint.source, checkpoint.params, tokenizer, stored, mp, split_on, show_progress=True
        )
    names = checkpoint.source.names()
    pairs = [(hf_name(n) or n, n, checkpoint.source.shape(n), stored or checkpoint.source.dtype(n)) for n in names]
    print("\n".join(mapping_lines(pairs)))
    print(f"{dst}: {len(names)} tensors in {len(files)} shard(s), {'tokenizer' if tokenizer else 'no tokenizer'}")


if __name__ == "__main__":
    run_tool(main)
