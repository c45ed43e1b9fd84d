"""A larger vocabulary from a base's: pieces of a second one, merges learned on text, or special tokens.

python tools/merge_tokenizer.py --base tokenizer.model --extra chinese_sp.model --dst DIR [--rule append|scored]
python tools/merge_tokenizer.py --base tokenizer.json --src TEXT --vocab_size +8000 --dst DIR
python tools/merge_tokenizer.py --base DIR --special_tokens tokens.json --dst DIR
"""

from accessory.checkpoint.formats_write import new_directory
from accessory.config import run_tool
from accessory.data.vocabulary import grown_by_text, merged_with, read_special_tokens
from accessory.tokenizer import Tokenizer


def main(
    *,
    base: str,
    dst: str,
    extra: str | None = None,
    rule: str = "append",
    src: str | None = None,
    vocab_size: str | None = None,
    field: str = "text",
    special_tokens: str | None = None,
) -> None:
    """Writes a tokenizer whose old ids are the base's; grow the model to it with tools/expand_vocab.py.

    sentencepiece: --extra is another sentencepiece model (tools/train_tokenizer.py makes one). --rule append adds all
    of its pieces with score 0, so that they win over the base's merges (Chinese-LLaMA-Alpaca); scored adds Chinese
    pieces below the base's last score, none with a digit, up to a multiple of 64 (MiniMA). Byte-level BPE
    (tokenizer.json, Llama 3's tokenizer.model): --src is text (files and directories, separated by commas) on which
    more merges are learned, up to --vocab_size tokens, or +N more; a tokenizer.json comes out. --special_tokens is a
    JSON file {"tokens": ["<A>", ...]}: each becomes one id after all others, alone or with one of the above. --dst
    must not exist."""
    tokenizer = Tokenizer.open(base)
    size = tokenizer.vocab_size
    if extra and src:
        raise ValueError("--extra and --src: give one, a sentencepiece base takes --extra, byte-level BPE --src")
    if not (extra or src or special_tokens):
        raise ValueError("nothing to add: give --extra MODEL, --src TEXT --vocab_size +N, or --special_tokens FILE")
    said = ""
    with new_directory(dst) as directory:
        if extra:
            tokenizer, said = merged_with(tokenizer, Tokenizer.open(extra), rule)
        elif src:
            tokenizer, said = grown_by_text(tokenizer, src, vocab_size, field, show_progress=True)
        if special_tokens:
            tokenizer = tokenizer.with_special_tokens(read_special_tokens(special_tokens))
        file = tokenizer.save(directory)
        saved = Tokenizer.open(directory)
        assert saved.fingerprint == tokenizer.fingerprint, "the saved tokenizer is another one"
    print(said + f"{dst}: {file.name}, {saved.vocab_size} tokens, {saved.vocab_size - size} of them new")


if __name__ == "__main__":
    run_tool(main)
