"""`hidden`, heads and second derivatives of a model that is split over mp, with sequence parallel, or sharded over dp by FSDP, and
torch's DistributedDataParallel around it: as on one rank, or refused."""

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from accessory.model import Transformer, shard_dim
from accessory.model.llama import local_slice, replicated, set_parameter
from accessory.model.lora import partial_grad
from accessory.parallel import groups
from accessory.parallel.fsdp import sharder
from tests.helpers import gather_over_mp, gathered, random_weights, run_ranks, tiny_args

TOKENS = torch.randint(101, (2, 9), generator=torch.Generator().manual_seed(0))  # 18: mp 4 does not divide it


def model_of(**keys) -> Transformer:
    model = Transformer(tiny_args(**keys))
    weights = random_weights(model.args)
    for name in [n for n, _ in model.named_parameters()]:
        set_parameter(model, name, local_slice(model, name, functools.partial(lambda n, shape: weights[n], name)))
    return model


def head_of(rows: int) -> nn.Linear:
    torch.manual_seed(7)
    return nn.Linear(48, rows)


def own_loss(model: Transformer, way: str, tokens: torch.Tensor) -> torch.Tensor:
    """Of a head of one's own: on `hidden`, or put into the model, with its loss or one of one's own; or through hooks."""
    if way == "hidden":
        return head_of(3)(model.hidden(tokens)).square().sum()
    if way == "hook":
        model.output.register_forward_hook(lambda module, inputs, output: output * 0.5)
        return model(tokens, labels=tokens)[0]
    model.output = head_of(101)
    if way == "labels":
        return model(tokens, labels=tokens)[0]
    return F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")


def trained(way: str, tokens: torch.Tensor = TOKENS, divided: bool = False) -> dict[str, torch.Tensor]:
    """The loss, and the whole gradients, on every rank."""
    model = model_of()
    model.sequence_parallel = divided
    loss = own_loss(model, way, tokens)
    loss.backward()
    found, addend = {"loss": loss.detach()}, replicated if divided else partial_grad
    for name, parameter in model.named_parameters():
        if parameter.grad is None or (name.startswith("output.") and isinstance(model.output, nn.Linear)):
            found[name] = parameter.grad  # one's own, the same on every rank; none where `hidden` passes it by
            continue
        gradient, dim = parameter.grad, shard_dim(name)
        if addend(name):
            groups.all_reduce(gradient, groups.mp_group())
        whole = gradient if dim is None else torch.cat(gather_over_mp(gradient), dim)
        found[name] = whole[:101] if name in ("tok_embeddings.weight", "output.weight") else whole  # less the padding
    return found


WAYS = ("hidden", "logits", "labels", "hook")


def over_mp(mp: int) -> None:
    groups.init(1)
    expected = {way: trained(way) for way in WAYS}
    groups.forget_model_parallel()
    groups.init(mp)
    for way in WAYS:
        for divided in (False, True):
            found = trained(way, divided=divided)
            assert found.keys() == expected[way].keys()
            for name, value in expected[way].items():
                if value is None:
                    assert found[name] is None and (way, name) == ("hidden", "output.weight")
                    continue
                near = (found[name] - value).abs().max() <= 2e-5 * value.abs().max()
                assert value.any() and near, (way, divided, name)


@pytest.mark.parametrize("mp", [2, 4])
def test_heads_of_ones_own_learn_over_mp_as_on_one_rank(mp: int) -> None:
    run_ranks(over_mp, mp, world=mp)


def second() -> None:
    groups.init(2)
    model = model_of()
    losses = {"logits": lambda: model(TOKENS).square().sum(), "hidden": lambda: model.hidden(TOKENS).square().sum()}
    losses["labels"] = lambda: model(TOKENS, labels=TOKENS)[0]
    for loss in losses.values():
        loss().backward()
        with pytest.raises(RuntimeError, match="a second derivative .create_graph=True. through"):
            torch.autograd.grad(loss(), model.norm.weight, create_graph=True)


def test_second_derivatives_over_mp_are_refused() -> None:
    run_ranks(second, world=2)


def over_dp(way: str) -> None:
    """Each rank its own row; the gradients are the mean."""
    groups.init(1)
    mine, plain = TOKENS[groups.rank() : groups.rank() + 1], model_of()
    own_loss(plain, way, TOKENS).backward()
    for kind in ("fsdp", "sdp", "ddp"):
        model, shard = model_of(), sharder(kind, "fp32")
        for module in [*model.layers, model]:
            shard(module)
        own_loss(model, way, mine).backward()
        same_mean(model, plain)


def same_mean(model: Transformer, plain: Transformer) -> None:
    for (name, parameter), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        if other.grad is not None:
            near = (gathered(parameter.grad) - other.grad / 2).abs().max() <= 1e-5 * other.grad.abs().max()
            assert near and other.grad.any(), name


def in_torchs_ddp() -> None:
    groups.init(1)
    mine, plain, model = TOKENS[groups.rank() : groups.rank() + 1], model_of(), model_of()
    whole = DistributedDataParallel(model)
    for labels in (True, False):
        for m, call, tokens in ((plain, plain, TOKENS), (model, whole, mine)):
            m.zero_grad()
            (call(tokens, labels=tokens)[0] if labels else call(tokens).square().sum()).backward()
        same_mean(model, plain)


@pytest.mark.parametrize("way", ["hidden", "hook"])
def test_and_over_dp_the_mean_is_learnt(way: str) -> None:
    run_ranks(over_dp, way, world=2)


def test_in_torchs_own_ddp_too() -> None:
    run_ranks(in_torchs_ddp, world=2)
