"""An adapter of this library -> Hugging Face's PEFT, for transformers, vLLM and the hub.

python tools/lora_to_peft.py --src ADAPTER --dst DIR [--base DIR]
"""

from pathlib import Path

from accessory.checkpoint.adapter import fitted, model_args, open_adapter, open_base
from accessory.checkpoint.formats import TOKENIZER_FILES, tokenizer_in
from accessory.checkpoint.formats_write import copy_tokenizer, new_directory
from accessory.checkpoint.peft import write_peft
from accessory.config import run_tool
from accessory.weights.report import mapping_lines


def main(*, src: str, dst: str, base: str | None = None) -> None:
    """Writes adapter_model.safetensors, adapter_config.json and the tokenizer, in the adapter's own dtype.

    --src is what a LoRA run saved. The rows of B of q and k are put in Hugging Face's order; trained norms, embedding and head
    go along as modules_to_save, of a tied model the embedding as head too. --base is where the adapter's base is, and what
    base_model_name_or_path will say: give the Hugging Face directory, as made by tools/meta_to_hf.py, so that peft finds it.
    Biases that the base does not have, and adapters without LoRA, have no place in PEFT: merge those (tools/merge_lora.py).
    --dst must not exist. At the end every kind of tensor is listed with its old and new name."""
    terms, tensors = open_adapter(src)
    checkpoint = open_base(terms, Path(src), base)
    terms, tensors = fitted(terms, tensors, checkpoint, src)
    tokenizer = tokenizer_in(Path(src), TOKENIZER_FILES) or checkpoint.tokenizer
    with new_directory(dst) as directory:
        written = write_peft(directory, tensors, terms, model_args(checkpoint), str(checkpoint.path.resolve()))
        copy_tokenizer(tokenizer, directory)
    pairs = ((written.ours[n], n, written.shape(n), written.dtype(n)) for n in written.names())
    print("\n".join(mapping_lines(pairs)))
    print(f"{dst}: {len(written.names())} tensors of {checkpoint.path}, {'tokenizer' if tokenizer else 'no tokenizer'}")


if __name__ == "__main__":
    run_tool(main)
