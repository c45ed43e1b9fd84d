"""m shards -> whole -> n shards: every slice bit-equal to the whole tensor's, whether or not the sizes divide."""

import itertools

import pytest
import torch

from accessory.model.args import ModelArgs
from accessory.weights import TensorSource, check_keys, expected_shapes
from accessory.weights.reshard import Merged, shard_range, split

SIZES = (1, 2, 3, 4, 6)
ARGS = ModelArgs(
    dim=48, n_layers=1, n_heads=24, n_kv_heads=4, vocab_size=101, hidden_dim=72, head_dim=2, tie_word_embeddings=False
)
MHA = ModelArgs.from_dict(ARGS.to_dict() | {"n_kv_heads": 24})


def random_tensors(args: ModelArgs, lora_rank: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = expected_shapes(args, bool(args.tie_word_embeddings))
    for name in [n for n, shape in shapes.items() if lora_rank and n.startswith("layers.") and len(shape) == 2]:
        out, columns = shapes[name]
        shapes[name.replace(".weight", ".lora_a.weight")] = (lora_rank, columns)
        shapes[name.replace(".weight", ".lora_b.weight")] = (out, lora_rank)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def shards_of(tensors: dict[str, torch.Tensor], args: ModelArgs, m: int, embedding_dim: int) -> list[TensorSource]:
    return [TensorSource(dict(split(TensorSource(tensors), args, m, rank, embedding_dim))) for rank in range(m)]


def merged(shards: list[TensorSource], args: ModelArgs) -> Merged:
    return Merged(shards, args.to_dict(), [f"consolidated.{i:02d}.pth" for i in range(len(shards))])


@pytest.mark.parametrize("embedding_dim", [0, 1])
@pytest.mark.parametrize("kv_heads", [1, 2, 4, 24])
@pytest.mark.parametrize("m", SIZES)
def test_any_number_of_shards_reads_as_any_other(m: int, kv_heads: int, embedding_dim: int) -> None:
    args = ModelArgs.from_dict(ARGS.to_dict() | {"n_kv_heads": kv_heads, "attention_bias": True, "mlp_bias": True})
    if m % kv_heads and kv_heads % m:
        with pytest.raises(ValueError, match=rf"--model_parallel_size {m} but n_kv_heads is {kv_heads}"):
            shards_of({"norm.weight": torch.ones(48)}, args, m, embedding_dim)
        return
    tensors = random_tensors(args, lora_rank=2)
    source = merged(shards_of(tensors, args, m, embedding_dim), args)
    assert source.embedding_dim == (None if m == 1 else embedding_dim)
    assert set(source.names()) == set(tensors)
    for name, tensor in tensors.items():
        assert source.shape(name) == tuple(tensor.shape), name
        assert torch.equal(source.read(name), tensor), name
        for n, rank in [(k, r) for k in SIZES if k % kv_heads == 0 or kv_heads % k == 0 for r in range(k)]:
            dim, start, stop = shard_range(name, tensor.shape, args, n, rank)
            expected = tensor if dim is None else tensor.narrow(dim, start, stop - start)
            assert torch.equal(source.read(name, dim, start, stop), expected), (name, m, n, rank)


def test_every_slice_on_either_dim_is_exact() -> None:
    tensors = random_tensors(MHA)
    for m, embedding_dim in itertools.product((2, 3), (0, 1)):
        source = merged(shards_of(tensors, MHA, m, embedding_dim), MHA)
        for name in (
            "tok_embeddings.weight",
            "layers.0.attention.wo.weight",
            "layers.0.attention.wk.weight",
            "output.weight",
        ):
            for dim in (0, 1):
                size = tensors[name].shape[dim]
                for start, stop in itertools.combinations(range(0, size + 1, 5), 2):
                    piece = source.read(name, dim, start, stop)
                    assert torch.equal(piece, tensors[name].narrow(dim, start, stop - start)), (
                        name,
                        m,
                        dim,
                        start,
                        stop,
                    )
                    assert piece.untyped_storage().nbytes() == piece.nbytes and piece.is_contiguous()


def test_uneven_vocabulary_is_floored_as_in_published_files() -> None:
    args = ModelArgs(dim=8, n_layers=1, n_heads=4, vocab_size=49953, hidden_dim=8)
    ranges = [shard_range("output.weight", (49953, 8), args, 4, rank) for rank in range(4)]
    assert [stop - start for _, start, stop in ranges] == [12488, 12488, 12488, 12489]
    with pytest.raises(ValueError, match=r"w1.weight has 10 rows, which 4 shards cannot share"):
        shard_range("layers.0.feed_forward.w1.weight", (10, 8), args, 4, 0)


def test_more_shards_than_kv_heads_hold_copies_that_are_read_once_and_compared() -> None:
    args = ModelArgs.from_dict(ARGS.to_dict() | {"n_kv_heads": 2})
    tensors, name = random_tensors(args), "layers.0.attention.wk.weight"
    shards = shards_of(tensors, args, 6, 0)
    assert [s.shape(name)[0] for s in shards] == [2] * 6 and merged(shards, args).shape(name) == (4, 48)
    shards[4].tensors[name][0, 0] += 1
    with pytest.raises(
        ValueError, match=r"consolidated\.04\.pth: layers\.0\.attention\.wk\.weight differs from consolidated\.03\.pth"
    ):
        merged(shards, args).read(name)


def damage_norm(shards):
    shards[1].tensors["norm.weight"] = shards[1].tensors["norm.weight"] + 1


def damage_names(shards):
    del shards[2].tensors["norm.weight"]


def damage_shape(shards):
    shards[1].tensors["layers.0.attention.wo.weight"] = torch.zeros(47, 16)


def damage_dtype(shards):
    shards[1].tensors["layers.0.feed_forward.w2.weight"] = shards[1].tensors["layers.0.feed_forward.w2.weight"].half()


def damage_embedding(shards):
    shards[1].tensors["tok_embeddings.weight"] = torch.zeros(101, 17)


@pytest.mark.parametrize(
    "damage, message",
    [
        (damage_norm, r"consolidated\.01\.pth: norm\.weight differs from consolidated\.00\.pth"),
        (damage_names, r"consolidated\.02\.pth: norm\.weight is missing, but consolidated\.00\.pth has it"),
        (damage_shape, r"consolidated\.01\.pth: layers\.0\.attention\.wo\.weight is \(47, 16\)"),
        (damage_dtype, r"consolidated\.01\.pth: layers\.0\.feed_forward\.w2\.weight is .* torch\.float16"),
        (damage_embedding, r"tok_embeddings\.weight has \[16, 17, 16\] columns in 3 shards"),
    ],
)
def test_shards_that_do_not_belong_together_are_refused_by_name(damage, message: str) -> None:
    shards = shards_of(random_tensors(MHA), MHA, 3, 1)
    damage(shards)
    with pytest.raises(ValueError, match=message) as caught:
        merged(shards, MHA).read("norm.weight")
    assert "\n" not in str(caught.value)


def test_a_stray_shard_of_a_wider_split_shows_in_the_shapes() -> None:
    shards = shards_of(random_tensors(MHA), MHA, 2, 0)
    report = check_keys(merged([*shards, shards[1]], MHA), MHA)
    assert any(line.startswith("layers.0.attention.wq.weight is 72x48, not 48x48") for line in report["mis-shaped"])


def test_check_keys_names_every_kind_of_misfit() -> None:
    tensors = random_tensors(ARGS)
    del tensors["layers.0.attention.wv.weight"]
    tensors |= {
        "layers.0.attention.wz.weight": torch.ones(1),
        "norm.weight": torch.ones(3),
        "rope.freqs": torch.ones(1),
    }
    report = check_keys(TensorSource(tensors), ARGS)
    assert report["missing"] == ["layers.0.attention.wv.weight"] and report["unexpected"] == [
        "layers.0.attention.wz.weight"
    ]
    assert report["mis-shaped"] == ["norm.weight is 3, not 48"]
