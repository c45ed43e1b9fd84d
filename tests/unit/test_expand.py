"""A model grown to a larger tokenizer: old rows to the bit, new rows by their definition, the same at any mp and format,
and transformers and Stanford Alpaca's formula as references."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accessory.checkpoint.formats import open_checkpoint
from accessory.data import vocabulary
from accessory.model import Transformer
from accessory.tokenizer import SentencePiece, Tokenizer
from accessory.weights import TensorSource
from accessory.weights import vocab as vocab_module
from accessory.weights.vocab import INITS, STD, TABLES, Expanded
from tests.helpers import random_weights, tiny_args, tiny_tokenizer, write_tiny_checkpoint
from tools import expand_vocab

OLD, ROWS, NEW = 320, 333, 367  # the tokenizer's tokens, rows (13 spare), the new tokenizer's tokens


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny tokenizer with pieces of another language and special tokens."""
    directory = tmp_path_factory.mktemp("grown")
    base = directory / "base.model"
    base.write_bytes(tiny_tokenizer())
    text = ["Le chat dort sur le tapis rouge.", "La chatte boit le lait, puis le chat dort."] * 6
    extra = SentencePiece(directory / "extra.model", vocabulary.train(text, 300))
    merged, _ = vocabulary.merged_with(Tokenizer.open(base), extra, "append")
    merged.with_special_tokens(["<START_Q>", "<END_Q>"]).save(directory / "new")
    return directory / "new"


def weights(rows: int = ROWS, tied: bool = False, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return random_weights(tiny_args(vocab_size=rows, tie_word_embeddings=tied), dtype=dtype)


# --- the rows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("init", INITS)
def test_old_rows_are_bit_equal_and_new_ones_by_definition(init: str, tied: bool, dtype: torch.dtype) -> None:
    tensors = weights(tied=tied, dtype=dtype)
    pieces = [[i % OLD, (7 * i) % OLD, 5] for i in range(NEW - OLD)]
    source = Expanded(TensorSource(tensors), OLD, NEW, init, pieces=pieces)
    assert source.names() == list(tensors) and source.rows == NEW
    assert source.tables() == list(TABLES[: 2 - tied])
    for name, tensor in tensors.items():
        value = source.read(name)
        assert value.dtype == dtype and tuple(value.shape) == source.shape(name)
        if name not in TABLES:
            assert torch.equal(value, tensor)
            continue
        old, new = tensor[:OLD], value[OLD:]
        assert torch.equal(value[:OLD], old) and value.shape == (NEW, tensor.shape[1])
        assert not torch.equal(new[: ROWS - OLD], tensor[OLD:])  # spare rows are the new tokens'
        if init == "normal":
            assert abs(new.float().std() / STD - 1) < 0.05 and abs(new.float().mean()) < 0.002
            assert len(new.float().unique(dim=0)) == NEW - OLD
        mean = old.double().mean(0)
        expected = torch.stack([old[ids].double().mean(0) if init == "pieces" else mean for ids in pieces])
        if init != "normal":
            assert torch.equal(new, expected.float().to(dtype))
    if not tied and init == "normal":
        assert not torch.equal(source.read(TABLES[0])[OLD:], source.read(TABLES[1])[OLD:])


def test_mean_is_alpacas() -> None:
    """smart_tokenizer_and_embedding_resize: input_embeddings[-n:] = input_embeddings[:-n].mean(dim=0, keepdim=True)"""
    tensors = weights(rows=OLD)
    source = Expanded(TensorSource(tensors), OLD, OLD + 1, "mean")
    for name in TABLES:
        resized = torch.cat([tensors[name], torch.zeros(1, tensors[name].shape[1])])
        resized[-1:] = resized[:-1].mean(dim=0, keepdim=True)
        torch.testing.assert_close(source.read(name), resized, rtol=1e-6, atol=1e-8)


def test_normal_is_the_distribution_of_resize_token_embeddings() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=50
    )
    model = LlamaForCausalLM(config)
    assert model.config.initializer_range == STD
    tensors = {TABLES[0]: model.get_input_embeddings().weight.detach().clone()}
    model.resize_token_embeddings(2050, mean_resizing=False)
    reference = model.get_input_embeddings().weight.detach()
    ours = Expanded(TensorSource(tensors), 50, 2050).read(TABLES[0])
    assert torch.equal(ours[:50], reference[:50])
    assert abs(ours[50:].std() / reference[50:].std() - 1) < 0.02


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_slice_is_that_of_the_whole(data: st.DataObject) -> None:
    """Rows and columns, in chunks of any size: what makes every mp and both ways of splitting the same."""
    old, spare, more, columns = (data.draw(st.integers(low, 40)) for low in (1, 0, 0, 1))
    init, chunk = data.draw(st.sampled_from(INITS)), data.draw(st.integers(1, 50))
    new = old + more
    pieces = data.draw(st.lists(st.lists(st.integers(0, old - 1), max_size=4), min_size=more, max_size=more))
    table = torch.randn(old + spare, columns, generator=torch.Generator().manual_seed(old))
    source = Expanded(TensorSource({TABLES[0]: table}), old, new, init, seed=3, pieces=pieces)
    whole = source.read(TABLES[0])
    assert whole.shape == (max(old + spare, new), columns)
    assert torch.equal(whole[:old], table[:old]) and torch.equal(whole[new:], table[new:])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vocab_module, "CHUNK", chunk)
        again = Expanded(TensorSource({TABLES[0]: table}), old, new, init, seed=3, pieces=pieces)
        for dim in (0, 1):
            start = data.draw(st.integers(0, whole.shape[dim]))
            stop = data.draw(st.integers(start, whole.shape[dim]))
            part = again.read(TABLES[0], dim, start, stop)
            assert torch.equal(part, whole.narrow(dim, start, stop - start)) and part.is_contiguous()


def test_a_token_without_pieces_gets_the_mean() -> None:
    table = torch.randn(8, 4)
    source = Expanded(TensorSource({TABLES[0]: table}), 8, 10, "pieces", pieces=[[], [2, 2, 3]])
    value = source.read(TABLES[0])
    torch.testing.assert_close(value[8], table.mean(0))
    torch.testing.assert_close(value[9], (2 * table[2] + table[3]) / 3)


def test_the_seed_draws_the_rows() -> None:
    def rows(seed: int) -> torch.Tensor:
        return Expanded(TensorSource({TABLES[0]: torch.zeros(4, 8)}), 4, 9, seed=seed).read(TABLES[0])[4:]

    assert torch.equal(rows(0), rows(0)) and not torch.equal(rows(0), rows(1))


def test_only_a_chunk_is_read_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    class Watched(TensorSource):
        largest = 0

        def read(self, name, dim=None, start=0, stop=None):
            value = super().read(name, dim, start, stop)
            self.largest = max(self.largest, value.numel())
            return value

    monkeypatch.setattr(vocab_module, "CHUNK", 16)
    watched = Watched({TABLES[0]: torch.randn(200, 8)})
    for init in INITS:
        Expanded(watched, 200, 300, init, pieces=[[1, 199]] * 100).read(TABLES[0], 0, 150, 300)
    assert watched.largest == 16 * 8


def test_rows_and_inits_are_checked() -> None:
    with pytest.raises(ValueError, match="--init zeros: choose one of normal, mean, pieces"):
        Expanded(TensorSource(weights()), OLD, NEW, "zeros")
    with pytest.raises(ValueError, match="tok_embeddings.weight has 333 rows, but the tokenizer .* 334 tokens"):
        Expanded(TensorSource(weights()), 334, NEW)


# --- the tool ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", INITS)
def test_every_mp_and_format_holds_the_same_model(grown: Path, tmp_path: Path, init: str) -> None:
    src = write_tiny_checkpoint(tmp_path / "src", tiny_args(vocab_size=OLD), shards=2, embedding_dim=1)
    before, first = open_checkpoint(src).source, None
    for i, flags in enumerate(
        ({}, {"mp": 2}, {"mp": 4, "embedding_dim": 1}, {"format": "hf", "max_shard_size": "30KB"})
    ):
        dst = tmp_path / f"dst{i}"
        expand_vocab.main(src=str(src), dst=str(dst), tokenizer_path=str(grown), init=init, seed=1, **flags)
        after = open_checkpoint(dst)
        size = Tokenizer.open(after.tokenizer).vocab_size
        assert size == Tokenizer.open(grown).vocab_size > OLD  # added_tokens.json went along
        assert after.params["vocab_size"] == size
        tensors = {name: after.source.read(name) for name in after.source.names()}
        for name in before.names():
            assert torch.equal(tensors[name][:OLD] if name in TABLES else tensors[name], before.read(name)), name
        first = first or tensors
        assert all(torch.equal(tensors[name], first[name]) for name in first)


def test_the_grown_model_says_of_old_tokens_what_it_said(grown: Path, tmp_path: Path, capsys) -> None:
    from transformers import AutoModelForCausalLM

    src = write_tiny_checkpoint(tmp_path / "src", tiny_args(vocab_size=OLD))
    (tmp_path / "sample.txt").write_text("Le chat dort. La chatte boit le lait.")
    flags = {"src": str(src), "tokenizer_path": str(grown), "sample_text": str(tmp_path / "sample.txt")}
    expand_vocab.main(**flags, dst=str(tmp_path / "meta"), init="pieces")
    expand_vocab.main(**flags, dst=str(tmp_path / "hf"), init="pieces", format="hf")
    said = capsys.readouterr().out
    old, new = Tokenizer.open(src), Tokenizer.open(grown)
    counts = [len(t.encode("Le chat dort. La chatte boit le lait.")) for t in (old, new)]
    assert f"{counts[0]} tokens before, {counts[1]} after" in said and counts[1] < counts[0]
    assert f"{OLD} -> {new.vocab_size} tokens, {new.vocab_size} rows in tok_embeddings.weight and output.weight" in said
    assert "layers.{0..1}.attention.wq.weight" in said
    ids = torch.tensor([old.encode("What colour is grass?", bos=True)])
    logits = [Transformer.from_pretrained(str(path))(ids) for path in (src, tmp_path / "meta", tmp_path / "hf")]
    torch.testing.assert_close(logits[1][..., :OLD], logits[0], rtol=1e-6, atol=1e-6)
    assert torch.equal(logits[1], logits[2])
    theirs = AutoModelForCausalLM.from_pretrained(str(tmp_path / "hf"))(ids).logits
    torch.testing.assert_close(theirs, logits[1], rtol=2e-5, atol=2e-5)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["vocab_size"] == new.vocab_size


def test_tokens_are_counted_in_the_field_that_is_named(grown: Path, tmp_path: Path, capsys) -> None:
    text = "Le chat dort. La chatte boit le lait."
    (tmp_path / "sample.jsonl").write_text(json.dumps({"content": text}) + "\n")
    src = write_tiny_checkpoint(tmp_path / "src", tiny_args(vocab_size=OLD))
    flags = {"src": str(src), "tokenizer_path": str(grown), "sample_text": str(tmp_path / "sample.jsonl")}
    expand_vocab.main(**flags, dst=str(tmp_path / "dst"), field="content")
    counts = [len(t.encode(text)) for t in (Tokenizer.open(src), Tokenizer.open(grown))]
    assert f"{counts[0]} tokens before, {counts[1]} after" in capsys.readouterr().out


def test_spare_rows_and_a_tied_embedding(grown: Path, tmp_path: Path, capsys) -> None:
    args = tiny_args(vocab_size=2 * OLD, tie_word_embeddings=True)
    src = write_tiny_checkpoint(tmp_path / "src", args)
    expand_vocab.main(src=str(src), dst=str(tmp_path / "dst"), tokenizer_path=str(grown), mp=2)
    before, after = (open_checkpoint(path).source for path in (src, tmp_path / "dst"))
    new = Tokenizer.open(grown).vocab_size
    table, old = after.read(TABLES[0]), before.read(TABLES[0])
    assert TABLES[1] not in after.names() and table.shape == old.shape
    assert torch.equal(table[:OLD], old[:OLD]) and torch.equal(table[new:], old[new:])
    assert not (table[OLD:new] == old[OLD:new]).all(dim=1).any()
    assert f"{OLD} -> {new} tokens, {2 * OLD} rows in tok_embeddings.weight" in capsys.readouterr().out


def test_refusals_name_what_is_wrong(grown: Path, tmp_path: Path) -> None:
    src = write_tiny_checkpoint(tmp_path / "src", tiny_args(vocab_size=OLD))
    arguments = {"src": str(src), "dst": str(tmp_path / "dst"), "tokenizer_path": str(grown)}

    def refused(said: str, **flags: str) -> None:
        with pytest.raises(ValueError, match=said) as error:
            expand_vocab.main(**arguments | flags)
        assert "\n" not in str(error.value) and not (tmp_path / "dst").exists()

    refused("--format zip: choose meta or hf", format="zip")
    refused("--init zero: choose one of", init="zero")
    other = tmp_path / "other.model"
    other.write_bytes(vocabulary.train(["entirely other words in here", "nothing in common"] * 9, 275, "unigram"))
    refused("is no extension of .*: id [0-9]+ is .* and was .*: merge the vocabularies", tokenizer_path=str(other))
    expand_vocab.main(**arguments | {"dst": str(tmp_path / "grown")})
    refused("grown is already there", dst=str(tmp_path / "grown"), sample_text=str(tmp_path / "absent.txt"))
    refused("has 320 tokens and .*: a vocabulary only grows", src=str(tmp_path / "grown"), tokenizer_path=str(src))
    refused("has 320 rows, but the tokenizer .* --old_tokenizer_path", old_tokenizer_path=str(grown))
    (src / "tokenizer.model").unlink()
    refused("--src has no tokenizer beside it: .*--old_tokenizer_path")
