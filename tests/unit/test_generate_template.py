"""A checkpoint is asked in the words it was trained with: template.json from the run through the tools to main_generate.

    data --template--> run --> template.json --merge_lora, meta_to_hf--> template.json --> the ids that generation starts from

Both programs run as they are, in a worker; the ids are caught on their way into the engine.
"""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest

from accessory.checkpoint import resume
from accessory.data import carried
from accessory.data.sft import DataArgs, load_sft
from accessory.data.templates import open_template, question_ids
from accessory.tokenizer import Tokenizer
from tests.helpers import run_ranks, tiny_args, tiny_tokenizer, write_tiny_checkpoint
from tools import merge_lora, meta_to_hf

QUESTION = "What colour is snow?"
JINJA = """{{ strftime_now('%d %b %Y') }}{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant: {% endif %}"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint with ChatML's tokens."""
    plain, directory = tmp_path_factory.mktemp("plain"), tmp_path_factory.mktemp("base")
    (plain / "tokenizer.model").write_bytes(tiny_tokenizer())
    write_tiny_checkpoint(directory, tiny_args(vocab_size=322))
    Tokenizer.open(plain).with_special_tokens(["<|im_start|>", "<|im_end|>"]).save(directory)
    return directory


def data(directory: Path, **counts: int) -> Path:
    """One file for each template, with so many records; data.yaml names them."""
    directory.mkdir()
    entries = []
    for name, n in counts.items():
        rows = [{"instruction": f"Colour {i}?", "output": "white"} for i in range(n)]
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        entries.append(f"- {{path: {name}.jsonl, template: {name.replace('_', '-')}}}\n")
    (directory / "data.yaml").write_text("META:\n" + "".join(entries))
    return directory / "data.yaml"


def programs(calls: list[tuple[str, dict[str, Any]]]) -> list[tuple[list, str, str]]:
    """Of each (program, flags): the prompts' ids that the engine got, stdout, stderr (of an error its text)."""
    from accessory import config, main_finetune, main_generate
    from accessory.data.sft import DataArgs
    from accessory.flags import LoopArgs, OptimArgs, ParallelArgs, RunArgs, TuningArgs
    from accessory.generation import engine

    finetune = RunArgs, ParallelArgs, TuningArgs, DataArgs, OptimArgs, LoopArgs
    known = {"finetune": (main_finetune.main, finetune)}
    known |= {"generate": (main_generate.entry, (main_generate.GenerateArgs,))}
    results = []
    for name, flags in calls:
        main, sections = known[name]
        caught, real, out, err = [], engine.generate, io.StringIO(), io.StringIO()

        def generate(model, prompts, *rest, real=real, caught=caught, **keys):
            caught += prompts
            return real(model, prompts, *rest, **keys)

        engine.generate = generate
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                main(*config.parse([word for k, v in flags.items() for word in (f"--{k}", str(v))], *sections))
        except ValueError as error:
            err.write(str(error))
        finally:
            engine.generate = real
        results.append((caught, out.getvalue(), err.getvalue()))
    return results


FLAGS = {"max_steps": 1, "batch_size": 4, "report_to": "none", "precision": "fp32", "max_seq_len": 300}


def training(base: Path, data: Path, out: Path, **flags: Any) -> tuple[str, dict[str, Any]]:
    given = {"pretrained_path": base, "data_config": data, "output_dir": out, "sample_prompts": QUESTION}
    return "finetune", FLAGS | given | {"val_ratio": 0.1} | flags


def asking(path: Path, **flags: Any) -> tuple[str, dict[str, Any]]:
    return "generate", {"pretrained_path": path, "prompt": QUESTION, "max_new_tokens": 2} | flags


def told(err: str) -> list[str]:
    """The lines about the template, without the progress bars."""
    return [line for line in err.replace("\r", "\n").split("\n") if line.startswith("template: ")]


def test_a_model_is_asked_as_it_was_trained(tmp_path: Path, base: Path) -> None:
    run, mixture = tmp_path / "run", data(tmp_path / "data", chatml=12, alpaca=5)
    calls = [training(base, mixture, run), asking(run / "latest"), asking(run / "latest", template="vicuna")]
    calls += [asking(run / "latest", raw="true"), asking(base)]
    trained, asked, chosen, raw, untold = run_ranks(programs, calls, world=1)[0]
    tokenizer = Tokenizer.open(base)
    ids = {name: question_ids(tokenizer, QUESTION, name) for name in ("chatml", "vicuna", "alpaca")}
    assert asked[0] == [ids["chatml"]] and set(map(tuple, trained[0])) == {tuple(ids["chatml"])}  # its samples too
    assert tokenizer.special_tokens["<|im_start|>"] in ids["chatml"]
    assert chosen[0] == [ids["vicuna"]] and untold[0] == [ids["alpaca"]]
    assert raw[0] == [tokenizer.encode(QUESTION, bos=tokenizer.add_bos)]
    said = "template: chatml, of 11 of 15 sequences (beside it alpaca 4); checkpoints carry it in template.json"
    assert said in trained[1].splitlines()
    assert told(asked[2]) == [f"template: chatml ({run / 'latest' / 'template.json'})"] and told(raw[2]) == []
    assert told(chosen[2]) == ["template: vicuna (--template)"]
    assert told(untold[2]) == [f"template: alpaca (by default, {base} carries none)"]
    assert all("template" not in out for _, out, _ in (asked, chosen, raw, untold))  # stdout has the answers alone

    assert json.loads((run / "latest" / "template.json").read_text()) == {
        "template": "chatml",
        "sequences": {"chatml": 11, "alpaca": 4},
    }
    manifest = json.loads((run / "latest" / resume.MANIFEST).read_text())
    assert "template.json" in manifest["files"]  # hashed as the rest
    meta_to_hf.main(src=str(run / "latest"), dst=str(tmp_path / "hf"))
    assert carried.read(tmp_path / "hf" / "template.json")["template"] == "chatml"


def test_a_jinja_templates_text_and_date_outlive_the_file_and_the_adapter(tmp_path: Path, base: Path) -> None:
    own, plain, run = tmp_path / "own.jinja", data(tmp_path / "data", alpaca=9), tmp_path / "run"
    own.write_text(JINJA)
    (tmp_path / "data" / "data.yaml").write_text("META:\n- {path: alpaca.jsonl}\n")
    flags = {"template": own, "template_date": "2025-01-31", "lora_rank": 2, "lr": 1e-2, "keep_best": "false"}
    [[trained]] = run_ranks(programs, [training(base, plain, run, **flags)], world=1)
    tokenizer = Tokenizer.open(base)
    expected = question_ids(tokenizer, QUESTION, str(own), "2025-01-31")
    assert trained[0] and all(ids == expected for ids in trained[0])
    assert expected != question_ids(tokenizer, QUESTION, str(own))  # another date
    own.unlink()
    for format in ("meta", "hf"):
        merge_lora.main(adapters=[str(run / "latest")], dst=str(tmp_path / format), format=format)
        assert (tmp_path / format / "chat_template.jinja").read_text() == JINJA  # for transformers
    results = run_ranks(programs, [asking(p) for p in (run / "latest", tmp_path / "meta", tmp_path / "hf")], world=1)[0]
    assert [ids for ids, _, _ in results] == [[expected]] * 3
    assert all(told(err)[0].startswith(f"template: {own} (") for _, _, err in results)


@pytest.mark.parametrize(
    "text, said",
    [
        ("{", "template.json: not {"),
        ("[]", "template.json: not {"),
        ('{"template": 3}', "template.json: not {"),
        ('{"template": "chatlm"}', "template 'chatlm' is not known here: choose one with --template"),
        ('{"template": "x", "chat_template": "{% for"}', "--template x"),
        ("[" * 100_000, "template.json: not {"),
    ],
)
def test_a_damaged_record_is_one_line(tmp_path: Path, base: Path, text: str, said: str) -> None:
    (tmp_path / carried.FILE).write_text(text)
    with pytest.raises(ValueError) as error:
        carried.asked_with(Tokenizer.open(base), None, "", carried.read(tmp_path / carried.FILE))
    assert said in str(error.value) and "\n" not in str(error.value)


def test_the_last_part_of_a_list_tells(tmp_path: Path) -> None:
    parts = [tmp_path / name for name in "abc"]
    for part in parts:
        part.mkdir()
    assert carried.find(parts) is None
    (parts[0] / carried.FILE).write_text('{"template": "llama3"}')
    (parts[1] / carried.FILE).write_text('{"template": "chatml"}')
    assert carried.find(parts) == parts[1] / carried.FILE and carried.find(parts[:1]) == parts[0] / carried.FILE
    assert carried.find([*parts[:2], tmp_path / "nowhere" / "model.gguf"]) == parts[1] / carried.FILE


def test_most_sequences_count_with_their_weights(tmp_path: Path, base: Path) -> None:
    tokenizer, config = Tokenizer.open(base), data(tmp_path / "data", chatml=4, llama2_chat=3)
    assert load_sft(DataArgs(data_config=str(config)), tokenizer, 0)[0].template["template"] == "chatml"
    config.write_text(config.read_text().replace("template: llama2-chat", "template: llama2-chat, weight: 2"))
    record = load_sft(DataArgs(data_config=str(config), packing="best_fit"), tokenizer, 0)[0].template
    assert record == {"template": "llama2-chat", "sequences": {"chatml": 4, "llama2-chat": 6}}
    assert carried.asked_with(tokenizer, None, "", record).name == "llama2-chat"
    assert carried.asked_with(tokenizer, "vicuna", "", record).name == "vicuna"
    alike = [open_template(name, tokenizer) for name in ("vicuna", "chatml", "vicuna")]
    assert carried.most_used(alike)["sequences"] == {"vicuna": 2, "chatml": 1}
