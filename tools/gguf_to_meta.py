"""A GGUF file -> consolidated.00.pth, params.json and its tokenizer, dequantised.

python tools/gguf_to_meta.py --src model.gguf --dst DIR [--dtype fp32|bf16|fp16]
"""

from accessory.checkpoint.formats import open_checkpoint
from accessory.checkpoint.formats_write import dtype_of, new_directory, write_meta
from accessory.config import run_tool
from accessory.weights.gguf import tokenizer_files


def main(*, src: str, dst: str, dtype: str = "fp32") -> None:
    """Dequantises a GGUF file into a Meta-style directory that every script here takes as --pretrained_path.

    fp32 keeps the dequantised numbers exactly. The tokenizer is rebuilt as tokenizer.json (byte-level BPE) or
    tokenizer.model (sentencepiece), with bos, eos and the chat template in tokenizer_config.json. --dst must not
    exist."""
    checkpoint = open_checkpoint(src, "gguf")
    tokenizer = tokenizer_files(checkpoint.metadata, checkpoint.files[0])
    with new_directory(dst) as directory:
        for name, content in tokenizer.items():
            (directory / name).write_bytes(content)
        write_meta(directory, checkpoint.source, checkpoint.params, dtype=dtype_of(dtype), show_progress=True)
    print(f"{dst}: {len(checkpoint.source.names())} tensors in {dtype}, params.json, {', '.join(tokenizer)}")


if __name__ == "__main__":
    run_tool(main)
