"""A base and what LoRA trained on it -> one plain model, Meta's files or Hugging Face's.

python tools/merge_lora.py --adapter DIR --dst DIR [--base DIR] [--format meta|hf] [--model_parallel_size 1]
"""

from accessory.checkpoint.adapter import open_adapter, open_base
from accessory.checkpoint.formats import Checkpoint, open_checkpoint
from accessory.checkpoint.formats_write import new_directory, special_ids, write_hf, write_meta
from accessory.config import run_tool
from accessory.model.args import ModelArgs
from accessory.tokenizer import Tokenizer
from accessory.weights import Source
from accessory.weights.lora import merged, separated


def main(
    *,
    adapter: str,
    dst: str,
    base: str | None = None,
    format: str = "meta",
    model_parallel_size: int = 1,
    max_shard_size: str = "5GB",
) -> None:
    """W + (alpha / rank) B A in fp32, stored in the base's dtype, with trained biases, norms and whole modules put in
    place.

    --adapter is a directory with adapter.safetensors, or an Accessory checkpoint that holds base and LoRA together;
    --base only where adapter.json's path is no longer right. --format meta writes consolidated.NN.pth in
    --model_parallel_size shards, hf a Hugging Face directory. A merge that changes nothing is an error. --dst must
    not exist."""
    if format not in ("meta", "hf"):
        raise ValueError(f"--format {format}: choose meta or hf")
    checkpoint, weights, changes, config = opened(adapter, base)
    model = merged(weights, changes, config)
    params = checkpoint.params | ({"tie_word_embeddings": False} if "output.weight" in changes.names() else {})
    with new_directory(dst) as directory:
        if format == "meta":
            write_meta(directory, model, params, checkpoint.tokenizer, shards=model_parallel_size, show_progress=True)
        else:
            tokenizer = Tokenizer.open(checkpoint.tokenizer) if checkpoint.tokenizer else None
            args, ids = ModelArgs.from_dict(params), special_ids(tokenizer)
            write_hf(directory, model, args, checkpoint.tokenizer, None, max_shard_size, ids, show_progress=True)
        name, size = model.require_change()
    print(f"{dst}: {len(model.changes)} weights changed, most of all {name} (by up to {size:.3g})")


def opened(adapter: str, base: str | None) -> tuple[Checkpoint, Source, Source, dict]:
    """(the base with the adapter's tokenizer and params, the base's weights, the adapter's, the terms)."""
    checkpoint = open_checkpoint(adapter, base=base)
    if checkpoint.adapter is None:
        raise ValueError(
            f"--adapter {adapter} holds no adapter.json and no LoRA weights: give the directory that the run saved"
        )
    if "base" not in checkpoint.adapter:
        return checkpoint, *separated(checkpoint.source), checkpoint.adapter
    config, changes = open_adapter(adapter)
    return checkpoint, open_base(config, checkpoint.path, base).source, changes, config


if __name__ == "__main__":
    run_tool(main)
