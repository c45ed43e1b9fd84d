"""Text files -> a token store for pre-training, or TFRecord, with several processes.

python tools/build_corpus.py --src text/,more.jsonl.gz --dst corpus --tokenizer_path tokenizer.model
"""

from accessory.config import run_tool
from accessory.data.corpus import CorpusArgs, build


def main(
    *,
    src: str,
    dst: str,
    tokenizer_path: str,
    num_processes: int | None = None,
    input_format: str = "auto",
    field: str = "text",
    documents: str = "file",
    append_eos: bool = True,
    prepend_bos: bool = False,
    blocks: str = "none",
    block_size: int | None = None,
    format: str = "store",
    max_bad_lines: int = 1000,
    max_bad_share: float = 0.01,
) -> None:
    """Killed, the same command goes on where it was; finished, it finds --dst up to date or says what is other.

    --src            files, directories (with all below them, sorted) and - for standard input, comma-separated:
                     .txt .text, .jsonl .ndjson .json (a record a line), .parquet, .tfrecord, all also .gz or .zst
    --input_format   auto: by a file's name; txt, jsonl, parquet or tfrecord: all files are that
    --field          where a record has its text (ready ids of a .tfrecord: indices)
    --documents      of a .txt: file = one document a file; lines = one a line, empty lines left out
    --append_eos, --prepend_bos   EOS after, BOS before each document. All tokens are kept; blocks are cut at training.
    --num_processes  processes that tokenise (none: one a core; 1: no other process). They do not change the result.
    --max_bad_lines, --max_bad_share   lines that are no UTF-8, no JSON or lack the field are left out and listed in
                     DST/bad_lines.txt; more of them than that, as a number or as a share of all, end the build
    --blocks         cut into blocks of --block_size now, as other programs do (docs/data.md):
                     cla = Chinese-LLaMA-Alpaca's: BOS before each line (EOS after it with --append_eos true), 1000 lines
                     one after the other, cut, the rest of them dropped; minima = EOS BOS after each document, a file's
                     stream cut, its last block shorter
    --format         store, or tfrecord: DST/corpus.tfrecord and its .index, one example {"indices"} a document or block"""
    args = CorpusArgs(
        [s for s in src.split(",") if s], dst, tokenizer_path, num_processes, input_format, field, documents, append_eos,
        prepend_bos, blocks, block_size, format, max_bad_lines, max_bad_share,
    )  # fmt: skip
    meta = build(args, show_progress=True)
    left_out = f", {meta['bad_lines']} line(s) left out: {dst}/bad_lines.txt" if meta["bad_lines"] else ""
    what = "documents" if blocks == "none" else "blocks"
    print(f"{dst}: {meta['tokens']:,} tokens in {meta['documents']:,} {what}{left_out}")


if __name__ == "__main__":
    run_tool(main)
