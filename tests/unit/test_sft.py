"""Instruction data: the prompts to the byte, labels that are the answer and no more, weights, splits, every error."""

import json
import random
import re
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from accessory.data.dialog import Encoder, Message
from accessory.data.dialog import encode_prompt as dialog_prompt
from accessory.data.records import Entry, read_config, read_dialogs
from accessory.data.sft import DataArgs, SFTDataset, load_sft, ordered_map, weighted
from accessory.data.templates import Named, open_template, question_ids
from accessory.tokenizer import Tokenizer

RECORDS = [
    {"instruction": f"Say the number {i}.", "output": f"It is {i}.", "input": "" if i % 3 else f"in words {i}"}
    for i in range(20)
]


def asset(*names: str) -> Path:
    """A file of the shared assets; the test is skipped where they are not there."""
    path = Path(__file__).parents[3].joinpath("shared", "assets", *names)
    if not path.exists():
        pytest.skip(f"no {path}")
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tiny sentencepiece model of LLaMA's kind, in which ':' merges with ' ' and with '\\n' and with ':'."""
    import sentencepiece

    directory = tmp_path_factory.mktemp("tokenizer")
    lines = [prompt(r["instruction"], r["input"]) + " " + r["output"] for r in RECORDS] + ["a:: b:: c:: d::"] * 9
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([part for line in lines for part in line.split("\n")]),
        **{"model_prefix": str(directory / "tokenizer"), "vocab_size": 420, "model_type": "bpe"},
        **{"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False},
        **{"minloglevel": 2, "num_threads": 1, "split_by_unicode_script": False, "character_coverage": 1.0},
    )
    return Tokenizer.open(directory)


def write(path: Path, records: list[dict]) -> Path:
    lines = [json.dumps(r, ensure_ascii=False) for r in records]
    text = "\n".join(lines) + "\n" if path.suffix == ".jsonl" else json.dumps(records)
    path.write_text(text, encoding="utf-8")
    return path


def load(path: Path, tokenizer: Tokenizer, seed: int = 0, **flags) -> tuple[SFTDataset, SFTDataset | None]:
    return load_sft(DataArgs(**{"data_config": str(path), "max_seq_len": 4096, **flags}), tokenizer, seed)


def answers(dataset: SFTDataset, tokenizer: Tokenizer) -> list[str]:
    """What each item's labels say, EOS checked and taken off."""
    found = []
    for example in (dataset[i] for i in range(len(dataset))):
        assert example.ids[-1] == tokenizer.eos_id
        head, labels = example.ids[: example.prompt_len], example.ids[example.prompt_len : -1]
        found.append(tokenizer.decode(labels, after=head))
    return found


# --- prompts and labels -----------------------------------------------------------------------------------------------


def prompt(instruction: str, input: str = "") -> str:
    """Stanford's prompt, as its train.py has it."""
    more = ", paired with an input that provides further context" if input else ""
    head = f"Below is an instruction that describes a task{more}. Write a response that appropriately completes the request."
    section = f"\n\n### Input:\n{input}" if input else ""
    return f"{head}\n\n### Instruction:\n{instruction}{section}\n\n### Response:"


def encode_example(tokenizer: Tokenizer, text: str, output: str) -> tuple[list[int], int]:
    """(ids of text + output + EOS, how many of them are the text's), by the template `none`."""
    pieces = Named("none", tokenizer).pieces([Message("user", text), Message("assistant", output)])
    runs = Encoder(tokenizer).runs(pieces, [1], "joint")
    learnt = [run.message == 1 for run in runs for _ in run.ids]
    return [i for run in runs for i in run.ids], learnt.index(True)


@pytest.mark.parametrize("words", [("Add.", ""), ("Add.", "1, 2"), ("{x} {0} {instruction}", "{input}")])
def test_stanfords_prompts_to_the_byte(tokenizer: Tokenizer, words: tuple[str, str]) -> None:
    expected = tokenizer.encode(prompt(*words), bos=tokenizer.add_bos)
    message = Message("user", words[0], input=words[1])
    assert dialog_prompt([message], open_template("alpaca", tokenizer), Encoder(tokenizer)) == expected
    if not words[1]:
        assert question_ids(tokenizer, words[0]) == expected != question_ids(tokenizer, words[0], "vicuna")


def random_answer(rng: random.Random) -> str:
    pools = ("abc XYZ 019", "  \n\t", "::", ".,:;#*(){}<>|/", "éüñß", "你好世界", "🙂👩‍👧🇫🇷", "\u0301\u200d\xa0")
    return "".join(rng.choice(rng.choice(pools)) for _ in range(rng.randrange(30)))


def check_labels(tokenizer: Tokenizer, outputs: list[str]) -> int:
    """-> in how many of the outputs the joint tokenisation did not begin with the prompt's ids."""
    separate, text = 0, prompt("Say it.")
    head = tokenizer.encode(text, bos=tokenizer.add_bos)
    for output in outputs:
        ids, prompt_len = encode_example(tokenizer, text, output)
        assert ids[:prompt_len] == head  # what generation starts from
        assert ids[-1] == tokenizer.eos_id and ids.count(tokenizer.eos_id) == 1
        assert tokenizer.decode(ids[prompt_len:], after=head) == output
        assert tokenizer.decode(ids) == text + output
        joint = tokenizer.encode(text + output, bos=tokenizer.add_bos, eos=True)
        separate += ids != joint
        assert ids == joint or joint[:prompt_len] != head
    return separate


OUTPUTS = [
    "",
    " ",
    "Red",
    " Red",
    "\n",
    "\nRed",
    "\n\nRed",
    ": yes",
    "::",
    "###",
    "🙂",
    "你好",
    "</s>",
    "e\u0301",
    "a" * 300,
]


def test_labels_are_the_answer_and_eos(tokenizer: Tokenizer) -> None:
    rng = random.Random(0)
    separate = check_labels(tokenizer, [*OUTPUTS, *(random_answer(rng) for _ in range(300))])
    assert separate > 0  # both ways have been through the checks


@pytest.mark.parametrize(
    "names",
    [("tok_llama", "tokenizer.model"), ("tok_mistral", "tokenizer.model.v1"), ("tok_llama3",), ("smollm2-135m",)],
)
def test_labels_with_real_tokenizers(names: tuple[str, ...]) -> None:
    real, rng = Tokenizer.open(asset(*names)), random.Random(0)
    separate = check_labels(real, [*OUTPUTS, *(random_answer(rng) for _ in range(100))])
    assert separate > 0 or real.kind == "sentencepiece"


def test_bos_stands_in_front_where_the_family_uses_it(tokenizer: Tokenizer) -> None:
    ids, prompt_len = encode_example(tokenizer, prompt("x"), "y")
    assert ids[0] == tokenizer.bos_id and ids.count(tokenizer.bos_id) == 1 and prompt_len > 1
    smollm2 = Tokenizer.open(asset("smollm2-135m"))
    ids, _ = encode_example(smollm2, prompt("x"), "y")
    assert smollm2.bos_id not in ids and ids[-1] == 2


def test_llama_boundary_by_hand() -> None:
    """What Stanford's recipe gives with LLaMA's tokenizer: 'Response', ':', then 'Hello' without a space."""
    real = Tokenizer.open(asset("tok_llama", "tokenizer.model"))
    ids, prompt_len = encode_example(real, prompt("Greet."), "Hello")
    assert ids[prompt_len - 2 :] == [13291, 29901, 10994, 2] and ids[0] == 1


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
@pytest.mark.parametrize("num_workers", [0, 3])
def test_a_file_becomes_its_examples_in_order(
    tmp_path: Path, tokenizer: Tokenizer, name: str, num_workers: int
) -> None:
    many = [{**RECORDS[i % 20], "output": f"answer {i}"} for i in range(300)]
    train, val = load(write(tmp_path / name, many), tokenizer, num_workers=num_workers)
    assert val is None and answers(train, tokenizer) == [r["output"] for r in many]
    lengths = [len(train[i].ids) for i in range(300)]
    supervised = sum(len(train[i].ids) - train[i].prompt_len for i in range(300))
    assert train.report._asdict() == {
        **{"read": 300, "truncated": 0, "dropped": 0, "unlabelled": 0, "examples": 300},
        **{"tokens": sum(lengths), "supervised_tokens": supervised, "packs": 0},
    }
    assert train[7].ids.dtype == np.int32
    assert tokenizer.decode(train[0].ids) == prompt("Say the number 0.", "in words 0") + "answer 0"


def test_what_editors_leave_is_taken(tmp_path: Path) -> None:
    line = '{"instruction": "a", "input": null, "output": "b", "id": 7}'
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + f"{line}\r\n\r\n{line}\r\n \r\n\n".encode())
    (tmp_path / "b.json").write_bytes(b"\xef\xbb\xbf" + f"[{line},\r\n{line}]\r\n\r\n".encode())
    (tmp_path / "c.jsonl").write_text('{"instruction": "a", "output": "b"}')  # no newline at the end
    (tmp_path / "D.JSONL").write_text(json.dumps({"instruction": "a", "output": "x\u2028y\x85z"}, ensure_ascii=False))
    assert [r.where for r in read_dialogs(Entry(tmp_path / "a.jsonl"))] == [f"{tmp_path}/a.jsonl:{n}" for n in (1, 3)]
    assert [len(read_dialogs(Entry(tmp_path / n))) for n in ("b.json", "c.jsonl", "D.JSONL")] == [2, 1, 1]
    assert read_dialogs(Entry(tmp_path / "D.JSONL"))[0].messages[1].text == "x\u2028y\x85z"


GOOD = b'{"instruction": "a", "output": "b"}\n'


@pytest.mark.parametrize(
    "name, content, where, said",
    [
        ("d.jsonl", GOOD + b'{"instruction": "a", "output": "b"\n' + GOOD, ":2:", "not valid JSON .* at column 35"),
        ("d.jsonl", GOOD + b"\n" + b"oops\n", ":3:", "not valid JSON"),
        ("d.jsonl", GOOD + GOOD.strip() + GOOD, ":2:", "Extra data"),
        ("d.jsonl", GOOD * 4 + b'{"instruction": "caf\xe9", "output": "b"}\n', ":5:", "byte 0xe9 is not UTF-8"),
        ("d.jsonl", GOOD + b'{"instruction": "a"}\n', ":2:", '"output" is missing .keys there: instruction'),
        ("d.jsonl", GOOD + b'{"output": "a"}\n', ":2:", '"instruction" is missing'),
        ("d.jsonl", b'{"text": "a"}\n', ":1:", '"instruction" is missing .keys there: text'),
        ("d.jsonl", b"{}\n", ":1:", "keys there: none"),
        ("d.jsonl", GOOD + b'{"instruction": "a", "output": 42}\n', ":2:", '"output" is a number, not text'),
        ("d.jsonl", GOOD + b'{"instruction": "a", "output": null}\n', ":2:", '"output" is null, not text'),
        ("d.jsonl", b'{"instruction": "a", "input": ["x"], "output": "b"}\n', ":1:", '"input" is a list, not text'),
        ("d.jsonl", b'{"instruction": "a", "output": "\\ud83d"}\n', ":1:", "half of a surrogate pair"),
        ("d.jsonl", b'{"instruction": "a", "output": "b", "image": "x.jpg"}\n', ":1:", "image"),
        ("d.jsonl", GOOD + b"[1, 2]\n", ":2:", "a list, not a record"),
        ("d.json", b'[{"instruction": "a", "output": "b"},\n {"instruction": "a"}]', ": item 2:", "is missing"),
        ("d.json", b'[{"instruction": "a", "output": "b"},\n {"instruction": }]', ":2:", "not valid JSON"),
        ("d.json", b'[{"instruction": "a",\n\n "output": "\xff"}]', ":3:", "byte 0xff is not UTF-8"),
        ("d.json", GOOD + GOOD, ":2:", "name the file .jsonl"),
        ("d.json", GOOD, ":", "an object, not a list of records"),
        ("d.json", b"[3]", ": item 1:", "a number, not a record"),
        ("d.json", b"[]", ":", "empty, not one example"),
        ("d.json", b" \n", ":", "empty, not one example"),
        ("d.jsonl", b"\n\n", ":", "empty, not one example"),
        ("d.jsonl", b"", ":", "empty, not one example"),
    ],
)
def test_bad_data_is_one_line_with_file_and_place(
    tmp_path: Path, tokenizer: Tokenizer, name: str, content: bytes, where: str, said: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=said) as error:
        load(tmp_path / name, tokenizer)
    assert str(error.value).startswith(f"{tmp_path / name}{where}") and "\n" not in str(error.value)


# --- the YAML ---------------------------------------------------------------------------------------------------------


def test_accessorys_yaml_is_read_as_it_is(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    write(tmp_path / "configs" / "beside.json", RECORDS[:4])
    write(tmp_path / "cwd" / "here.jsonl", RECORDS[4:7])
    write(tmp_path / "cwd" / "beside.json", RECORDS[:1])  # beside the YAML comes first
    write(tmp_path / "absolute.json", RECORDS[7:9])
    yaml = tmp_path / "configs" / "data.yaml"
    yaml.write_text(
        "META:\n  -\n    path: 'beside.json'\n    type: 'text'\n"
        "  - path: here.jsonl\n    type: text\n    prompt_type: alpaca\n    preprocess:\n    root: /images\n"
        f"  - {{path: {tmp_path}/absolute.json, type: other, ratio: 0.5}}\n",
        encoding="utf-8-sig",
    )
    train, _ = load(yaml, tokenizer)
    expected = [r["output"] for r in RECORDS[:7]]
    assert answers(train, tokenizer)[:7] == expected and len(train) == 8


def test_split_val_and_val_ratio(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write(tmp_path / "a.json", RECORDS[:10])
    write(tmp_path / "b.json", RECORDS[10:15])
    write(tmp_path / "c.json", RECORDS[15:])
    yaml = tmp_path / "d.yaml"
    yaml.write_text("META: [{path: a.json, weight: 3}, {path: b.json}, {path: c.json, split: val}]")
    train, val = load(yaml, tokenizer)
    assert (len(train), len(val)) == (35, 5)
    train, val = load(yaml, tokenizer, val_ratio=0.2)
    assert (train.report.read, len(train), len(val)) == (12, 8 * 3 + 4, 2 + 1 + 5)
    texts = Counter(answers(train, tokenizer)), Counter(answers(val, tokenizer))
    assert (
        not texts[0].keys() & texts[1].keys() and len(texts[0]) + len(texts[1]) == 20
    )  # nothing in both, nothing lost
    again, other = load(yaml, tokenizer, val_ratio=0.2)[1], load(yaml, tokenizer, seed=1, val_ratio=0.2)[1]
    assert again.fingerprint == val.fingerprint != other.fingerprint
    assert len(load(tmp_path / "b.json", tokenizer, val_ratio=0.001)[1]) == 1
    yaml.write_text("META: [{path: c.json, split: val}]")
    with pytest.raises(ValueError, match="no training example left"):
        load(yaml, tokenizer)
    write(tmp_path / "one.json", RECORDS[:1])
    with pytest.raises(ValueError, match="--val_ratio 0.5 leaves nothing to train on of .*one.json"):
        load(tmp_path / "one.json", tokenizer, val_ratio=0.5)


@pytest.mark.parametrize("weight, count", [(1, 10), (0.5, 5), (0.26, 3), (2, 20), (2.5, 25), (0.1, 1), (3.14, 31)])
def test_weights_are_exact(weight: float, count: int) -> None:
    order = weighted(10, weight, (0, 0))
    assert len(order) == count and order.dtype == np.int64
    times = np.bincount(order, minlength=10)
    assert times.max() - times.min() <= 1
    assert (order == weighted(10, weight, (0, 0))).all()
    if count % 10:
        assert any((order != weighted(10, weight, (seed, 0))).any() for seed in range(1, 4))


def test_weights_over_several_sets(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write(tmp_path / "a.json", RECORDS[:8])
    write(tmp_path / "b.jsonl", RECORDS[8:])
    (tmp_path / "d.yaml").write_text(
        "META: [{path: a.json, type: t, weight: 0.25}, {path: b.jsonl, type: t, weight: 1.5}]"
    )
    train, _ = load(tmp_path / "d.yaml", tokenizer)
    times = Counter(answers(train, tokenizer))
    assert sorted(times[r["output"]] for r in RECORDS[:8]) == [0] * 6 + [1] * 2
    assert sorted(times[r["output"]] for r in RECORDS[8:]) == [1] * 6 + [2] * 6
    assert train.report.examples == len(train) == 20 and train.report.read == 20
    assert train.report.tokens == sum(len(train[i].ids) for i in range(20))  # an epoch's, weights applied


@pytest.mark.parametrize(
    "content, said",
    [
        ("META: [{path: a.json, wieght: 2}]", "META entry 1: unknown key wieght: did you mean weight"),
        ("META:\n  - {path: a.json}\n  - {path: gone.json}", "META entry 2: no such file: .*gone.json or gone.json"),
        ("META: [{path: /gone/a.json}]", "META entry 1: no such file: /gone/a.json"),
        ("META: [{type: text}]", "META entry 1: no path"),
        ("META: [a.json]", "META entry 1: no path"),
        ("META: [{path: a.json, weight: 0}]", "weight 0: a number above 0"),
        ("META: [{path: a.json, weight: -1}]", "weight -1"),
        ("META: [{path: a.json, weight: lots}]", "weight 'lots'"),
        ("META: [{path: a.json, weight: .nan}]", "weight nan"),
        ("META: [{path: a.json, weight: .inf}]", "weight inf"),
        ("META: [{path: a.json, weight: true}]", "weight True"),
        ("META: [{path: a.json, weight: 2, split: val}]", "weight 2 with split val"),
        ("META: [{path: a.json, split: test}]", "split 'test': choose train or val"),
        ("META: [{path: a.json, prompt_type: qg}]", "only prompt_type alpaca"),
        ("META: [{path: a.json, preprocess: caption}]", "without preprocess"),
        ("META: []", "no META list"),
        ("DATA: 1", "no META list"),
        ("instruction,output\na,b", "no META list .*; data itself is named .json .a list., .jsonl"),
        ("", "no META list"),
        ("META:\n  - {path: a.json\n  - x", "d.yaml:3: not YAML"),
        ("META:\x00", "not YAML"),
        ("META: [{path: data.csv}]", "data.csv: data is .json .a list., .jsonl"),
    ],
)
def test_bad_yaml_is_one_line(tmp_path: Path, tokenizer: Tokenizer, content: str, said: str) -> None:
    write(tmp_path / "a.json", RECORDS[:2])
    (tmp_path / "data.csv").write_text("a\tb")
    (tmp_path / "d.yaml").write_text(content)
    with pytest.raises(ValueError, match=said) as error:
        load(tmp_path / "d.yaml", tokenizer)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_an_absent_data_config(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="--data_config .*gone.yaml: no such file"):
        read_config(tmp_path / "gone.yaml")
    with pytest.raises(ValueError, match="--data_config is missing"):
        load_sft(DataArgs(), tokenizer, 0)


@pytest.mark.parametrize("flags", [{"val_ratio": 1}, {"val_ratio": -0.1}, {"max_seq_len": 1}, {"num_workers": -1}])
def test_flags_are_checked(flags: dict) -> None:
    name, value = next(iter(flags.items()))
    with pytest.raises(ValueError, match=f"--{name} {value}"):
        DataArgs(**flags)


# --- long examples ----------------------------------------------------------------------------------------------------


def lengths_of(tokenizer: Tokenizer) -> tuple[int, list[int]]:
    prompt_len = len(question_ids(tokenizer, "Say the number 1."))
    return prompt_len, encode_example(tokenizer, prompt("Say the number 1."), "one two three four five six")[0]


@pytest.mark.parametrize("room", range(-1, 5))
def test_truncation_keeps_the_prompt_a_label_and_eos(tmp_path: Path, tokenizer: Tokenizer, room: int) -> None:
    """`room` = positions left for the answer once prompt and EOS are in."""
    prompt_len, whole = lengths_of(tokenizer)
    long = {"instruction": "Say the number 1.", "output": "one two three four five six"}
    path = write(tmp_path / "d.json", [{"instruction": "a", "output": "b"}, long])
    train, _ = load(path, tokenizer, max_seq_len=prompt_len + 1 + room)
    if room < 1:
        assert len(train) == 1 and (train.report.truncated, train.report.dropped) == (0, 1)
        return
    cut = train[1]
    assert cut.ids.tolist() == [*whole[: prompt_len + room], tokenizer.eos_id] and cut.prompt_len == prompt_len
    assert (train.report.read, train.report.truncated, train.report.dropped) == (2, 1, 0)


def test_exactly_long_enough_is_untouched(tmp_path: Path, tokenizer: Tokenizer) -> None:
    _, whole = lengths_of(tokenizer)
    path = write(tmp_path / "d.jsonl", [{"instruction": "Say the number 1.", "output": "one two three four five six"}])
    for on_long in ("truncate", "drop", "error"):
        train, _ = load(path, tokenizer, max_seq_len=len(whole), on_long=on_long)
        assert train[0].ids.tolist() == whole and train.report.truncated == 0
    with pytest.raises(ValueError, match=rf"d.jsonl:1: {len(whole)} tokens, more than --max_seq_len {len(whole) - 1}:"):
        load(path, tokenizer, max_seq_len=len(whole) - 1, on_long="error")
    with pytest.raises(ValueError, match=r"no training example left \(1 read, 1 dropped as longer than --max_seq_len"):
        load(path, tokenizer, max_seq_len=len(whole) - 1, on_long="drop")


def test_an_empty_answer_is_eos_alone(tmp_path: Path, tokenizer: Tokenizer) -> None:
    train, _ = load(write(tmp_path / "d.json", [{"instruction": "a", "output": ""}]), tokenizer)
    assert train[0].ids[train[0].prompt_len :].tolist() == [tokenizer.eos_id]


def test_the_first_long_example_is_named_whatever_the_threads(tmp_path: Path, tokenizer: Tokenizer) -> None:
    records = [{"instruction": "a", "output": "b " * (2000 if i >= 700 else 1)} for i in range(1500)]
    path = write(tmp_path / "d.jsonl", records)
    started = threading.active_count()
    with pytest.raises(ValueError, match=re.escape("d.jsonl:701:")):
        load(path, tokenizer, max_seq_len=300, on_long="error", num_workers=4)
    assert threading.active_count() == started  # no thread stays behind


# --- fingerprint, threads ---------------------------------------------------------------------------------------------


def test_fingerprint_follows_what_is_trained_on(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "d.jsonl", RECORDS)
    whole = load(path, tokenizer)[0]
    first, longest = whole.fingerprint, max(len(whole[i].ids) for i in range(len(whole)))
    same = write(tmp_path / "e.json", [{**r, "id": 1} for r in RECORDS])  # another file, the same examples
    assert first == load(same, tokenizer, num_workers=0)[0].fingerprint and len(first) == 64
    other_answer = write(tmp_path / "f.json", [*RECORDS[:-1], {**RECORDS[-1], "output": "It is 18."}])
    swapped = write(tmp_path / "g.json", [RECORDS[1], RECORDS[0], *RECORDS[2:]])
    (tmp_path / "h.yaml").write_text("META: [{path: d.jsonl, weight: 2}]")
    changed = [load(p, tokenizer)[0].fingerprint for p in (other_answer, swapped, tmp_path / "h.yaml")]
    changed += [
        load(path, tokenizer, max_seq_len=longest - 1)[0].fingerprint,
        load(path, tokenizer, val_ratio=0.1)[0].fingerprint,
    ]
    assert len({first, *changed}) == 6


@pytest.mark.parametrize("num_workers", [0, 1, 4])
def test_ordered_map(num_workers: int) -> None:
    def slow_at_first(i: int) -> int:
        time.sleep(0.02 if i % 5 == 0 else 0)
        if i == 30:
            raise KeyError("thirty")
        return i * i

    got = []
    with pytest.raises(KeyError, match="thirty"):
        for value in ordered_map(slow_at_first, range(100), num_workers):
            got.append(value)
    assert got == [i * i for i in range(30)]  # in order, and the error exactly where its value would have been


def test_ordered_map_works_ahead_but_not_far_and_stops() -> None:
    begun: list[int] = []
    ahead = ordered_map(begun.append, range(1000), 2)
    before = threading.active_count()
    next(ahead)
    time.sleep(0.05)
    assert len(begun) <= 5
    ahead.close()
    assert threading.active_count() == before and len(begun) <= 5


def test_real_alpaca_in_llamas_tokens() -> None:
    path, real = asset("alpaca", "alpaca_en_demo.json"), Tokenizer.open(asset("tok_llama", "tokenizer.model"))
    train, _ = load(path, real, max_seq_len=4096)
    assert answers(train, real) == [r["output"] for r in json.loads(path.read_text())]
    short, _ = load(path, real, max_seq_len=128, on_long="truncate")
    assert short.report.read == 999 == short.report.examples + short.report.dropped and short.report.truncated > 100
    assert all(short[i].ids[-1] == 2 and len(short[i].ids) - short[i].prompt_len >= 1 for i in range(len(short)))
    assert max(len(short[i].ids) for i in range(len(short))) == 128
