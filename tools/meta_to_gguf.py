"""Any checkpoint -> one GGUF file for llama.cpp and ollama, with its tokenizer inside.

python tools/meta_to_gguf.py --src DIR --dst model.gguf [--dtype f32|f16|bf16|q8_0] [--tokenizer_path FILE]
"""

from pathlib import Path
from typing import Any

from accessory.checkpoint.formats import Checkpoint, open_checkpoint
from accessory.checkpoint.formats_read import read_json
from accessory.checkpoint.gguf_write import dtype_of, new_file, write_gguf
from accessory.config import run_tool
from accessory.data import carried
from accessory.tokenizer import Tokenizer
from accessory.weights.gguf_vocab import is_sentencepiece, notes, vocabulary
from accessory.weights.report import mapping_lines


def main(*, src: str, dst: str, dtype: str | None = None, tokenizer_path: str | None = None) -> None:
    """Writes one file in the form of llama.cpp's own converter, for llama.cpp, ollama and transformers.

    --src is anything that can be read, at any number of shards; LoRA must be merged first (tools/merge_lora.py). --dst is
    the file, NAME.gguf; it must not exist. --dtype is f32, f16, bf16 or q8_0 (8 bits, in blocks of 32), by default the
    weights' own; norms and biases are always f32. The tokenizer is the one beside the weights, or --tokenizer_path: a
    sentencepiece tokenizer.model, Llama 3's tokenizer.model, or a byte-level tokenizer.json."""
    checkpoint = open_checkpoint(src)
    if checkpoint.adapter:
        raise ValueError(f"--src {src} holds LoRA weights: merge them into the model with tools/merge_lora.py")
    dtype = dtype_of(dtype, checkpoint.source)
    with new_file(dst) as file:
        words, trained_in = vocabulary_of(checkpoint, tokenizer_path)
        said = notes(words, trained_in)
        name = Path(src).resolve().name.removesuffix(".gguf")
        mapped = write_gguf(file, checkpoint.source, checkpoint.params, words, dtype, name, show_progress=True)
    print(*mapping_lines(mapped), sep="\n")
    window = checkpoint.params.get("sliding_window")
    if window:
        print(f"sliding_window {window} is left out: llama.cpp attends to the whole text")
    print(*said, f"{dst}: {len(mapped)} tensors in {dtype}, {len(words['ggml.tokens'])} tokens", sep="\n")


def vocabulary_of(checkpoint: Checkpoint, tokenizer_path: str | None) -> tuple[dict[str, Any], str | None]:
    """GGUF's keys of the tokenizer: of --tokenizer_path, of the GGUF file itself, or of the file beside the weights; and
    the template that the model was trained in by name, which is in template.json."""
    inside = {k.removeprefix("tokenizer."): v for k, v in checkpoint.metadata.items() if k.startswith("tokenizer.")}
    if inside and not tokenizer_path:
        return inside, None
    if not tokenizer_path and not checkpoint.tokenizer:
        raise ValueError(f"{checkpoint.path} has no tokenizer: give the model's with --tokenizer_path FILE")
    tokenizer = Tokenizer.open(tokenizer_path or checkpoint.tokenizer)
    original = tokenizer.path.with_name("tokenizer.model")  # what a rewritten sentencepiece tokenizer was made from
    if tokenizer.kind == "hf" and original.is_file() and is_sentencepiece(read_json(tokenizer.path)):
        tokenizer = Tokenizer.open(original)
    config, template = (tokenizer.path.with_name(n) for n in ("tokenizer_config.json", "chat_template.jinja"))
    beside = read_json(config) if config.is_file() else {}
    if template.is_file():
        beside["chat_template"] = template.read_text()
    rows = checkpoint.source.shape("tok_embeddings.weight")[0]
    record = tokenizer.path.with_name(carried.FILE)
    trained_in = carried.read(record) if record.is_file() else {"chat_template": ""}
    words = vocabulary(tokenizer, tokenizer.path.read_bytes(), beside, rows)
    return words, None if "chat_template" in trained_in else trained_in["template"]


if __name__ == "__main__":
    run_tool(main)
