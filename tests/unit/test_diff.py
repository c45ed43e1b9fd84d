"""Differences: bit-exact there and back for any numbers, a wrong raw model and a damaged difference named, any format."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from accessory.checkpoint.difference import CORRECTIONS, RECORD
from accessory.checkpoint.formats import open_checkpoint
from accessory.checkpoint.formats_write import write_hf, write_meta
from accessory.model import Transformer
from accessory.model.args import ModelArgs
from accessory.weights import TensorSource, diff
from accessory.weights.diff import INDEX, VALUE, Difference, Sum, bits, content_sha256, recovered
from tests.helpers import ROOT, assets, random_weights, tiny_args
from tools.weight_diff import make, recovering

ARGS = tiny_args(tie_word_embeddings=False)
WQ, NORM, EMBEDDING, OUTPUT = "layers.1.attention.wq.weight", "norm.weight", "tok_embeddings.weight", "output.weight"
WHOLE = {2: torch.int16, 4: torch.int32}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def any_bits(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Every kind of number: tiny, huge, infinite, NaN with any payload, both zeros."""
    whole, generator = WHOLE[dtype.itemsize], torch.Generator().manual_seed(seed)
    limits = torch.iinfo(whole)
    return torch.randint(limits.min, limits.max, shape, generator=generator, dtype=whole).view(dtype)


def corrections_of(difference: Difference) -> TensorSource:
    found = {n: difference.corrections(n) for n in difference.names()}
    return TensorSource(
        {n + key: t for n, pair in found.items() for key, t in zip((INDEX, VALUE), pair) if len(pair[0])}
    )


def identical(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return found.dtype == expected.dtype and torch.equal(bits(found), bits(expected))


@pytest.mark.parametrize("stored", [None, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("raw_dtype", DTYPES)
@pytest.mark.parametrize("tuned_dtype", DTYPES)
def test_any_numbers_come_back_bit_for_bit(tuned_dtype, raw_dtype, stored, monkeypatch) -> None:
    monkeypatch.setattr(diff, "BLOCK", 170)  # several pieces, the last one short
    shape = (37, 40)
    tuned, raw = any_bits(tuned_dtype, shape, 1), any_bits(raw_dtype, shape, 2)
    tuned[:12] = (raw[:12].float() * 1.01).to(tuned_dtype)  # also what fine-tuning does
    tuned[12, :4] = torch.tensor([0.0, -0.0, 1.0, -1.0])
    raw[12, :4] = torch.tensor([-0.0, 0.0, 1.0, 1e-8])
    difference = Difference(TensorSource({WQ: tuned}), TensorSource({WQ: raw}), stored)
    stored_as = TensorSource({WQ: difference.read(WQ)})
    total = Sum(TensorSource({WQ: raw}), stored_as, {WQ: tuned_dtype}, corrections_of(difference))
    assert identical(total.read(WQ), tuned)
    for dim, size in enumerate(shape):
        for start, stop in ((0, size), (3, 21), (size - 1, size), (5, 5)):
            assert identical(total.read(WQ, dim, start, stop), tuned.narrow(dim, start, stop - start).contiguous())


def test_the_numbers_are_the_difference_and_a_fine_tuned_model_needs_few_corrections() -> None:
    generator = torch.Generator().manual_seed(0)
    raw = (torch.randn(400, 500, generator=generator) * 0.02).bfloat16()
    tuned = (raw.float() + torch.randn(400, 500, generator=generator) * 2e-4).bfloat16()
    difference = Difference(TensorSource({WQ: tuned}), TensorSource({WQ: raw}))
    expected = (tuned.double() - raw.double()).bfloat16()
    assert identical(difference.read(WQ), expected) and difference.dtype(WQ) == torch.bfloat16
    index, value = difference.corrections(WQ)
    wrong = (raw.float() + expected.float()).bfloat16() != tuned
    assert torch.equal(index.long(), wrong.flatten().nonzero()[:, 0]) and torch.equal(value, tuned[wrong])
    assert 0 < len(index) < 0.01 * tuned.numel()
    in_fp32 = Difference(TensorSource({WQ: tuned}), TensorSource({WQ: raw}), torch.float32)
    assert len(in_fp32.corrections(WQ)[0]) == 0


def test_shapes_that_do_not_belong_together() -> None:
    ones = torch.ones
    with pytest.raises(ValueError, match="norm.weight is 4 in the base and 5"):
        Difference(TensorSource({NORM: ones(5)}), TensorSource({NORM: ones(4)}))
    with pytest.raises(ValueError, match="tok_embeddings.weight is 5x2 in the base and 4x2"):
        Difference(TensorSource({EMBEDDING: ones(4, 2)}), TensorSource({EMBEDDING: ones(5, 2)}))
    with pytest.raises(ValueError, match="norm.weight is in raw but not in tuned"):
        Difference(TensorSource({WQ: ones(4)}), TensorSource({NORM: ones(4)}))
    for base in (NORM, EMBEDDING):
        with pytest.raises(ValueError, match="output.weight is added to, but is in nothing before it"):
            Sum(TensorSource({base: ones(4)}), TensorSource({OUTPUT: ones(4)}))
    outside = TensorSource({NORM + INDEX: torch.tensor([4]), NORM + VALUE: torch.ones(1)})
    with pytest.raises(ValueError, match="norm.weight: its corrections point outside"):
        Sum(TensorSource({NORM: ones(4)}), TensorSource({NORM: ones(4)}), {}, outside).read(NORM)


def test_content_hash_is_of_the_numbers_whatever_the_dtype_and_the_pieces(monkeypatch) -> None:
    tensor = torch.randn(7, 5).bfloat16()
    source, wide = TensorSource({WQ: tensor}), TensorSource({WQ: tensor.float()})
    whole = content_sha256(source, WQ)
    assert whole == content_sha256(wide, WQ) != content_sha256(source, WQ, torch.bfloat16)
    assert whole != content_sha256(TensorSource({WQ: tensor.view(5, 7)}), WQ)
    monkeypatch.setattr(diff, "BLOCK", 3)
    assert content_sha256(source, WQ) == whole


def test_what_raw_repeats_is_left_out() -> None:
    raw = TensorSource({EMBEDDING: torch.ones(3, 2), OUTPUT: torch.ones(3, 2)})
    tied = recovered(raw, TensorSource({EMBEDDING: torch.ones(3, 2)}), {EMBEDDING: torch.float32}, None)
    assert tied.names() == [EMBEDDING] and torch.equal(tied.read(EMBEDDING), torch.full((3, 2), 2.0))


# --- the tools --------------------------------------------------------------------------------------------------------


def tuned_from(raw: dict[str, torch.Tensor], args: ModelArgs = ARGS, dtype=torch.bfloat16) -> dict[str, torch.Tensor]:
    """Every weight moved a little; what raw has not, random."""
    out = random_weights(args, 1, dtype)
    for name, old in raw.items():
        generator = torch.Generator().manual_seed(3)
        moved = old.float() + 1e-2 * old.float().std() * torch.randn(old.shape, generator=generator)
        out[name][: len(old)] = moved.to(dtype)
    return out


def meta(path: Path, tensors: dict, args: ModelArgs = ARGS, shards: int = 1, embedding_dim: int = 0) -> Path:
    path.mkdir()
    write_meta(path, TensorSource(tensors), args.to_dict(), shards=shards, embedding_dim=embedding_dim)
    return path


def hugging_face(path: Path, tensors: dict, args: ModelArgs = ARGS) -> Path:
    path.mkdir()
    write_hf(path, TensorSource(tensors), args, max_shard_size="20KB")
    return path


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return meta(tmp_path / "raw", random_weights(ARGS, 0, torch.bfloat16), shards=2, embedding_dim=1)


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    path = meta(tmp_path / "tuned", tuned_from(random_weights(ARGS, 0, torch.bfloat16)))
    (path / "tokenizer.json").write_text("{}")
    return path


def content(path) -> dict[str, torch.Tensor]:
    source = open_checkpoint(path).source
    return {n: source.read(n) for n in source.names()}


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert identical(found[name], expected[name]), name


@pytest.mark.parametrize("mp, dtype", [(1, None), (4, None), (2, "fp32")])
def test_there_and_back_from_any_format_of_raw(tmp_path: Path, raw: Path, tuned: Path, capsys, mp: int, dtype) -> None:
    make(raw=str(raw), tuned=str(tuned), dst=str(tmp_path / "diff"), mp=mp, dtype=dtype)
    shown = capsys.readouterr().out
    assert "layers.{0..1}.attention.wq.weight" in shown and "21 differences" in shown
    names = sorted(p.name for p in (tmp_path / "diff").glob("*.pth"))
    assert names == [f"consolidated.{i:02d}-of-{mp:02d}.model-diff.pth" for i in range(mp)]
    expected, weights = content(tuned), random_weights(ARGS, 0, torch.bfloat16)
    assert_same(content(f"{raw},{tmp_path / 'diff'}"), expected)
    others = {
        "hf": hugging_face(tmp_path / "raw_hf", weights),
        "wide": meta(tmp_path / "raw_fp32", {n: t.float() for n, t in weights.items()}, shards=4),
    }
    for kind, base in {"same": raw, **others}.items():
        recovering(raw=str(base), diff=str(tmp_path / "diff"), dst=str(tmp_path / kind), mp=2)
        assert_same(content(tmp_path / kind), expected)
        assert (tmp_path / kind / "tokenizer.json").exists() and len(list((tmp_path / kind).glob("*.pth"))) == 2
    assert "21 tensors checked" in capsys.readouterr().out


def test_as_a_program_and_to_hugging_face(tmp_path: Path, raw: Path, tuned: Path) -> None:
    (tuned / "tokenizer.json").unlink()
    make(raw=str(raw), tuned=str(tuned), dst=str(tmp_path / "diff"))
    words = ["recover", "--raw", "raw", "--diff", "diff", "--dst", "out", "--format", "hf"]
    command = [sys.executable, str(ROOT / "tools/weight_diff.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert "layers.{0..1}.attention.wq.weight -> model.layers.{0..1}.self_attn.q_proj.weight" in done.stdout
    assert_same(content(tmp_path / "out"), content(tuned))


def test_a_wrong_raw_model_is_named_by_its_first_differing_tensor(tmp_path: Path, raw: Path, tuned: Path) -> None:
    """Two numbers exchanged: the sum of all weights, the naive check, stays the same."""
    make(raw=str(raw), tuned=str(tuned), dst=str(tmp_path / "diff"))
    weights = random_weights(ARGS, 0, torch.bfloat16)
    weights[WQ][0, [0, 1]] = weights[WQ][0, [1, 0]]
    wrong = meta(tmp_path / "wrong", weights)
    with pytest.raises(ValueError, match=f"--raw .*/wrong is not the model that .*: {WQ} holds other numbers"):
        recovering(raw=str(wrong), diff=str(tmp_path / "diff"), dst=str(tmp_path / "out"))
    less = meta(
        tmp_path / "less", {n: t for n, t in weights.items() if n != OUTPUT}, tiny_args(tie_word_embeddings=True)
    )
    weights[WQ][0, [0, 1]] = weights[WQ][0, [1, 0]]
    with pytest.raises(ValueError, match="/less is not the model"):
        recovering(raw=str(less), diff=str(tmp_path / "diff"), dst=str(tmp_path / "out"))
    with pytest.raises(ValueError, match="is not the model"):
        recovering(raw=str(tuned), diff=str(tmp_path / "diff"), dst=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_damaged_difference_is_named_and_leaves_nothing(tmp_path: Path, raw: Path, tuned: Path) -> None:
    make(raw=str(raw), tuned=str(tuned), dst=str(tmp_path / "diff"))
    tensors = torch.load(tmp_path / "diff/consolidated.00-of-01.model-diff.pth")

    def refused(message: str) -> None:
        with pytest.raises(ValueError, match=message):
            recovering(raw=str(raw), diff=str(damaged), dst=str(tmp_path / "out"))
        assert not list(tmp_path.glob("out*"))

    damaged = shutil.copytree(tmp_path / "diff", tmp_path / "flipped")
    tensors[WQ][3, 3] = torch.tensor(1).bfloat16()  # one number of 21 tensors
    torch.save(tensors, damaged / "consolidated.00-of-01.model-diff.pth")
    refused(f"{WQ} is not recovered exactly: the difference is damaged")
    damaged = shutil.copytree(tmp_path / "diff", tmp_path / "unmended")
    assert (damaged / CORRECTIONS).exists()
    (damaged / CORRECTIONS).unlink()
    refused("is not recovered exactly")
    damaged = shutil.copytree(tmp_path / "diff", tmp_path / "cut")
    file = damaged / "consolidated.00-of-01.model-diff.pth"
    file.write_bytes(file.read_bytes()[:-100])
    refused("cut/consolidated.00-of-01.model-diff.pth: is truncated or damaged")
    damaged = shutil.copytree(tmp_path / "diff", tmp_path / "unrecorded")
    record = json.loads((damaged / RECORD).read_text())
    (damaged / RECORD).write_text(json.dumps(record | {"tuned": {WQ: "float32"}}))
    refused("weight_diff.json: is damaged")
    (damaged / RECORD).write_text(json.dumps(record | {"format_version": 7}))
    refused("format_version 7, this version reads 1")
    (damaged / RECORD).unlink()
    refused("weight_diff.json: is missing: without it nothing can be checked")
    damaged = raw
    refused("raw holds meta_ori weights, not differences")


def test_new_rows_new_tensors_and_another_dtype(tmp_path: Path) -> None:
    """raw in fp16, tied; tuned in bf16 with six more tokens, an output of its own and biases: all come back."""
    before = tiny_args(tie_word_embeddings=True)
    after = tiny_args(vocab_size=107, tie_word_embeddings=False, attention_bias=True, mlp_bias=True)
    weights = random_weights(before, 0, torch.float16)
    expected = tuned_from(weights, after)
    base, model = meta(tmp_path / "a", weights, before), meta(tmp_path / "b", expected, after)
    make(raw=str(base), tuned=str(model), dst=str(tmp_path / "diff"), mp=2)
    for source in (str(base), str(hugging_face(tmp_path / "a_hf", weights, before))):
        dst = tmp_path / f"out{len(source)}"
        recovering(raw=source, diff=str(tmp_path / "diff"), dst=str(dst))
        assert_same(content(dst), expected)
        assert open_checkpoint(dst).params["vocab_size"] == 107
    listed = open_checkpoint([base, tmp_path / "diff"])
    assert_same({n: listed.source.read(n) for n in listed.source.names()}, expected)
    for dim, start, stop in ((0, 95, 107), (0, 101, 105), (1, 7, 30)):
        part = listed.source.read(EMBEDDING, dim, start, stop)
        assert identical(part, expected[EMBEDDING].narrow(dim, start, stop - start).contiguous())
    assert Transformer.from_pretrained([base, tmp_path / "diff"]).args.vocab_size == 107
    with pytest.raises(ValueError, match="tok_embeddings.weight is 107x48 in the base and 101x48"):
        make(raw=str(model), tuned=str(meta(tmp_path / "c", random_weights(after | small()), after | small())), dst="x")


class small(dict):
    """`args | small()`: the same args with 101 rows."""

    def __ror__(self, args: ModelArgs) -> ModelArgs:
        return ModelArgs.from_dict(args.to_dict() | {"vocab_size": 101})


def test_models_that_are_strangers_or_unmerged_are_refused(tmp_path: Path, raw: Path) -> None:
    strangers = [meta(tmp_path / f"s{i}", random_weights(ARGS, i)) for i in (7, 8)]
    with pytest.raises(ValueError, match=r"s8 is too far from --raw .*s7 \(\d+ of \d+ numbers"):
        far = random_weights(ARGS, 8)
        meta(tmp_path / "tiny", {n: t * 1e-6 for n, t in far.items()})
        (strangers[1] / "consolidated.00.pth").write_bytes((tmp_path / "tiny/consolidated.00.pth").read_bytes())
        make(raw=str(strangers[0]), tuned=str(strangers[1]), dst=str(tmp_path / "out"))
    lora = random_weights(ARGS) | {"layers.0.attention.wq.lora_a.weight": torch.ones(2, 48)}
    (tmp_path / "lora").mkdir()
    torch.save(lora, tmp_path / "lora/consolidated.00.pth")
    with pytest.raises(ValueError, match="lora has LoRA in it: merge it first"):
        make(raw=str(raw), tuned=str(tmp_path / "lora"), dst=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_published_model_in_its_formats(tmp_path: Path) -> None:
    """Made against Meta's files, recovered from Hugging Face's and from two shards split on columns."""
    stories = assets("stories260K")
    weights = content(stories / "meta")
    args = ModelArgs.from_dict(open_checkpoint(stories / "meta").params | {"vocab_size": 512})
    model = meta(tmp_path / "tuned", tuned_from(weights, args, torch.float32), args)
    make(raw=str(stories / "meta"), tuned=str(model), dst=str(tmp_path / "diff"))
    for kind in ("hf", "meta-mp2-llama2style"):
        recovering(raw=str(stories / kind), diff=str(tmp_path / "diff"), dst=str(tmp_path / kind))
        assert_same(content(tmp_path / kind), content(model))
