"""A model grown to a larger tokenizer: new rows in its embedding and its output.

python tools/expand_vocab.py --src DIR --dst DIR --tokenizer_path NEW [--init normal|mean|pieces] [--mp N] [--format hf]
"""

from accessory.checkpoint.formats import open_checkpoint
from accessory.checkpoint.formats_write import (
    dtype_of,
    embedding_dim_of,
    new_directory,
    special_ids,
    write_hf,
    write_meta,
)
from accessory.config import run_tool
from accessory.data.vocabulary import count_tokens, open_pair, pieces_of_new, read_texts
from accessory.model.args import ModelArgs
from accessory.weights.report import mapping_lines
from accessory.weights.vocab import Expanded


def main(
    *,
    src: str,
    dst: str,
    tokenizer_path: str,
    old_tokenizer_path: str | None = None,
    init: str = "normal",
    seed: int = 0,
    mp: int = 1,
    embedding_dim: int = 0,
    format: str = "meta",
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    sample_text: str | None = None,
    field: str = "text",
) -> None:
    """Old rows stay bit for bit; new ones are --init: normal (N(0, 0.02) from --seed), mean (of the old rows, as Alpaca),
    or pieces (each the mean of the rows of its old tokens, which starts training nearest to the old model).

    --tokenizer_path is the new tokenizer, which must keep every id of the old one (--old_tokenizer_path; by default the
    one beside the weights). --src is any whole checkpoint. --format meta writes --mp shards, split on --embedding_dim 0
    (Llama 3) or 1 (Llama 1, 2, Code Llama), hf a Hugging Face directory. --sample_text names text (files, directories;
    of records the --field) on which the tokens before and after are counted. --dst must not exist."""
    if format not in ("meta", "hf"):
        raise ValueError(f"--format {format}: choose meta or hf")
    split_on, stored = embedding_dim_of(embedding_dim), dtype_of(dtype)
    checkpoint = open_checkpoint(src)
    if checkpoint.adapter:
        raise ValueError(f"--src {src} holds LoRA weights: merge them into the model first with tools/merge_lora.py")
    old, new = open_pair(old_tokenizer_path or checkpoint.tokenizer, tokenizer_path)
    pieces = pieces_of_new(old, new) if init == "pieces" else ()
    source = Expanded(checkpoint.source, old.vocab_size, new.vocab_size, init, seed, pieces)
    params = checkpoint.params | {"vocab_size": source.rows}
    with new_directory(dst) as directory:  # refused before the text is read
        counts = count_tokens(read_texts(sample_text, field, show_progress=True), old, new) if sample_text else None
        if format == "meta":
            write_meta(directory, source, params, new.path, stored, mp, split_on, show_progress=True)
        else:
            args = ModelArgs.from_dict(params)
            write_hf(directory, source, args, new.path, stored, max_shard_size, special_ids(new), show_progress=True)
    pairs = [(n, n, source.shape(n), stored or source.dtype(n)) for n in source.names()]
    print("\n".join(mapping_lines(pairs) + (new.note_on_export() if format == "hf" else [])))
    if counts:
        print(f"{sample_text}: {counts[0]} tokens before, {counts[1]} after ({counts[1] / max(1, counts[0]):.1%})")
    print(f"{dst}: {old.vocab_size} -> {new.vocab_size} tokens, {source.rows} rows in {' and '.join(source.tables())}")


if __name__ == "__main__":
    run_tool(main)
