"""An adapter of Hugging Face's PEFT -> one of this library, to go on training it, at any model-parallel size.

python tools/peft_to_lora.py --src PEFTDIR --dst DIR --base BASE
"""

from pathlib import Path

from accessory.checkpoint.adapter import base_record, fitted, model_args, open_adapter, write_adapter
from accessory.checkpoint.formats import TOKENIZER_FILES, finished, lay_adapter, open_checkpoint, tokenizer_in
from accessory.checkpoint.formats_write import copy_tokenizer, new_directory, write_json
from accessory.config import run_tool
from accessory.weights.peft import FromPEFT
from accessory.weights.report import mapping_lines


def main(*, src: str, dst: str, base: str | None = None) -> None:
    """Writes adapter.safetensors, adapter.json, params.json and the tokenizer, in the adapter's own dtype.

    --src is adapter_config.json with adapter_model.safetensors or adapter_model.bin, of any PEFT since 0.3: LoRA on any of the
    seven linears, rank and alpha per module, rank-stabilised, biases, whole modules. Parts that would be computed differently
    (DoRA, PiSSA that was not converted, ...) are refused by name. LoRA on the embedding or the head becomes a whole weight,
    base and change together in fp32. --base is the model it was trained on, in any format that is read: it tells the size of a
    head and is what the new adapter stands on. --dst must not exist. At the end every kind of tensor is listed with its old
    and new name."""
    if base is None:
        raise ValueError("--base is missing: the model that the adapter was trained on tells how q and k are ordered")
    terms, adapter = open_adapter(src)
    if not isinstance(adapter, FromPEFT):
        raise ValueError(f"--src {src} is an adapter of this library already: it needs no conversion")
    checkpoint = open_checkpoint(base)
    terms, tensors = fitted(terms, adapter, checkpoint, src)
    args = model_args(finished(lay_adapter(checkpoint, Path(src), terms, tensors)))
    terms = {k: v for k, v in terms.items() if v or k not in ("use_rslora", "rank_pattern", "alpha_pattern")}
    terms["base"] = base_record(checkpoint, show_progress=True)
    tokenizer = tokenizer_in(Path(src), TOKENIZER_FILES) or checkpoint.tokenizer
    with new_directory(dst) as directory:
        whole = {n: tensors.read(n) for n in tensors.names()}
        write_adapter(directory, whole, terms, expect_trained=False, args=args)
        write_json(directory / "params.json", args.to_dict())
        copy_tokenizer(tokenizer, directory)
    old = {
        n: adapter.keys.get(n) or adapter.keys.get(n.replace(".weight", ".lora_b.weight"), "(the base's)")
        for n in whole
    }
    print("\n".join(mapping_lines((old[n], n, tuple(t.shape), t.dtype) for n, t in whole.items())))
    print(f"{dst}: {len(whole)} tensors over {checkpoint.path}, {'tokenizer' if tokenizer else 'no tokenizer'}")


if __name__ == "__main__":
    run_tool(main)
