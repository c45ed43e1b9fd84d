"""Labels are the answers and their ends, on any dialog; long dialogs lose whole turns; the ways to train and tokenise."""

import random
from functools import partial

import pytest

from accessory.data.chat_template import ChatTemplate
from accessory.data.dialog import Dialog, Encoded, Encoder, Message, Rules, encode_dialog, learnt_messages
from accessory.data.templates import NAMED, Named, open_template
from accessory.tokenizer import Tokenizer
from tests.helpers import assets

U, A, S = "user", "assistant", "system"
SPECIALS = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ENDS = {"llama3": "<|eot_id|>", "chatml": "<|im_end|>", "jinja": "<|im_end|>", "accessory": "\n###"}
BEFORE = {"llama2-chat": " ", "vicuna": " ", "accessory": " "}  # what an answer begins with
POOL = [
    "abc",
    " ",
    "\n",
    "Hello",
    " world",
    "🙂",
    "👩‍👧",
    "你好",
    "é",
    "e\u0301",
    "1234",
    "<|im_end|>",
    "</s>",
    "[INST]",
    "###",
]
POOL += ["\n###", ":", "  ", "\t", "ASSISTANT:", "<", "|>", "\u3000", "\ufffd", "«»", "x" * 40]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tiny sentencepiece model of LLaMA's kind, which loses nothing."""
    import sentencepiece

    directory = tmp_path_factory.mktemp("tokenizer")
    lines = [
        "grass is green, snow is white and coal is black",
        "ASSISTANT: abc Hello world:",
        "###",
        "a:: b:: c ::",
    ] * 9
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        **{"model_prefix": str(directory / "tokenizer"), "vocab_size": 350, "model_type": "bpe", "minloglevel": 2},
        **{"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False},
        **{"num_threads": 1, "hard_vocab_limit": False},
    )
    return Tokenizer.open(directory).with_special_tokens(SPECIALS)


def opened(name: str, tokenizer: Tokenizer):
    return ChatTemplate(CHATML, tokenizer, "jinja") if name == "jinja" else open_template(name, tokenizer)


def encode(tokenizer: Tokenizer, name: str, messages: list[Message], **rules) -> Encoded | None:
    dialog = Dialog("d:1", "messages", tuple(messages))
    return encode_dialog(dialog, opened(name, tokenizer), Encoder(tokenizer), Rules(**{"max_seq_len": 10**6, **rules}))


def talk(*texts: str, system: str | None = None) -> list[Message]:
    said = [Message(A if i % 2 else U, text) for i, text in enumerate(texts)]
    return [Message(S, system)] * (system is not None) + said


def text_of(tokenizer: Tokenizer, ids: list[int], after: list[int]) -> str:
    """What `ids` add to the text, special tokens by name."""
    names = {i: name for name, i in tokenizer.special_tokens.items()}
    text, plain = "", []
    before = after
    for i in [*ids, None]:
        if i in names or i is None:
            text += tokenizer.decode(plain, after=before or tokenizer.encode(":"))
            text, plain, before = text + names.get(i, ""), [], tokenizer.encode(":")
        else:
            plain.append(i)
    return text


def spans(found: Encoded) -> list[tuple[int, int]]:
    edges = [k for k, (a, b) in enumerate(zip([False, *found.learnt], [*found.learnt, False])) if a != b]
    return list(zip(edges[::2], edges[1::2]))


def random_dialog(rng: random.Random) -> list[Message]:
    def text() -> str:
        return "".join(rng.choice(POOL) for _ in range(rng.randrange(8)))

    count, system = rng.randrange(1, 5), text() if rng.random() < 0.3 else None
    return talk(*(t for _ in range(count) for t in (text() or "?", text())), system=system)


def expected_of(name: str, text: str) -> str:
    if name in ("llama3", "llama2-chat"):
        text = text.strip()
    around = BEFORE.get(name, "")
    return around + text + (" " if name == "llama2-chat" else "") + ENDS.get(name, "</s>")


@pytest.mark.parametrize("name", [*NAMED, "jinja"])
def test_learnt_tokens_are_the_answers_and_their_ends(tokenizer: Tokenizer, name: str) -> None:
    """On 1,000 dialogs in all: no label off by one at either side, whatever the texts hold."""
    rng = random.Random(name)
    for _ in range(1000 // len([*NAMED, "jinja"]) + 1):
        messages = random_dialog(rng)
        found = encode(tokenizer, name, messages)
        answers = [m.text for m in messages if m.role == A]
        pairs = spans(found)
        if name == "accessory":  # EOS at the very end is a span of its own only where it does not follow an answer
            assert found.ids[-1] == tokenizer.eos_id and found.learnt[-1]
            pairs[-1] = (pairs[-1][0], pairs[-1][1] - 1)
        if name in ("cla1", "cla2", "minichat"):  # texts of their own
            texts = [tokenizer.decode(found.ids[a : b - 1]) + "</s>" * (found.ids[b - 1] == 2) for a, b in pairs]
        else:
            texts = [text_of(tokenizer, found.ids[a:b], found.ids[max(a - 1, 0) : a]) for a, b in pairs]
        assert texts == [expected_of(name, text) for text in answers], messages


@pytest.mark.parametrize("path", [("tok_llama", "tokenizer.model"), ("smollm2-135m",), ("tok_llama3",)])
def test_the_same_with_real_tokenizers(path: tuple[str, ...]) -> None:
    real, rng = Tokenizer.open(assets(*path)), random.Random(0)
    name = {"smollm2-135m": "chatml", "tok_llama3": "llama3"}.get(path[0], "vicuna")
    for _ in range(150):
        messages = random_dialog(rng)
        found = encode(real, name, messages)
        texts = [text_of(real, found.ids[a:b], found.ids[max(a - 1, 0) : a]) for a, b in spans(found)]
        assert texts == [expected_of(name, m.text) for m in messages if m.role == A], messages


# --- which messages ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama2-chat", "chatml", "jinja", "vicuna"])
def test_what_is_trained_on(tokenizer: Tokenizer, name: str) -> None:
    messages = talk("one", "two", "three", "four", system="five")
    learn = {way: encode(tokenizer, name, messages, train_on=way) for way in ("all", "last", "flagged", "text")}
    assert len({tuple(found.ids) for found in learn.values()}) == 1  # the ids are the same, the labels are not
    assert learn["all"] == learn["flagged"] and all(learn["text"].learnt)
    assert spans(learn["last"]) == spans(learn["all"])[1:] and len(spans(learn["all"])) == 2


def test_flags_of_messages(tokenizer: Tokenizer) -> None:
    flagged = [Message(U, "one", True), Message(A, "two", False), Message(U, "three"), Message(A, "four")]
    found = encode(tokenizer, "chatml", flagged, train_on="flagged")
    assert [text_of(tokenizer, found.ids[a:b], []).strip() for a, b in spans(found)] == [
        "one<|im_end|>",
        "four<|im_end|>",
    ]
    dialog = Dialog("d:7", "messages", tuple(flagged))
    with pytest.raises(ValueError, match=r'^d:7: message 1 \(user\) has "train": true: choose --train_on flagged'):
        learnt_messages(dialog, "all")
    assert learnt_messages(dialog._replace(messages=(Message(U, "a", False), Message(A, "b", True))), "all") == [
        False,
        True,
    ]


def test_nothing_to_learn_is_seen(tokenizer: Tokenizer) -> None:
    assert not any(encode(tokenizer, "chatml", talk("one")).learnt)
    muted = [Message(U, "a"), Message(A, "b", False)]
    assert not any(encode(tokenizer, "chatml", muted, train_on="flagged", max_seq_len=5).learnt)


def test_pads_are_learnt_where_asked(tokenizer: Tokenizer) -> None:
    """The Anyscale template: cut or filled with EOS to ctx_len, labels = input_ids."""
    whole = Named("none", tokenizer, ["<|im_start|>"])
    run = partial(encode_dialog, template=whole, encoder=Encoder(tokenizer))
    dialog = Dialog("d", "text", (Message("text", "<|im_start|>grass is green"),))
    ids = [1, tokenizer.special_tokens["<|im_start|>"], *tokenizer.encode("grass is green")]
    assert run(dialog, rules=Rules("pads", max_seq_len=40)) == ([*ids, *[2] * (40 - len(ids))], [True] * 40, False)
    assert run(dialog, rules=Rules("pads", max_seq_len=5)) == (ids[:5], [True] * 5, True)
    assert run(dialog, rules=Rules(max_seq_len=40)).ids == [*ids, 2]


# --- long dialogs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["chatml", "llama2-chat", "minichat", "jinja", "accessory"])
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_the_oldest_turns_go_first_and_whole(tokenizer: Tokenizer, name: str, system: str | None) -> None:
    """At every limit: the result is the dialog without its k oldest turns, k the smallest that fits."""
    said = ["one apple", "two pears", "three", "four lemons", "five", "six"]
    shorter = [encode(tokenizer, name, talk(*said[2 * k :], system=system)) for k in range(3)]
    lengths = [len(found.ids) for found in shorter]
    for limit in range(lengths[2], lengths[0] + 1):
        k = next(k for k in range(3) if lengths[k] <= limit)
        found = encode(tokenizer, name, talk(*said, system=system), max_seq_len=limit)
        assert found == shorter[k]._replace(cut=k > 0), limit


def test_what_follows_the_last_answer_goes_before_any_turn(tokenizer: Tokenizer) -> None:
    whole = encode(tokenizer, "chatml", talk("one", "two", "three", "four"))
    found = encode(tokenizer, "chatml", talk("one", "two", "three", "four", "five"), max_seq_len=len(whole.ids))
    assert found == whole._replace(cut=True)


@pytest.mark.parametrize("name", ["chatml", "llama2-chat", "alpaca", "jinja", "accessory", "minichat"])
def test_one_long_answer_is_cut_before_its_end(tokenizer: Tokenizer, name: str) -> None:
    short = encode(tokenizer, name, talk("a", ""))
    long = encode(tokenizer, name, talk("x", "y", "a", "grass is green, snow is white and coal is black"))
    own = encode(tokenizer, name, talk("a", "grass is green, snow is white and coal is black"))
    (start, stop), least = spans(own)[-1], len(short.ids) + 4
    for limit in range(least, len(own.ids)):
        found = encode(
            tokenizer, name, talk("x", "y", "a", "grass is green, snow is white and coal is black"), max_seq_len=limit
        )
        assert found.cut and len(found.ids) == limit and found.ids[:start] == own.ids[:start]
        assert found.ids[-1] == own.ids[-1] and found.learnt[:start] == own.learnt[:start]
        assert len(long.ids) > len(own.ids) and any(found.learnt[start:])
        (a, b), gone = spans(found)[-1], len(own.ids) - limit
        end = len(short.ids) - start - (name == "accessory" and 0)
        assert own.ids[start:stop][: b - a - end] == found.ids[a:b][: b - a - end] and gone > 0
    assert encode(tokenizer, name, talk("a " * 300, "b"), max_seq_len=40) is None


def test_an_answer_is_not_cut_inside_a_character(tokenizer: Tokenizer) -> None:
    """The tiny vocabulary has no emoji: each is four byte tokens."""
    whole = encode(tokenizer, "alpaca", talk("a", "🙂🙂🙂🙂"))
    start = whole.learnt.index(True)
    for limit in range(start + 2, len(whole.ids) + 1):
        found = encode(tokenizer, "alpaca", talk("a", "🙂🙂🙂🙂"), max_seq_len=limit)
        if found is None:
            assert limit - start - 1 < 4
            continue
        text = tokenizer.decode(found.ids[start:], after=found.ids[:start])
        assert text == "🙂" * len(text) and text and found.ids[-1] == tokenizer.eos_id and len(found.ids) <= limit


def test_a_dialog_without_special_tokens_takes_time_as_it_is_long(tokenizer: Tokenizer, monkeypatch) -> None:
    """Its ids are those of the whole text; of each turn only the neighbourhood is tokenised again."""
    rng = random.Random(0)
    texts = ["".join(rng.choice(POOL) for _ in range(60)) for _ in range(80)]
    once = encode(tokenizer, "accessory", talk(*texts))
    monkeypatch.setattr("accessory.data.dialog.LONG", 10**9)
    assert encode(tokenizer, "accessory", talk(*texts)) == once
    monkeypatch.undo()
    done, real = [], tokenizer._ids
    monkeypatch.setattr(tokenizer, "_ids", lambda text: done.append(len(text)) or real(text))
    encode(tokenizer, "accessory", talk(*texts))
    assert sum(done) < 25 * sum(map(len, texts))  # 67 times, where every turn begins at the first


@pytest.mark.parametrize("on_long", ["drop", "error"])
def test_other_ways_with_long_dialogs(tokenizer: Tokenizer, on_long: str) -> None:
    if on_long == "drop":
        assert encode(tokenizer, "chatml", talk("a", "b"), max_seq_len=5, on_long="drop") is None
        return
    with pytest.raises(ValueError, match=r"^d:1: \d+ tokens, more than --max_seq_len 5: raise it"):
        encode(tokenizer, "chatml", talk("a", "b"), max_seq_len=5, on_long="error")
