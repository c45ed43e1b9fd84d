"""A GGUF file -> Meta-style shards, params.json and its tokenizer, dequantised.

python tools/gguf_to_meta.py --src model.gguf --dst DIR [--mp 1] [--embedding_dim 0|1] [--dtype fp32|bf16|fp16] [--tokenizer_path FILE]
"""

from pathlib import Path

from accessory.checkpoint.formats import open_checkpoint
from accessory.checkpoint.formats_write import dtype_of, embedding_dim_of, new_directory, write_meta
from accessory.config import run_tool
from accessory.tokenizer import Tokenizer
from accessory.weights.gguf import gguf_name
from accessory.weights.gguf_tokenizer import tokenizer_files
from accessory.weights.report import mapping_lines


def main(
    *,
    src: str,
    dst: str,
    mp: int = 1,
    embedding_dim: int = 0,
    dtype: str = "fp32",
    tokenizer_path: str | None = None,
) -> None:
    """Dequantises a GGUF file into a Meta-style directory that every script here takes as --pretrained_path.

    --src is a file of architecture llama (Mistral's say so too), qwen2 or qwen3. fp32 keeps the dequantised numbers
    exactly; bf16 and fp16 round them. The tokenizer is rebuilt as tokenizer.json (byte-level BPE) or tokenizer.model
    (sentencepiece), with bos, eos and the chat template in tokenizer_config.json; --tokenizer_path takes the model's own
    instead. --mp is the number of shards, --embedding_dim how tok_embeddings is split: 0 as in Llama 3, 1 as in Llama 2.
    --dst must not exist."""
    split_on, stored = embedding_dim_of(embedding_dim), dtype_of(dtype)
    checkpoint = open_checkpoint(src, "gguf")
    rows = checkpoint.source.shape("tok_embeddings.weight")[0]
    own = Tokenizer.open_for(tokenizer_path, rows, src).path if tokenizer_path else None
    rebuilt = {} if own else tokenizer_files(checkpoint.metadata, checkpoint.files[0])
    with new_directory(dst) as directory:
        for name, content in rebuilt.items():
            Path(directory, name).write_bytes(content)
        write_meta(directory, checkpoint.source, checkpoint.params, own, stored, mp, split_on, show_progress=True)
    names = checkpoint.source.names()
    print(*mapping_lines((gguf_name(n), n, checkpoint.source.shape(n), stored) for n in names), sep="\n")
    print(f"{dst}: {len(names)} tensors in {dtype}, params.json, {', '.join(rebuilt) or own.name}")


if __name__ == "__main__":
    run_tool(main)
