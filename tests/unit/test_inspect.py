"""inspect_checkpoint: what each kind of directory is, every damaged file by name, and two checkpoints side by side."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from accessory.checkpoint import resume
from accessory.checkpoint.adapter import base_record, write_adapter
from accessory.checkpoint.describe import describe, lines
from accessory.checkpoint.formats import open_checkpoint
from accessory.checkpoint.formats_read import file_sha256
from accessory.checkpoint.formats_write import write_hf, write_meta
from accessory.model.args import ModelArgs
from accessory.train.state import TrainState
from accessory.weights import TensorSource
from accessory.weights.compare import compare, differences, folded, verdict
from tests.helpers import ROOT, assets, random_weights, tiny_args, tiny_tokenizer
from tools import inspect_checkpoint
from tools.inspect_checkpoint import main

ARGS = tiny_args(vocab_size=320, tie_word_embeddings=False)
WQ, W2, NORM = "layers.1.attention.wq.weight", "layers.0.feed_forward.w2.weight", "norm.weight"
# per layer: wq and wo 48x48, wk and wv 16x48, w1 w2 w3 48x72, two norms; embedding and output 320x48; norm
PARAMETERS = 2 * (2 * 48 * 48 + 2 * 16 * 48 + 3 * 48 * 72 + 2 * 48) + 2 * 320 * 48 + 48


def weights(seed: int = 0, args: ModelArgs = ARGS) -> dict[str, torch.Tensor]:
    return random_weights(args, seed, torch.bfloat16)


def meta(path: Path, tensors: dict | None = None, shards: int = 1, args: ModelArgs = ARGS, **keys) -> Path:
    path.mkdir(parents=True)
    write_meta(path, TensorSource(tensors or weights(0, args)), args.to_dict(), shards=shards, **keys)
    (path / "tokenizer.model").write_bytes(tiny_tokenizer())
    return path


def shown(capsys, **flags) -> str:
    main(**flags)
    return capsys.readouterr().out


def test_metas_files_in_full(tmp_path: Path, capsys) -> None:
    path = meta(tmp_path / "m", shards=2, embedding_dim=1)
    report = json.loads(shown(capsys, path=str(path), json=True))
    assert (report["format"], report["mp"], report["embedding_dim"]) == ("meta_ori", 2, 1)
    assert report["parameters"] == PARAMETERS and report["dtypes"] == {"bf16": PARAMETERS}
    assert report["files"] == {str(f): f.stat().st_size for f in sorted(path.glob("*.pth"))}
    assert report["tokenizer"] == {
        "path": str(path / "tokenizer.model"), "kind": "sentencepiece", "vocab_size": 320, "fits": "fits",
    }  # fmt: skip
    sizes = {
        "dim": 48,
        "n_layers": 2,
        "n_heads": 12,
        "n_kv_heads": 4,
        "head_dim": 4,
        "hidden_dim": 72,
        "vocab_size": 320,
    }
    assert sizes.items() <= report["model"].items() and report["keys"] == {} and report["problems"] == []
    text = shown(capsys, path=str(path))
    for part in (
        "meta_ori, 2 model-parallel file(s)",
        "split over its columns",
        f"{PARAMETERS:,} in 21 tensors",
        "dim 48, 2 layers, 12 heads of 4, 4 kv heads, feed-forward 72, vocabulary 320",
        "output apart from the embedding",
        "rope theta 10000, scaling none",
        "sentencepiece, 320 tokens, fits",
    ):
        assert part in text, part


def test_keys_and_tokenizers_that_do_not_fit_are_said(tmp_path: Path, capsys) -> None:
    args = tiny_args(vocab_size=300, tie_word_embeddings=True)
    path = meta(tmp_path / "m", args=args)
    params = json.loads((path / "params.json").read_text())
    (path / "params.json").write_text(json.dumps(params | {"n_layers": 3}))
    text = shown(capsys, path=str(path))
    assert "320 tokens, 20 MORE than the embedding has rows" in text
    assert "missing     9: layers.2.attention.wq.weight, " in text and "tied to the embedding" in text


def test_hugging_face_and_lists(tmp_path: Path, capsys) -> None:
    (tmp_path / "hf").mkdir()
    write_hf(tmp_path / "hf", TensorSource(weights()), ARGS, max_shard_size="40KB")
    report, _ = describe(str(tmp_path / "hf"))
    assert report["format"] == "hf" and len(report["files"]) > 1 and "mp" not in report and report["tokenizer"] is None
    (tmp_path / "over").mkdir()
    torch.save({NORM: weights(1)[NORM]}, tmp_path / "over/consolidated.00-of-01.model.pth")
    text = shown(capsys, path=f"{tmp_path / 'hf'},{tmp_path / 'over'}")
    assert f"part        {tmp_path / 'hf'}\npart        {tmp_path / 'over'}" in text


# --- adapters ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    path, base = tmp_path / "adapter", meta(tmp_path / "base")
    path.mkdir()
    stem, targets = "layers.{}.attention.wq.lora_{}.weight", ["wq"]
    tensors = {stem.format(i, "a"): torch.ones(2, 48) for i in (0, 1)} | {
        stem.format(i, "b"): torch.ones(48, 2) for i in (0, 1)
    }
    terms = {"lora_rank": 2, "lora_alpha": 4.0, "lora_dropout": 0.1, "lora_targets": targets, "modules_to_save": []}
    terms |= {"bias_tuning": False, "norm_tuning": False, "base": base_record(open_checkpoint(base))}
    write_adapter(path, tensors, terms)
    return path


def test_an_adapter_and_where_its_base_is(tmp_path: Path, adapter: Path, capsys) -> None:
    report, checkpoint = describe(str(adapter))
    assert report["adapter"]["lora_rank"] == 2 and "base" not in report["adapter"]
    assert report["adapter_parameters"] == 2 * (2 * 48 + 48 * 2) and report["parameters"] == PARAMETERS + 384
    assert report["base"]["there"] and report["base"]["state"] == "is there, its files have the same sizes"
    assert report["parts"] == [str(tmp_path / "base"), str(adapter)]
    text = shown(capsys, path=str(adapter))
    assert all(f"{term}" in text for term in ("lora_rank 2", "lora_alpha 4.0", "lora_dropout 0.1", "lora_targets wq"))
    assert "layers.{0..1}.attention.wq.lora_a.weight   2 x 2x48 fp32" in text
    with open(tmp_path / "base/consolidated.00.pth", "ab") as file:
        file.write(b"\0")
    text = shown(capsys, path=str(adapter))
    assert "consolidated.00.pth: has " in text and "so it is not the base of" in text and "lora_rank 2" in text
    (tmp_path / "base").rename(tmp_path / "moved")
    text = shown(capsys, path=str(adapter))
    assert f"its base {tmp_path / 'base'} is not there: say where it is with --base" in text
    meta(tmp_path / "copy")
    assert f"{PARAMETERS + 384:,} in 25 tensors" in shown(capsys, path=str(adapter), base=str(tmp_path / "copy"))


def test_pefts_directory(tmp_path: Path, capsys) -> None:
    (tmp_path / "peft").mkdir()
    base, stem = meta(tmp_path / "base"), "base_model.model.model.layers.0.self_attn.v_proj.lora_{}.weight"
    save_file(
        {stem.format("A"): torch.ones(3, 48), stem.format("B"): torch.ones(16, 3)},
        tmp_path / "peft/adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["v_proj"], "bias": "none"}
    config |= {"base_model_name_or_path": str(base), "task_type": "CAUSAL_LM", "layers_to_transform": [0]}
    (tmp_path / "peft/adapter_config.json").write_text(json.dumps(config))
    report, checkpoint = describe(str(tmp_path / "peft"))
    assert (
        checkpoint is not None
        and report["adapter"]["lora_rank"] == 3
        and report["adapter_parameters"] == 3 * 48 + 16 * 3
    )
    text = "\n".join(lines(report))
    assert "layers.0.attention.wv.lora_a.weight" in text and f"base        {base} is there" in text


# --- a run's checkpoints ----------------------------------------------------------------------------------------------


def checkpoint_of_a_run(run: Path, step: int, seed: int = 0, best_step: int | None = None, **more) -> Path:
    """step_N with weights, state and manifest, as checkpoint/save.py leaves it; `latest` points to it."""
    path = meta(run / f"step_{step:08d}", weights(seed), shards=2, style="consolidated")
    (path / "resume").mkdir()
    state = {"step": step, "epoch": 1, "tokens": 4096, "best_step": best_step, "format_version": resume.FORMAT_VERSION}
    (path / "resume" / resume.STATE).write_text(json.dumps(state | more))
    pieces = {f"{NORM}{key}": torch.rand(48) for key in ("", "/exp_avg", "/exp_avg_sq")} | {WQ: torch.rand(48, 48)}
    save_file(pieces, path / "resume/state-00000-of-00001.safetensors")
    files = [f for f in sorted(path.rglob("*")) if f.is_file()]
    entries = {str(f.relative_to(path)): {"size": f.stat().st_size, "sha256": file_sha256(f)} for f in files}
    manifest = {"format_version": resume.FORMAT_VERSION, "step": step, "mp": 2, "dp": 1, "files": entries}
    manifest |= {"metrics": {"val_loss": 1.25}}
    (path / resume.MANIFEST).write_text(json.dumps(manifest | {"sha256": resume.digest(manifest)}))
    (run / "latest").unlink(missing_ok=True)
    (run / "latest").symlink_to(path.name)
    return path


def test_a_run_lists_its_checkpoints_and_shows_the_latest(tmp_path: Path, capsys) -> None:
    first, last = (checkpoint_of_a_run(tmp_path / "run", step, step, best_step=10) for step in (10, 20))
    text = shown(capsys, path=str(tmp_path / "run"))
    assert "step_00000010  whole  (best)\n" in text and "step_00000020  whole  (latest)\n" in text
    assert f"path        {last}" in text and "step 20 by mp 2 x dp 1; 6 files hashed" in text
    assert "epoch 1, tokens 4096, best_step 10" in text and "val_loss 1.25" in text
    assert "2 tensors: " in text and "norm.weight" in text and "layers.*.attention.wq.weight" in text
    report = json.loads(shown(capsys, path=str(tmp_path / "run"), json=True))
    assert sorted(report["saved"]["trained"]) == [WQ, NORM]
    (first / "params.json").unlink()
    with pytest.raises(ValueError, match="step_00000010/params.json is missing"):
        main(path=str(tmp_path / "run"))
    text = capsys.readouterr().out
    assert f"step_00000010  {first / 'params.json'} is missing  (best)" in text and "step_00000020  whole" in text


def test_every_one_of_the_best_is_marked(tmp_path: Path, capsys) -> None:
    """As --keep_best_n 3 leaves them; the ranks are those that training writes down."""
    state = TrainState(metric="val_loss")
    for state.step, loss in ((10, 3.0), (20, 1.5), (30, 2.0), (40, 1.0), (50, 2.0)):
        state.note({"val_loss": loss}, keep=3)
        saved = {k: v for k, v in state.to_json().items() if k in ("ranked", "best_step")}
        checkpoint_of_a_run(tmp_path / "run", state.step, **saved)
    resume.retire(tmp_path / "run", 1, state.best_steps)
    text = shown(capsys, path=str(tmp_path / "run"))
    assert [line.strip() for line in text.splitlines() if "  whole" in line] == [
        "step_00000020  whole  (best 2)",
        "step_00000030  whole  (best 3)",
        "step_00000040  whole  (best)",
        "step_00000050  whole  (latest)",
    ]
    report = json.loads(shown(capsys, path=str(tmp_path / "run"), json=True))
    assert [(c["step"], c["best"]) for c in report["checkpoints"]] == [(20, 2), (30, 3), (40, 1), (50, None)]
    state.step = 60
    state.note({"val_loss": 0.5}, keep=3)
    checkpoint_of_a_run(tmp_path / "run", 60, ranked=state.ranked, best_step=state.best_step)
    text = shown(capsys, path=str(tmp_path / "run"))
    assert "step_00000060  whole  (latest, best)\n" in text and "step_00000040  whole  (best 2)\n" in text
    assert "step_00000030  whole\n" in text  # no longer one of them


FILES = ["consolidated.01-of-02.model.pth", "params.json", "tokenizer.model", f"resume/{resume.STATE}"]


@pytest.mark.parametrize("name", [*FILES, "resume/state-00000-of-00001.safetensors"])
@pytest.mark.parametrize("harm", ["flip", "cut", "remove", "exchange"])
def test_every_kind_of_damage_names_its_file(tmp_path: Path, capsys, name: str, harm: str) -> None:
    path = checkpoint_of_a_run(tmp_path / "run", 10)
    file, data = path / name, (path / name).read_bytes()
    if harm == "flip":
        file.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
        message = f"{file} is damaged: its sha256 is not the one written"
    elif harm == "cut":
        file.write_bytes(data[:-1])
        message = f"{file} has {len(data) - 1} bytes, {len(data)} were written"
    elif harm == "remove":
        file.unlink()
        message = f"{file} is missing"
    else:  # of another checkpoint of the run: two mixed in one directory
        other = checkpoint_of_a_run(tmp_path / "other", 99, seed=1)
        file.write_bytes((other / name).read_bytes())
        message = f"{file} is damaged: its sha256 is not the one written"
        if (other / name).read_bytes() == data:
            return
    with pytest.raises(ValueError) as error:
        main(path=str(path))
    assert str(error.value).startswith(message)
    assert f"PROBLEM     {message}" in capsys.readouterr().out


def test_all_that_is_damaged_is_named_not_only_the_first(tmp_path: Path) -> None:
    path = checkpoint_of_a_run(tmp_path / "run", 10)
    for name in FILES:
        (path / name).unlink()
    report, checkpoint = describe(str(path))
    for name in FILES:
        assert f"{path / name} is missing" in report["problems"]
    assert checkpoint is None
    manifest = (path / resume.MANIFEST).read_text()
    (path / resume.MANIFEST).write_text(manifest.replace('"step": 10', '"step": 11'))
    assert describe(str(path))[0]["problems"][0] == f"{path / resume.MANIFEST} is damaged"


def test_mixed_and_incomplete_directories_without_a_manifest(tmp_path: Path) -> None:
    path = meta(tmp_path / "m", shards=2)
    other = meta(tmp_path / "n", weights(1), shards=2)
    shutil.copy(other / "consolidated.01.pth", path)  # equal names and shapes: only the copies of the norms tell
    with pytest.raises(ValueError, match="m/consolidated.01.pth: layers.0.attention_norm.weight differs from .*00.pth"):
        main(path=str(path))
    (path / "consolidated.00.pth").unlink()
    with pytest.raises(ValueError, match="m: consolidated.00.pth is missing"):
        main(path=str(path))
    (other / "consolidated.01.pth").write_bytes((other / "consolidated.01.pth").read_bytes()[:-50])
    with pytest.raises(ValueError, match="n/consolidated.01.pth: is truncated or damaged"):
        main(path=str(other))
    write_hf(other, TensorSource(weights()), ARGS)
    with pytest.raises(ValueError, match="n holds checkpoints of several kinds, meta_ori and hf"):
        main(path=str(other))
    with pytest.raises(ValueError, match="nowhere: no such directory"):
        main(path=str(tmp_path / "nowhere"))


def test_as_a_program(tmp_path: Path) -> None:
    path = checkpoint_of_a_run(tmp_path / "run", 10)
    (path / "params.json").write_text("{}")
    command = [sys.executable, str(ROOT / "tools/inspect_checkpoint.py"), str(path), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)})
    assert (
        done.returncode == 1 and "error: " in done.stderr.splitlines()[-1] and "params.json has 2 bytes" in done.stderr
    )
    assert json.loads(done.stdout)["problems"][0].startswith(f"{path / 'params.json'} has 2 bytes")


# --- one against another ----------------------------------------------------------------------------------------------


def against(capsys, a: Path, b: Path) -> dict:
    return json.loads(shown(capsys, path=str(a), against=str(b), json=True))


def test_the_same_model_in_two_formats_is_equal(tmp_path: Path, capsys) -> None:
    a = meta(tmp_path / "a", shards=4, embedding_dim=1)
    (tmp_path / "b").mkdir()
    write_hf(tmp_path / "b", TensorSource(weights()), ARGS)
    report = against(capsys, a, tmp_path / "b")
    assert report["verdict"] == "equal" and report["only_in_a"] == report["only_in_b"] == []
    rows = {row["tensors"]: row for row in report["tensors"]}
    assert rows["layers.*.attention.wq.weight"]["count"] == rows["layers.*.attention.wq.weight"]["equal"] == 2
    meta(tmp_path / "c", {n: t.float() for n, t in weights().items()})
    report = against(capsys, a, tmp_path / "c")
    assert report["verdict"] == "same numbers" and report["tensors"][0]["dtypes"] == ["bfloat16", "float32"]
    assert shown(capsys, path=str(a), against=str(tmp_path / "b")).endswith("\nequal\n")


def test_what_differs_is_measured_and_found(tmp_path: Path, capsys) -> None:
    changed = weights()
    changed[WQ] = changed[WQ].clone()
    changed[WQ][3, 5] += 0.5
    a, b = meta(tmp_path / "a", changed, shards=2), meta(tmp_path / "b")
    report = against(capsys, a, b)
    [row] = [row for row in report["tensors"] if row["equal"] < row["count"]]
    apart = (changed[WQ].double() - weights()[WQ].double()).abs()
    assert report["verdict"] == "different" and row["largest_in"] == WQ and (row["equal"], row["count"]) == (1, 2)
    assert row["largest"] == pytest.approx(apart.max().item())
    assert row["relative"] == pytest.approx((apart.norm() / weights()[WQ].double().norm()).item())
    text = shown(capsys, path=str(a), against=str(b)).splitlines()
    [line] = [line for line in text if line.startswith("layers.*.attention.wq.weight")]
    assert line.split()[1:5] == ["2", "1", "48x48", "bfloat16"] and line.endswith(WQ) and text[-1] == "different"


def test_names_shapes_and_special_numbers() -> None:
    odd = torch.tensor([float("nan"), float("inf"), -0.0, 1.0])
    one, other = odd.clone(), odd.clone()
    other[2] = 0.0
    compared = [
        compare(TensorSource({NORM: one}), TensorSource({NORM: x}), NORM)
        for x in (odd, other, torch.ones(4), torch.ones(5))
    ]
    assert [c.equal for c in compared] == [True, False, False, False]
    assert compared[0].largest == compared[1].largest == 0.0 and compared[1].same_numbers
    assert compared[2].largest != compared[2].largest  # NaN against 1 is not hidden
    assert compared[3].largest is None and folded([compared[3]])[0]["shapes"] == [[4], [5]]
    assert [verdict([c], []) for c in compared] == ["equal", "same numbers", "different", "different"]
    assert verdict([compared[0]], [WQ]) == "different"


def test_tied_and_untied_files_of_one_model_are_equal(tmp_path: Path, capsys) -> None:
    tied = tiny_args(vocab_size=320, tie_word_embeddings=True)
    tensors = weights(0, tied)
    a = meta(tmp_path / "a", tensors, args=tied)
    b = meta(tmp_path / "b", tensors | {"output.weight": tensors["tok_embeddings.weight"]})
    assert against(capsys, a, b)["verdict"] == "equal"
    text = shown(capsys, path=str(b), against=str(a))
    assert "b is tied: its output.weight is its embedding" in text
    grown = meta(tmp_path / "c", weights(0, tiny_args(vocab_size=325)), args=tiny_args(vocab_size=325))
    text = shown(capsys, path=str(b), against=str(grown))
    assert "320x48 | 325x48" in text and "different" in text


def test_a_published_model_in_every_format(capsys) -> None:
    stories = assets("stories260K")
    truth = open_checkpoint(stories / "meta").source
    for kind in ("hf", "meta-mp2-llama2style", "meta-mp2-llama3style", "gguf/stories260K-f32.gguf"):
        assert differences(truth, open_checkpoint(stories / kind).source)["verdict"] == "equal", kind
    quantised = differences(truth, open_checkpoint(stories / "gguf/stories260K-q8_0.gguf").source)
    assert quantised["verdict"] == "different" and 0 < max(r["relative"] for r in quantised["tensors"]) < 0.01
    assert "292,800 in 48 tensors" in shown(capsys, path=str(stories / "meta"))
    assert inspect_checkpoint.__doc__ and "--against" in inspect_checkpoint.__doc__
