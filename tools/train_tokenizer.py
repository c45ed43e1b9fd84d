"""Text -> a sentencepiece tokenizer.model of one's own.

python tools/train_tokenizer.py --src TEXT[,MORE] --dst DIR --vocab_size 20000 [--model_type bpe|unigram]
"""

import itertools

from accessory.checkpoint.formats_write import new_directory
from accessory.config import run_tool
from accessory.data.vocabulary import lossless, read_texts, sentences_of, train
from accessory.tokenizer import Tokenizer

SAMPLE = 1000  # lines that must come back


def main(
    *,
    src: str,
    dst: str,
    vocab_size: int,
    model_type: str = "bpe",
    byte_fallback: bool = True,
    character_coverage: float = 0.9995,
    max_sentences: int = 2_000_000,
    field: str = "text",
) -> None:
    """Trains a sentencepiece model as LLaMA's was: bpe, digits one by one, bytes for what it does not know.

    --src is files and directories, separated by commas: .txt, .jsonl (its --field), .parquet, also .gz and .zst; they
    are streamed, and --max_sentences lines drawn at random are learned from (held in memory; 0: all). A character
    rarer than --character_coverage leaves is spelled in bytes, or is <unk> with --byte_fallback false. For a language
    that the base lacks, merge the result into it with tools/merge_tokenizer.py. --dst must not exist."""
    with new_directory(dst) as directory:  # refused before the text is read
        texts = read_texts(src, field, show_progress=True)
        model = train(texts, vocab_size, model_type, byte_fallback, character_coverage, max_sentences)
        (directory / "tokenizer.model").write_bytes(model)
        tokenizer = Tokenizer.open(directory)
        lines = list(itertools.islice(sentences_of(read_texts(src, field)), SAMPLE))
        same, total = lossless(tokenizer, lines)
    tokens, characters = sum(len(tokenizer.encode(line)) for line in lines), sum(map(len, lines))
    print(f"the first {total} lines: {same} come back exactly, {characters / max(1, tokens):.2f} characters a token")
    print(f"{dst}: tokenizer.model, {model_type}, {tokenizer.vocab_size} pieces")


if __name__ == "__main__":
    run_tool(main)
