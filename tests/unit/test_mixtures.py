"""Files of every format in one mixture: what is read, how often it is seen, what bad input says; preview; GSM8K's tool."""

import gzip
import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accessory.data.formats import parse
from accessory.data.loader import parts
from accessory.data.preview import preview
from accessory.data.records import Entry, read_dialogs
from accessory.data.sft import DataArgs, SFTDataset, load_sft
from accessory.tokenizer import Tokenizer
from tests.helpers import assets, tiny_tokenizer
from tools.make_gsm8k import main

FORMATS = {
    "alpaca": {"instruction": "Q {0}", "input": "I {0}", "output": "A {0}"},
    "messages": {"messages": [{"role": "user", "content": "Q {0}"}, {"role": "assistant", "content": "A {0}"}]},
    "parts": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Q {0}"}]},
            {"role": "assistant", "content": "A {0}"},
        ]
    },
    "sharegpt": {"conversations": [{"from": "human", "value": "Q {0}"}, {"from": "gpt", "value": "A {0}"}]},
    "minima": [{"User": "Q {0}", "Assistant": "A {0}"}],
    "prompt": {"prompt": "Q {0}", "completion": "A {0}"},
    "text": {"input": "A {0}"},
}


def fill(item, i: int):
    return json.loads(json.dumps(item).replace("{0}", str(i)))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    (directory / "tokenizer.model").write_bytes(tiny_tokenizer())
    return Tokenizer.open(directory).with_special_tokens(
        ["<START_Q>", "<END_Q>", "<START_A>", "<END_A>", "<|im_start|>", "<|im_end|>"]
    )


def write(path: Path, items: list) -> Path:
    text = json.dumps(items) if ".jsonl" not in path.name else "".join(json.dumps(i) + "\n" for i in items)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def load(path: Path, tokenizer: Tokenizer, seed: int = 0, **flags) -> SFTDataset:
    return load_sft(
        DataArgs(**{"data_config": str(path), "max_seq_len": 600, "template": "vicuna", **flags}), tokenizer, seed
    )[0]


def answers(dataset: SFTDataset, tokenizer: Tokenizer) -> Counter:
    examples = [e for i in range(len(dataset)) for e in parts(dataset[i])]
    return Counter(tokenizer.decode(e.ids[e.learnt()]).strip() for e in examples)


# --- formats ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["d.json", "d.jsonl", "d.json.gz", "D.JSONL.GZ"])
@pytest.mark.parametrize("format", FORMATS)
def test_a_format_is_known_by_its_keys(tmp_path: Path, tokenizer: Tokenizer, format: str, name: str) -> None:
    path = write(
        tmp_path / name.replace("GZ", "gz").replace("JSONL", "jsonl"), [fill(FORMATS[format], i) for i in range(5)]
    )
    template = None if format in ("text", "prompt") else "vicuna"
    found = load(path, tokenizer, template=template)
    assert answers(found, tokenizer) == Counter(f"A {i}" for i in range(5))


def test_all_formats_in_one_file(tmp_path: Path, tokenizer: Tokenizer) -> None:
    mixed = [fill(item, i) for i, (name, item) in enumerate(FORMATS.items()) if name != "text"]
    path = write(tmp_path / "d.jsonl", mixed)
    assert answers(load(path, tokenizer), tokenizer) == Counter(f"A {i}" for i in range(len(mixed)))


def test_roles_and_system(tmp_path: Path) -> None:
    said = [{"from": who, "value": who} for who in ("human", "gpt", "observation", "function_call")]
    item = {"conversations": said, "system": "Be brief."}
    dialog = parse(item, "d:1")
    assert [m.role for m in dialog.messages] == ["system", "user", "assistant", "tool", "assistant"]
    write(
        tmp_path / "d.jsonl",
        [item, {"messages": [{"role": "Human", "content": "a"}, {"role": "bot", "content": "b", "weight": 0}]}],
    )
    a, b = read_dialogs(Entry(tmp_path / "d.jsonl", system="Mine."))
    assert a == dialog._replace(where=a.where) and b.messages[0].text == "Mine." and b.messages[2].train is False


def test_parquet_says_what_it_needs_or_is_read(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "d.parquet"
    try:
        from pyarrow import Table, parquet
    except ImportError:
        path.write_bytes(b"PAR1")
        with pytest.raises(ValueError, match="d.parquet needs the package pyarrow: pip install pyarrow"):
            load(path, tokenizer)
        return
    parquet.write_table(Table.from_pylist([fill(FORMATS["alpaca"], i) for i in range(5)]), path)
    assert len(load(path, tokenizer)) == 5


@pytest.mark.parametrize(
    "name", ["accessory_ShareGPT_3.json", "fastchat_dummy_conversation_500.json", "sharegpt_zh_1K_format.jsonl"]
)
def test_real_dialogs(name: str) -> None:
    path, real = assets("dialog", name), Tokenizer.open(assets("tok_llama", "tokenizer.model"))
    found = load(path, real, template="vicuna", max_seq_len=512, num_workers=2)
    r = found.report
    assert r.read == r.examples + r.dropped + r.unlabelled and r.dropped <= 0.03 * r.read and r.examples > 0
    assert all(len(found[i].ids) <= 512 and found[i].learnt().any() for i in range(len(found)))


# --- mixtures ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(1, 12), st.floats(0.2, 3)), min_size=1, max_size=4), st.integers(0, 3))
@settings(max_examples=25, deadline=None)
def test_weights_are_exact_to_one_example(tokenizer: Tokenizer, tmp_path_factory, sets: list, seed: int) -> None:
    directory = tmp_path_factory.mktemp("mixture")
    for k, (n, _) in enumerate(sets):
        write(directory / f"{k}.jsonl", [fill(FORMATS["alpaca"], f"{k}x{i}") for i in range(n)])
    entries = "".join(f"- {{path: {k}.jsonl, weight: {w!r}}}\n" for k, (_, w) in enumerate(sets))
    (directory / "d.yaml").write_text("META:\n" + entries)
    expected = [int(n * w + 0.5) for n, w in sets]
    if not sum(expected):
        return
    found = load(directory / "d.yaml", tokenizer, seed)
    seen = answers(found, tokenizer)
    for k, (n, _) in enumerate(sets):
        times = [seen[f"A {k}x{i}"] for i in range(n)]
        assert sum(times) == expected[k] and max(times) - min(times) <= 1
    assert load(directory / "d.yaml", tokenizer, seed).fingerprint == found.fingerprint


def test_a_file_that_is_there_twice_has_the_same_held_out(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """With another template, format or weight: what is validated on is trained on in no wording."""
    write(tmp_path / "a.jsonl", [fill(FORMATS["alpaca"], i) for i in range(20)])
    entries = (
        "{path: a.jsonl}, {path: ./a.jsonl, template: alpaca, weight: 2}, {path: a.jsonl, limit: 10, template: zephyr}"
    )
    (tmp_path / "d.yaml").write_text(f"META: [{entries}]")
    args = DataArgs(str(tmp_path / "d.yaml"), val_ratio=0.25, template="vicuna", max_seq_len=600)
    train, val = (answers(side, tokenizer) for side in load_sft(args, tokenizer, 0))
    assert len(val) == 5 and len(train) == 15 and not train.keys() & val.keys()
    assert sum(train.values()) + sum(val.values()) == 15 * 3 + 5 * 2 + 10, "each entry has every record on one side"


def test_keys_of_an_entry(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write(tmp_path / "a.json", [fill(FORMATS["sharegpt"], i) for i in range(9)])
    write(tmp_path / "b.jsonl", [fill(FORMATS["alpaca"], 10 + i) for i in range(9)])
    (tmp_path / "d.yaml").write_text(
        "META:\n- {path: a.json, limit: 4, template: chatml, system: Be brief., format: sharegpt}\n"
        "- {path: b.jsonl, limit: 3, weight: 2, template: alpaca}\n"
    )
    found = load(tmp_path / "d.yaml", tokenizer)
    texts = [tokenizer.decode_with_specials(found[i].ids) for i in range(len(found))]
    assert len(texts) == 4 + 6 and all("system Be brief.<|im_end|>" in t for t in texts[:4])
    assert all("### Response:" in t for t in texts[4:])
    assert answers(found, tokenizer) == Counter(
        [f"A {i}<|im_end|>" for i in range(0)] + [f"A {i}" for i in range(4)] + [f"A 1{i}" for i in range(3)] * 2
    )


def test_a_system_message_beside_an_instruction_is_heard(tmp_path: Path, tokenizer: Tokenizer) -> None:
    record = fill(FORMATS["alpaca"], 1) | {"history": [], "tools": "[]"}
    path = write(tmp_path / "d.jsonl", [record | {"system": system} for system in ("Be brief.", "", None)] + [record])
    found = load(path, tokenizer)
    texts = [tokenizer.decode_with_specials(found[i].ids) for i in range(4)]
    assert ["Be brief." in text for text in texts] == [True, False, False, False] and texts[1] == texts[2] == texts[3]


def test_what_cannot_be_learnt_is_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    asked = {"messages": [{"role": "user", "content": "anyone?"}]}
    path = write(tmp_path / "d.jsonl", [fill(FORMATS["messages"], 1), asked, fill(FORMATS["messages"], 2)])
    report = load(path, tokenizer).report
    assert (report.read, report.unlabelled, report.dropped, report.examples) == (3, 1, 0, 2)
    write(path, [asked])
    with pytest.raises(ValueError, match="no training example left .1 read, 0 dropped .*, 1 with nothing to learn"):
        load(path, tokenizer)


# --- bad input --------------------------------------------------------------------------------------------------------

M = {"role": "user", "content": "a"}
BAD = [
    ({"messages": []}, "a dialog without messages"),
    ({"messages": None}, '"messages" is null, not a list'),
    ({"messages": "hi"}, '"messages" is text, not a list'),
    ({"messages": ["hi"]}, "message 1 is text: write"),
    ({"messages": [M, {"content": "b"}]}, 'message 2: "role" is missing .keys there: content'),
    ({"messages": [M, {"role": "assistant"}]}, 'message 2: "content" is missing'),
    ({"messages": [M, {"role": "asistant", "content": "b"}]}, "unknown role asistant: did you mean assistant"),
    ({"messages": [M, {"role": "assistant", "content": None}]}, '"content" is null, not text'),
    ({"messages": [M, {"role": 3, "content": "b"}]}, '"role" is a number, not text'),
    ({"messages": [M | {"train": "yes"}]}, "\"train\" is 'yes': true or false"),
    ({"messages": [M | {"weight": 0.5}]}, '"weight" is 0.5'),
    ({"messages": [M | {"tool_calls": [{}]}]}, "it has tool_calls"),
    ({"messages": [M | {"content": [{"type": "image_url"}]}]}, "a part of its content is image_url"),
    ({"messages": [M | {"content": ["a"]}]}, "a part of its content is text"),
    ({"messages": [M | {"content": [{"type": "text"}]}]}, '"text" is missing'),
    ({"messages": [M | {"content": "\ud83d"}]}, "half of a surrogate pair"),
    ({"messages": [M], "images": ["a.png"]}, "it has an image"),
    (
        {"messages": [M], "tools": [{"name": "f"}]},
        '"tools" holds tools, which are not read: write them into the system',
    ),
    ({"conversations": [], "functions": "f"}, '"functions" holds tools, which are not read'),
    (
        {"instruction": "a", "output": "b", "history": [["c", "d"]]},
        '"history" holds earlier turns, .*: write the turns',
    ),
    ({"instruction": "a", "output": "b", "system": 3}, '"system" is a number'),
    ({"instruction": "a", "output": None}, 'null, not text: write "", or remove the record'),
    ({"messages": [{"role": "system", "content": "a"}]}, "a dialog without messages"),
    ({"messages": [M, M, {"role": "assistant", "content": "b"}]}, "message 2 .user.: --template llama2-chat needs"),
    ({"messages": [M, {"role": "tool", "content": "b"}]}, "message 2 .tool.: --template llama2-chat has no place"),
    (
        {"messages": [M | {"train": True}, {"role": "assistant", "content": "b"}]},
        'has "train": true: choose --train_on flagged',
    ),
    ({"conversations": []}, "a dialog without messages"),
    ({"conversations": {}}, '"conversations" is an object, not a list'),
    ({"conversations": [{"from": "human", "text": "a"}]}, 'message 1: "value" is missing .keys there: from, text'),
    ({"conversations": [{"from": "alien", "value": "a"}]}, "unknown from alien"),
    ({"conversations": [{"from": "human", "value": "a"}], "system": 3}, '"system" is a number'),
    ([{"User": "a"}], 'turn 1: "Assistant" is missing'),
    ([{"User": "a", "Assistant": 3}], 'turn 1: "Assistant" is a number'),
    ([], "a list, not a record"),
    ([[]], "a list, not a record"),
    ({"prompt": "a", "completion": None}, '"completion" is null'),
    ({"prompt": ["a"], "completion": "b"}, '"prompt" is a list'),
    ({"prompt": "a", "chosen": "b"}, '"instruction" is missing .keys there: prompt, chosen'),
    ({"input": 3}, '"input" is a number'),
    ({"input": "a"}, "--template llama2-chat: a whole text has nothing put around it"),
    (None, "null, not a record"),
    (True, "true or false, not a record"),
    ("a", "text, not a record"),
]


@pytest.mark.parametrize("item, said", BAD)
def test_a_bad_record_is_named_by_its_line(tmp_path: Path, tokenizer: Tokenizer, item, said: str) -> None:
    path = write(tmp_path / "d.jsonl", [fill(FORMATS["messages"], 1), item])
    with pytest.raises(ValueError, match=said) as error:
        load(path, tokenizer, template="llama2-chat")
    assert str(error.value).startswith(f"{path}:2: ") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, raw, said",
    [
        ("d.jsonl", b"[" * 100_000 + b"\n", "d.jsonl:1: .*too deep"),
        ("d.jsonl", b'{"instruction": ' + b"9" * 5000 + b"}\n", "d.jsonl:1: .*too long a number"),
        ("d.jsonl.gz", b"no gzip", "d.jsonl.gz: not a whole gzip file"),
        ("d.jsonl.gz", gzip.compress(b"x" * 999, mtime=0)[:-9], "d.jsonl.gz: not a whole gzip file"),
        ("d.yaml", b"META: [{path: a.jsonl, limit: 0}]", "entry 1: limit 0"),
        ("d.yaml", b"META: [{path: a.jsonl, limit: true}]", "entry 1: limit True"),
        ("d.yaml", b"META: [{path: a.jsonl, format: alpacca}]", "unknown format alpacca: did you mean alpaca"),
        ("d.yaml", b"META: [{path: a.jsonl, format: [x]}]", "unknown format"),
        ("d.yaml", b"META: [{path: a.jsonl, format: sharegpt}]", '"conversations" is null'),
        ("d.yaml", b"META: [{path: a.jsonl, template: 3}]", "template is a number"),
        (
            "d.yaml",
            b"META: [{path: a.jsonl, template: chatlm}]",
            "a.jsonl:1: unknown --template chatlm: did you mean chatml",
        ),
        ("d.yaml", b"META: [{path: a.jsonl, weight: 1e9}]", "weight"),
        ("d.yaml", b"META: [{path: a.jsonl, weight: " + b"9" * 400 + b"}]", "weight"),
        ("d.yaml", b"META: [{path: ~nobody/a.jsonl}]", "no such file"),
        ("d.yaml", b"META: 2024-13-45", "not YAML"),
        ("d.yaml", b"[" * 5000, "not YAML|no META"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, tokenizer: Tokenizer, name: str, raw: bytes, said: str) -> None:
    write(tmp_path / "a.jsonl", [fill(FORMATS["alpaca"], 1)])
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(ValueError, match=said) as error:
        load(tmp_path / name, tokenizer)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(
        ["instruction", "input", "output", "messages", "role", "content", "conversations", "from", "value", "User", "Assistant",
         "prompt", "completion", "train", "weight", "system", "type", "text", "user", "x"]), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip
ROLE = st.sampled_from(["user", "assistant", "system", "tool", "x"])
CHAT = st.fixed_dictionaries(
    {
        "messages": st.lists(
            st.fixed_dictionaries({"role": ROLE, "content": st.text(max_size=30)}, optional={"train": JSON}), max_size=5
        )
    }
)


@given(
    st.lists(JSON | CHAT | st.just(fill(FORMATS["alpaca"], 1)), min_size=1, max_size=3),
    st.sampled_from(["all", "last", "flagged", "text"]),
    st.sampled_from([None, "chatml", "vicuna", "llama2-chat", "none"]),
    st.integers(2, 60),
)
@settings(max_examples=250, deadline=None)
def test_any_json_is_an_error_or_examples_with_labels(
    tokenizer: Tokenizer, tmp_path_factory, items: list, train_on: str, template: str | None, limit: int
) -> None:
    path = write(tmp_path_factory.getbasetemp() / "fuzz.jsonl", items)
    try:
        found = load(path, tokenizer, template=template, train_on=train_on, max_seq_len=limit, num_workers=0)
    except ValueError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return
    r = found.report
    assert r.read == len(items) == r.examples + r.dropped + r.unlabelled
    assert all(found[i].learnt().any() and len(found[i].ids) <= limit for i in range(len(found)))


def test_damaged_bytes_are_errors_or_examples(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rng, whole = (
        random.Random(0),
        write(tmp_path / "d.jsonl", [fill(item, 3) for item in FORMATS.values() if "input" not in item]).read_bytes(),
    )
    for _ in range(300):
        raw = bytearray(whole)
        for _ in range(rng.randrange(1, 5)):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
        (tmp_path / "d.jsonl").write_bytes(raw[: rng.randrange(len(raw))] if rng.random() < 0.3 else raw)
        try:
            load(tmp_path / "d.jsonl", tokenizer, num_workers=0)
        except ValueError as error:
            assert "d.jsonl" in str(error) and "\n" not in str(error)


# --- whole texts, GSM8K -----------------------------------------------------------------------------------------------


def test_gsm8k_as_the_anyscale_template_has_it(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "raw").mkdir()
    rows = [{"question": "Fünf <b>?", "answer": "2+3 = <<2+3=5>>5\n#### 5"}, {"question": "Q", "answer": "A <START_Q>"}]
    for split in ("train", "test"):
        write(tmp_path / "raw" / f"{split}.jsonl", rows)
    main(src=str(tmp_path / "raw"), dst=str(tmp_path / "out"))
    lines = (tmp_path / "out" / "train.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"input": "<START_Q>Fünf <b>?<END_Q><START_A>2+3 = <<2+3=5>>5\n#### 5<END_A>"},
        {"input": "<START_Q>Q<END_Q><START_A>A <START_Q><END_A>"},
    ]
    assert json.loads((tmp_path / "out" / "tokens.json").read_text()) == {
        "tokens": ["<START_Q>", "<END_Q>", "<START_A>", "<END_A>"]
    }
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["test.jsonl", "tokens.json", "train.jsonl"]
    found = load(tmp_path / "out" / "train.jsonl", tokenizer, template=None)
    special = tokenizer.special_tokens
    assert found[1].ids.tolist() == [
        *[1, special["<START_Q>"], *tokenizer.encode("Q"), special["<END_Q>"], special["<START_A>"]],
        *[*tokenizer.encode("A "), special["<START_Q>"], special["<END_A>"], 2],
    ]
    assert found[1].prompt_len <= 1 and found[1].learnt()[1:].all()  # loss on question, answer and EOS
    padded = load(tmp_path / "out" / "train.jsonl", tokenizer, template=None, train_on="pads", max_seq_len=100)
    assert {len(padded[i].ids) for i in range(2)} == {100} and padded.report.supervised_tokens == 2 * 99
    with pytest.raises(ValueError, match="is already there"):
        main(src=str(tmp_path / "raw"), dst=str(tmp_path / "out"))
    with pytest.raises(ValueError, match="no train.jsonl there"):
        main(src=str(tmp_path), dst=str(tmp_path / "other"))


def test_tokens_that_the_tokenizer_lacks(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "d.jsonl", [{"input": "<NEW>a"}])
    (tmp_path / "tokens.json").write_text('{"tokens": ["<NEW>"]}')
    with pytest.raises(ValueError, match=r"d.jsonl:1: .*no special token <NEW>: .*merge_tokenizer.py --special_tokens"):
        load(path, tokenizer, template=None)
    (tmp_path / "tokens.json").write_text('["<NEW>"]')
    with pytest.raises(ValueError, match="tokens.json: expected"):
        load(path, tokenizer, template=None)


def test_real_gsm8k(tmp_path: Path) -> None:
    source = assets("gsm8k", "gsm8k_train.jsonl").parent
    main(src=str(source), dst=str(tmp_path / "o"))
    counts = {name: len((tmp_path / "o" / f"{name}.jsonl").read_text().splitlines()) for name in ("train", "test")}
    assert counts == {"train": 7473, "test": 1319}


# --- preview ----------------------------------------------------------------------------------------------------------


def test_preview_shows_what_is_learnt(tmp_path: Path, tokenizer: Tokenizer) -> None:
    evil = {"instruction": "grass \x1b[2J\u202e", "output": "is green"}
    path = write(tmp_path / "d.jsonl", [evil, fill(FORMATS["messages"], 1)])
    found = load(path, tokenizer)
    shown = preview(found, tokenizer, 5, colour=False)
    assert re.findall("»(.*?)«", shown) == [" is green</s>", " A 1</s>"] and shown.count("--- example") == 2
    coloured = preview(found, tokenizer, 1)
    assert "\x1b[32m is green</s>\x1b[0m" in coloured and coloured.count("\x1b") == 2 and "\u202e" not in coloured
    packed = load(path, tokenizer, packing="best_fit")
    assert preview(packed, tokenizer, 1, colour=False).count("»") == 2 and "example 1.2" in preview(
        packed, tokenizer, 1
    )
