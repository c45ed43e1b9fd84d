"""A base and the adapters trained on it, one after another -> one plain model, Meta's files or Hugging Face's.

python tools/merge_lora.py --adapters DIR,DIR --dst DIR [--base DIR] [--format meta|hf] [--mp 1] [--dtype bf16]
"""

from accessory.checkpoint.formats_write import dtype_of, new_directory, special_ids, write_hf, write_meta
from accessory.checkpoint.merging import stack
from accessory.config import run_tool
from accessory.model.args import ModelArgs
from accessory.tokenizer import Tokenizer
from accessory.weights.hf import hf_name
from accessory.weights.report import mapping_lines


def main(
    *,
    adapters: list[str],
    dst: str,
    base: str | None = None,
    format: str = "meta",
    mp: int = 1,
    embedding_dim: int = 0,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
) -> None:
    """W + s B A for every adapter in order, summed in fp32, rounded once to the base's dtype (or --dtype); trained biases,
    norms and whole modules take the place of the base's.

    --adapters is one directory or several with commas between, each saved by this library or by PEFT, or an Accessory
    checkpoint that holds base and LoRA together. The vocabulary may grow from one to the next; the result has the last one's
    tokenizer. --base is where the base is: the first adapter's own, unless it is no longer where its adapter.json says. A base
    with other bytes than the adapter was trained on is refused, or, where --base names it, said in a line.
    --format meta writes consolidated.NN.pth in --mp shards (--embedding_dim 1: the embedding is split over its columns, as in
    Llama 1 and 2), hf a Hugging Face directory of files up to --max_shard_size. An adapter that changes nothing is an error.
    --dst must not exist."""
    if format not in ("meta", "hf"):
        raise ValueError(f"--format {format}: choose meta or hf")
    if not adapters:
        raise ValueError("--adapters is empty: name the directories, in the order in which they were trained")
    merged = stack(adapters, base, dtype_of(dtype), show_progress=True)
    model, tokenizer = merged.model, Tokenizer.open(merged.tokenizer) if merged.tokenizer else None
    rows = model.shape("tok_embeddings.weight")[0]
    if tokenizer and tokenizer.vocab_size > rows:
        raise ValueError(
            f"{merged.tokenizer} has {tokenizer.vocab_size} tokens, the merged embedding {rows} rows: an adapter is missing, or "
            "the tokenizer beside the last one is another model's"
        )
    with new_directory(dst) as directory:
        if format == "meta":
            write_meta(directory, model, merged.params, merged.tokenizer, None, mp, embedding_dim, show_progress=True)
        else:
            args, ids = ModelArgs.from_dict(merged.params), special_ids(tokenizer)
            write_hf(directory, model, args, merged.tokenizer, None, max_shard_size, ids, show_progress=True)
        name, size = model.require_change()
    new_name = hf_name if format == "hf" else str
    print("\n".join(mapping_lines((n, new_name(n) or n, model.shape(n), model.dtype(n)) for n in model.names())))
    notes = tokenizer.note_on_export() if tokenizer and format == "hf" else []
    print("\n".join(model.change_lines() + merged.warnings + notes))
    print(
        f"{dst}: {len(model.changes)} weights changed, most of all {name} (by up to {size:.3g}); {rows} vocabulary rows"
    )


if __name__ == "__main__":
    run_tool(main)
