"""Byte-level BPE that grows: merges learned on a text go on where the base's own end.

    text --base's splitter--> words, counted once each --base's merges--> tokens --the most frequent pair, N times--> new merges

Old ids, old merges and special tokens stay; a new token takes the next free id. Its merge ranks behind all of the base's,
so a text is first cut exactly as the base cuts it, and then some neighbours are joined: replacing each new token by its two
halves, again and again, gives back the base's ids. A pair whose text is a token already is passed over, since the base's
merges could go on from there.

What comes out is a tokenizer.json, for Llama 3's tiktoken file too: that has no lines for its 256 special tokens, which
stand right behind the ranks, so that more ranks would shift them (Hugging Face's own Llama 3 is a tokenizer.json as well).
Speed: a word is merged once however often it occurs, and only words that hold the pair are touched.
Test: pytest tests/unit/test_vocabulary.py
"""

import heapq
import json
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

from accessory.tokenizer import LLAMA3_SPLIT, HuggingFace, Tiktoken, Tokenizer, to_byte_level

MIN_COUNT = 2  # a pair that occurs once is no pattern
FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)


def grow(base: Tokenizer, texts: Iterable[str], count: int) -> HuggingFace:
    """The base with up to `count` more tokens (fewer where no pair occurs twice any more), not yet saved.

    ValueError for a base that is no byte-level BPE, and for a text that gives nothing."""
    from tokenizers import Tokenizer as Library

    content = base_content(base)
    library = Library.from_str(json.dumps(content))
    words = count_words(library, texts)
    if not words:
        raise ValueError("--src holds no text: name files with text in them")
    sequences = [[token.id for token in library.model.tokenize(word)] for word in words]
    names = names_by_id(content)
    merges = learn(sequences, list(words.values()), names, count)
    if not merges:
        raise ValueError("--src gives no new token, no pair of tokens occurs twice in it: give more text")
    grown = HuggingFace(base.path, json.dumps(with_merges(content, names, merges), ensure_ascii=False).encode())
    check_grown(base, grown)
    return grown


def count_words(library: Any, texts: Iterable[str]) -> Counter[str]:
    """How often each word of the base's splitter occurs, in the byte alphabet."""
    words: Counter[str] = Counter()
    for text in texts:
        text = library.normalizer.normalize_str(text) if library.normalizer else text
        words.update(word for word, _ in library.pre_tokenizer.pre_tokenize_str(text))
    return words


def learn(words: list[list[int]], counts: list[int], names: list[str], number: int) -> list[tuple[int, int]]:
    """The `number` merges that BPE learns on `words`, each occurring counts[i] times: pairs of ids, the i-th of which
    makes id len(names) + i. Ties go to the smaller pair of ids.

    `names` is the text of every id; `words` and `names` are changed. Counts of pairs are kept up to date: a merge
    re-counts the words that hold it, and the heap holds old counts, which are only ever too high, until they come up."""
    pairs: defaultdict[tuple[int, int], int] = defaultdict(int)
    where: defaultdict[tuple[int, int], array] = defaultdict(lambda: array("I"))
    for w, ids in enumerate(words):
        for pair in pairwise(ids):
            pairs[pair] += counts[w]
            where[pair].append(w)
    heap = [(-n, pair) for pair, n in pairs.items() if n >= MIN_COUNT]
    heapq.heapify(heap)
    known, merges = set(names), []
    while heap and len(merges) < number:
        n, pair = heapq.heappop(heap)
        if pairs[pair] != -n:
            if MIN_COUNT <= pairs[pair] < -n:
                heapq.heappush(heap, (-pairs[pair], pair))
            continue
        text, new = names[pair[0]] + names[pair[1]], len(names)
        if text in known:
            continue
        merges.append(pair)
        names.append(text)
        known.add(text)
        made: set[tuple[int, int]] = set()
        for w in set(where.pop(pair)):
            words[w], new_pairs = joined(words[w], pair, new, counts[w], pairs)
            for now in new_pairs:
                where[now].append(w)
            made.update(new_pairs)
        for now in made:
            if pairs[now] >= MIN_COUNT:
                heapq.heappush(heap, (-pairs[now], now))
    return merges


def joined(
    ids: list[int], pair: tuple[int, int], new: int, count: int, pairs: dict[tuple[int, int], int]
) -> tuple[list[int], list[tuple[int, int]]]:
    """(`ids` with every `pair`, from the left, as `new`; the pairs with `new` that this made). `pairs`, the counts of
    all pairs, is brought up to date for this word, which occurs `count` times."""
    (a, b), out, made, i, last = pair, [], [], 0, len(ids) - 1
    while i <= last:
        token = ids[i]
        if token != a or i == last or ids[i + 1] != b:
            out.append(token)
            i += 1
            continue
        if out:
            before = out[-1]
            pairs[before, a] -= count
            pairs[before, new] += count
            made.append((before, new))
        if i + 1 < last:
            after = ids[i + 2]
            pairs[b, after] -= count
            pairs[new, after] += count
            made.append((new, after))
        out.append(new)
        i += 2
    return out, made


# --- the file ---------------------------------------------------------------------------------------------------------


def base_content(base: Tokenizer) -> dict[str, Any]:
    """The base's tokenizer.json as an object, its added tokens in the vocabulary too, so that they keep their ids when
    more follow. ValueError for what is no byte-level BPE."""
    if isinstance(base, Tiktoken):
        content = llama3_content(base)
    elif isinstance(base, HuggingFace):
        content = json.loads(base.raw.decode("utf-8-sig"))
    else:
        raise ValueError(
            f"--base {base.path} is a sentencepiece model, which takes no merges from text: train an extra one with "
            "tools/train_tokenizer.py and give it with --extra"
        )
    model = content.get("model") or {}
    if model.get("type", "BPE") != "BPE" or "merges" not in model or not content.get("pre_tokenizer"):
        raise ValueError(f"--base {base.path}: a {model.get('type')} tokenizer: only byte-level BPE can grow")
    if "ByteLevel" not in json.dumps([content["pre_tokenizer"], content.get("decoder")]):
        raise ValueError(f"--base {base.path}: its BPE is not byte-level: only byte-level BPE can grow")
    content["truncation"] = content["padding"] = None
    for entry in content.get("added_tokens") or []:
        model["vocab"].setdefault(entry["content"], entry["id"])
    return content


def names_by_id(content: dict[str, Any]) -> list[str]:
    vocab = content["model"]["vocab"]
    names = [""] * (max(vocab.values()) + 1)
    for name, i in vocab.items():
        names[i] = name
    return names


def with_merges(content: dict[str, Any], names: list[str], merges: list[tuple[int, int]]) -> dict[str, Any]:
    """`content` with the new tokens and merges behind its own, in the way it writes merges."""
    model, first = content["model"], len(names) - len(merges)
    model["vocab"] |= {name: first + i for i, name in enumerate(names[first:])}
    as_text = bool(model["merges"]) and isinstance(model["merges"][0], str)
    new = [(names[a], names[b]) for a, b in merges]
    model["merges"] += [f"{a} {b}" if as_text else [a, b] for a, b in new]
    return content


def check_grown(base: Tokenizer, grown: HuggingFace) -> None:
    """ValueError unless every old id means what it meant, and no special token can be typed."""
    old = base.tokens()
    if changed := [i for i, (a, b) in enumerate(zip(old, grown.tokens())) if a != b]:
        raise ValueError(f"{base.path}: id {changed[0]} ({old[changed[0]]!r}) would change: its vocabulary cannot grow")
    for name, i in base.special_tokens.items():
        if i in grown.encode(name):
            raise ValueError(f"{base.path}: the special token {name!r} would be read out of plain text: rename it")


def llama3_content(base: Tiktoken) -> dict[str, Any]:
    """Llama 3's tiktoken file as a tokenizer.json of the same ids, special tokens included."""
    names = {token: to_byte_level(token) for token in base.ranks}
    merges = [[names[a], names[b]] for a, b in merges_of_ranks(base.ranks)]
    vocab = {names[token]: rank for token, rank in base.ranks.items()}
    bos = next(name for name, i in base.special_tokens.items() if i == base.bos_id)
    text, start = {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": bos, "type_id": 0}}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": LLAMA3_SPLIT}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": name, **FLAGS, "special": True}
            for name, i in sorted(base.special_tokens.items(), key=lambda item: item[1])
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [start, text],
            "pair": [start, text, start, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {bos: {"id": bos, "ids": [base.bos_id], "tokens": [bos]}},
        },
        "decoder": byte_level | {"use_regex": True},
        # ignore_merges: tiktoken looks a whole word up before it merges
        "model": {"type": "BPE", "ignore_merges": True, "vocab": vocab, "merges": merges},
    }


def merges_of_ranks(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Merges that do what tiktoken does with ranks: every way to join two tokens into a third, by the third's rank."""
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        cuts = ((token[:i], token[i:]) for i in range(1, len(token)))
        halves = [(a, b) for a, b in cuts if a in ranks and b in ranks]
        merges += sorted(halves, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    return merges
