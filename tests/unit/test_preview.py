"""--preview: the text that the model will see, colour on exactly what has labels, and no step of training."""

import json
import re
from pathlib import Path

import pytest

from accessory.data.loader import collate
from accessory.data.preview import LEARNT, RESET, preview
from accessory.data.sft import DataArgs, SFTDataset, load_sft
from accessory.tokenizer import Tokenizer
from tests.helpers import run_ranks, tiny_tokenizer, write_tiny_checkpoint, write_tiny_data

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Is snow white?\nAnd coal?"},
    {"role": "assistant", "content": "Snow is. Coal isn't é 雪"},
    {"role": "user", "content": "Thanks."},
    {"role": "assistant", "content": "Gern."},
]
SEEN = (  # the tiny tokenizer has no line ends: its normaliser makes spaces of them
    "<s><|im_start|>system Be brief.<|im_end|><|im_start|>user Is snow white? And coal?<|im_end|>"
    "<|im_start|>assistant» Snow is. Coal isn't é 雪<|im_end|>«<|im_start|>user Thanks.<|im_end|>"
    "<|im_start|>assistant» Gern.<|im_end|>«"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    (directory / "tokenizer.model").write_bytes(tiny_tokenizer())
    return Tokenizer.open(directory).with_special_tokens(["<|im_start|>", "<|im_end|>"])


def load(tmp_path: Path, tokenizer: Tokenizer, records: list, **flags) -> SFTDataset:
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    args = {"data_config": str(tmp_path / "d.jsonl"), "template": "chatml", "max_seq_len": 400, "num_workers": 0}
    return load_sft(DataArgs(**args | flags), tokenizer, 0)[0]


def test_the_text_is_the_dialog_with_what_is_learnt_between_marks(tmp_path: Path, tokenizer: Tokenizer) -> None:
    found = load(tmp_path, tokenizer, [{"messages": CHAT}])
    head, text = preview(found, tokenizer, 1, colour=False).split("\n", 1)
    assert text == SEEN
    labels = collate([found[0]]).labels
    assert head == f"--- example 1: {labels.numel()} tokens, {int((labels != -100).sum())} learnt"
    last = load(tmp_path, tokenizer, [{"messages": CHAT}], train_on="last")
    assert re.findall("»(.*?)«", preview(last, tokenizer, 1, colour=False)) == [" Gern.<|im_end|>"]


@pytest.mark.parametrize("train_on", ["all", "last", "text"])
@pytest.mark.parametrize("template", ["chatml", "vicuna", "alpaca"])
def test_coloured_is_what_has_labels(tmp_path: Path, tokenizer: Tokenizer, template: str, train_on: str) -> None:
    """What stands between the codes is what the labels decode to, run by run; the rest is what is left of the text."""
    records = [{"messages": CHAT[1:]}, {"instruction": "Colour?", "input": "grass", "output": "It is green."}]
    found = load(tmp_path, tokenizer, records, template=template, train_on=train_on)
    shown = re.split(r"--- example \d+: .*\n", preview(found, tokenizer, 9))[1:]
    assert len(shown) == len(found) == 2
    for i, text in enumerate(shown):
        batch = collate([found[i]])
        ids, learnt = batch.tokens[0].tolist(), (batch.labels[0] != -100).tolist()
        edges = [k for k in range(len(ids) + 1) if [False, *learnt, False][k] != [False, *learnt, False][k + 1]]
        runs = [(a, b) for a, b in zip(edges[::2], edges[1::2])]
        marked = re.findall(re.escape(LEARNT) + "(.*?)" + re.escape(RESET), text, re.S)
        assert len(marked) == len(runs) > 0
        for (a, b), words in zip(runs, marked):
            expected = tokenizer.decode_with_specials(ids[:b]).removeprefix(tokenizer.decode_with_specials(ids[:a]))
            assert words == expected
        plain = text.replace(LEARNT, "").replace(RESET, "").removesuffix("\n")
        assert plain == tokenizer.decode_with_specials(ids) and plain.count("\x1b") == 0


def test_more_than_there_is_and_packs(tmp_path: Path, tokenizer: Tokenizer) -> None:
    records = [{"instruction": f"Say {i}.", "output": f"Number {i}"} for i in range(5)]
    found = load(tmp_path, tokenizer, records, template="vicuna")
    shown = preview(found, tokenizer, 10**9, colour=False)
    assert re.findall("--- example (.*?):", shown) == ["1", "2", "3", "4", "5"]
    assert re.findall("»(.*?)«", shown) == [f" Number {i}</s>" for i in range(5)]
    packed = load(tmp_path, tokenizer, records, template="none", packing="best_fit", max_seq_len=60)
    shown = preview(packed, tokenizer, 10**9, colour=False)
    assert sorted(re.findall("»(.*?)«", shown)) == [f"Number {i}</s>" for i in range(5)]
    names = [f"{i + 1}.{k + 1}" for i in range(len(packed)) for k in range(len(packed[i]))]
    assert re.findall("--- example (.*?):", shown) == names and len(packed) < 5


def ended(base: Path, data: Path, out: Path, terminal: bool) -> tuple[object, str]:
    """main_finetune with --preview, its stdout a file or a terminal: (exit code, what was printed)."""
    import contextlib
    import io

    from accessory import config, main_finetune
    from accessory.data.sft import DataArgs
    from accessory.flags import LoopArgs, OptimArgs, ParallelArgs, RunArgs, TuningArgs

    class Printed(io.StringIO):
        def isatty(self) -> bool:
            return terminal

    sections = RunArgs, ParallelArgs, TuningArgs, DataArgs, OptimArgs, LoopArgs
    flags = {"pretrained_path": base, "data_config": data, "output_dir": out, "preview": 1000}
    printed = Printed()
    with contextlib.redirect_stdout(printed):
        try:
            main_finetune.main(*config.parse([w for k, v in flags.items() for w in (f"--{k}", str(v))], *sections))
            code = None
        except SystemExit as end:
            code = end.code
    return code, printed.getvalue()


def test_it_ends_without_a_step_and_without_codes_where_nobody_looks(tmp_path: Path) -> None:
    base, data, out = write_tiny_checkpoint(tmp_path / "base"), write_tiny_data(tmp_path / "data", 7), tmp_path / "run"
    for terminal in (False, True):
        [(code, printed)] = run_ranks(ended, base, data, out, terminal, world=1)
        assert code == 0 and not out.exists()  # not a checkpoint, not a line of metrics
        assert printed.count("--- example") == 7  # of the 7 there are
        assert ("\x1b" in printed) == terminal == (LEARNT in printed) and ("»" in printed) != terminal
