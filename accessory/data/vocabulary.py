"""A vocabulary of one's own: text out of files, a sentencepiece model trained on it, and what two tokenizers share.

    text -------- train ----> tokenizer.model, of LLaMA's kind (byte fallback, digits one by one, nothing normalised)
    base + extra - merging.py -> one sentencepiece model      base + text - bpe.py -> a larger byte-level BPE
    old, new ---- check_extension, pieces_of_new ----> weights/vocab.py, which grows the model

This room is `data/`, since tokenizer files are made out of text files here and no weights are needed.
Test: pytest tests/unit/test_vocabulary.py
"""

import io
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from accessory import log
from accessory.data import bpe, merging, readers
from accessory.tokenizer import SentencePiece, Tokenizer

UNIT_BYTES = 2**14  # of text at a time: the splitters of the tokenizers library are quickest on small texts
MAX_CHARS = 4000  # of a sentence given to the trainer, which leaves out any of more than MAX_SENTENCE_BYTES
MAX_SENTENCE_BYTES = 4 * MAX_CHARS + 1
MIN_SENTENCES = 100


def train(
    texts: Iterable[str],
    vocab_size: int,
    model_type: str = "bpe",
    byte_fallback: bool = True,
    character_coverage: float = 0.9995,
    max_sentences: int = 2_000_000,
) -> bytes:
    """A sentencepiece model of LLaMA's kind: <unk> <s> </s> are 0 1 2, no padding, nothing is normalised away.

    `max_sentences` lines drawn at random are held in memory and learned from; 0: all. ValueError names the flag."""
    from sentencepiece import SentencePieceTrainer

    if model_type not in ("bpe", "unigram"):
        raise ValueError(f"--model_type {model_type}: choose bpe or unigram")
    if max_sentences and max_sentences <= MIN_SENTENCES:
        raise ValueError(f"--max_sentences {max_sentences}: the trainer takes more than {MIN_SENTENCES}, or 0 for all")
    if not 0 < character_coverage <= 1:
        raise ValueError(f"--character_coverage {character_coverage}: expected a share above 0, at most 1")
    model, sentences = io.BytesIO(), sentences_of(texts)
    first = next(sentences, None)
    if first is None:
        raise ValueError("--src holds no text: name files with text in them")
    kept = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "split_digits": True}
    kept |= {"allow_whitespace_only_pieces": True, "max_sentence_length": MAX_SENTENCE_BYTES, "minloglevel": 2}
    sample = {"input_sentence_size": max_sentences, "shuffle_input_sentence": True} if max_sentences else {}
    try:
        SentencePieceTrainer.train(
            sentence_iterator=(s for part in ([first], sentences) for s in part),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            byte_fallback=byte_fallback,
            character_coverage=character_coverage,
            **kept,
            **sample,
        )
    except (RuntimeError, OSError) as error:
        raise ValueError(trainer_error(str(error), vocab_size)) from None
    return model.getvalue()


def sentences_of(texts: Iterable[str]) -> Iterator[str]:
    """The lines of the texts; a line that the trainer would leave out for its length is cut."""
    for text in texts:
        for line in text.splitlines():
            for start in range(0, len(line), MAX_CHARS):
                yield line[start : start + MAX_CHARS]


def trainer_error(said: str, vocab_size: int) -> str:
    """The trainer's "(line of C++) [condition] reason" as one line with the remedy."""
    if found := re.search(r"value <= (\d+)", said):
        return f"--vocab_size {vocab_size} is more than this text gives: at most {found[1]}, or give more text"
    if "required_chars" in said or "too small" in said.lower():
        return f"--vocab_size {vocab_size} is less than the single characters take: a larger one, or a lower --character_coverage"
    return f"--vocab_size {vocab_size}: the trainer says: {' '.join(said.split())}"


def lossless(tokenizer: Tokenizer, lines: Iterable[str]) -> tuple[int, int]:
    """(how many of the lines decode back to themselves, how many there are)."""
    same = [tokenizer.decode(tokenizer.encode(line)) == line for line in lines]
    return sum(same), len(same)


def read_texts(src: str, field: str = "text", show_progress: bool = False) -> Iterator[str]:
    """The text of files and directories ("a,b"; see readers.py for the kinds), some kB at a time, with a bar over bytes.

    Bytes that are no UTF-8 become U+FFFD. A record that has no text in `field` is left out, and so are a directory's files of
    other kinds; with the bar goes a line that counts them."""
    from tqdm import tqdm

    sources, others = readers.find_sources([name for name in src.split(",") if name])
    if others and show_progress:
        log.say(f"{len(others)} file(s) of other kinds left out, the first: {others[0]}")
    without = 0
    total = sum(source.size for source in sources)
    with tqdm(total=total, desc="reading", unit="B", unit_scale=True, disable=not show_progress) as bar:
        for unit in readers.read_units(sources, readers.Options(field=field, unit_bytes=UNIT_BYTES)):
            if unit.kind == "ids":
                raise ValueError(f"{sources[unit.source].name} holds token ids, not text: give the text they came from")
            for text in texts_of(unit, field):
                if text:
                    yield text
                else:
                    without += 1
            bar.update(unit.progress)
    if without and show_progress:
        log.say(f'{without:,} record(s) without text in "{field}" left out: if they have some, name its --field')


def texts_of(unit: readers.Unit, field: str) -> Iterator[str | None]:
    """None: a record without."""
    if unit.kind == "texts":
        yield from unit.payload
    elif unit.kind != "jsonl":
        yield unit.payload.decode(errors="replace")
    for line in unit.payload.splitlines() if unit.kind == "jsonl" else ():
        try:
            text = json.loads(line).get(field)
        except (ValueError, AttributeError):
            text = None
        if line.strip():
            yield text if isinstance(text, str) else None


def read_special_tokens(path: str | Path) -> list[str]:
    """Names of special tokens: {"tokens": [...]} (the tokens.json of Ray's fine-tuning template) or a JSON list."""
    try:
        content = json.loads(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"--special_tokens {path}: not JSON ({error}): repair it") from None
    tokens = content.get("tokens") if isinstance(content, dict) else content
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
        raise ValueError(f'--special_tokens {path}: expected {{"tokens": ["<A>", "<B>"]}} or a list of names')
    return tokens


def merged_with(base: Tokenizer, extra: Tokenizer, rule: str) -> tuple[Tokenizer, str]:
    """(the merged tokenizer, what to say about it)."""
    merged = merging.merge(base, extra, rule)
    tokenizer = SentencePiece(base.path, merged.model, {t: i for t, i in base.added_tokens.items()})
    unreached = merging.unreachable(tokenizer, merged.added)
    said = f"{len(merged.added)} pieces added, {merged.known} known to the base, {len(merged.left_out)} left out by {rule}\n"
    if unreached:
        said += f"{len(unreached)} of them no text gives, since no merges lead there: {' '.join(unreached[:5])} ...\n"
    return tokenizer, said


def grown_by_text(
    base: Tokenizer, src: str, vocab_size: str | None, field: str, show_progress: bool = False
) -> tuple[Tokenizer, str]:
    """(the grown tokenizer, what to say about it). `vocab_size`: "+8000" more tokens, or how many there shall be."""
    word = (vocab_size or "").strip()
    if not word.removeprefix("+").isdigit():
        raise ValueError(
            f"--vocab_size {vocab_size}: give +N for N more tokens than {base.vocab_size}, or the new size"
        )
    number = int(word) if word.startswith("+") else int(word) - base.vocab_size
    if number < 1:
        raise ValueError(
            f"--vocab_size {vocab_size} is not above the base's {base.vocab_size}: a vocabulary only grows"
        )
    tokenizer = bpe.grow(base, read_texts(src, field, show_progress), number)
    got = tokenizer.vocab_size - base.vocab_size
    return (
        tokenizer,
        f"{got} merges learned{'' if got == number else f', the text gives no more than that of {number}'}\n",
    )


def open_pair(old: str | Path | None, new: str) -> tuple[Tokenizer, Tokenizer]:
    """Both tokenizers, opened, the new one an extension of the old one (ValueError)."""
    if not old:
        raise ValueError("--src has no tokenizer beside it: name the one it was trained with by --old_tokenizer_path")
    pair = Tokenizer.open(old), Tokenizer.open(new)
    check_extension(*pair)
    return pair


def check_extension(old: Tokenizer, new: Tokenizer) -> None:
    """ValueError unless every id of `old` means the same in `new`, which may have more. The kinds may differ where the
    tokens do not (Llama 3's tiktoken file and its tokenizer.json)."""
    before, after = old.tokens(), new.tokens()
    for i, (a, b) in enumerate(zip(before, after)):
        if a != b:
            raise ValueError(
                f"{new.path} is no extension of {old.path}: id {i} is {b.decode(errors='replace')!r} in it and was "
                f"{a.decode(errors='replace')!r}: merge the vocabularies with tools/merge_tokenizer.py"
            )
    if len(after) < len(before):
        raise ValueError(
            f"{new.path} has {len(after)} tokens and {old.path} {len(before)}: a vocabulary only grows, give the larger "
            "one with --tokenizer_path"
        )


def pieces_of_new(old: Tokenizer, new: Tokenizer) -> list[list[int]]:
    """For each id that only `new` has, from old.vocab_size on: the ids that `old` cuts its text into."""
    return [old.split_token(token) for token in new.tokens()[old.vocab_size :]]


def count_tokens(texts: Iterable[str], *tokenizers: Tokenizer) -> list[int]:
    """How many tokens the texts take in each tokenizer."""
    totals = [0] * len(tokenizers)
    for text in texts:
        totals = [n + len(tokenizer.encode(text)) for n, tokenizer in zip(totals, tokenizers)]
    return totals
