"""The parallel layers once more, on torch.distributed alone: what could take fairscale's place. For test_layers.py.

column: W [out/mp, in]    row: W [in/mp columns]    embedding: rows of the table; sums and copies over mp by all_reduce
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from accessory.parallel import groups


def summed(tensor: Tensor) -> Tensor:
    total = tensor.contiguous().clone()
    dist.all_reduce(total, group=groups.mp_group())
    return total


class Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return summed(gradient)


class Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return summed(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient


class Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(groups.mp_size())]
        dist.all_gather(parts, x.contiguous(), group=groups.mp_group())
        return torch.cat(parts, dim=-1)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient.chunk(groups.mp_size(), dim=-1)[groups.mp_rank()].contiguous()


class Linear(nn.Module):
    def __init__(self, rows: int, columns: int, bias_rows: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns, device="meta"))
        self.bias = nn.Parameter(torch.empty(bias_rows, device="meta")) if bias_rows else None


class Column(Linear):
    def __init__(self, in_features: int, out_features: int, bias: bool = False):
        rows = out_features // groups.mp_size()
        super().__init__(rows, in_features, rows if bias else 0)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Row(Linear):
    def __init__(self, in_features: int, out_features: int, bias: bool = False):
        super().__init__(out_features, in_features // groups.mp_size(), out_features if bias else 0)

    def partial(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = Reduce.apply(self.partial(x))
        return y if self.bias is None else y + self.bias


class Embedding(nn.Module):
    def __init__(self, vocab_size: int, dim: int):
        super().__init__()
        rows = -(-vocab_size // groups.mp_size())
        self.num_embeddings, self.first = rows * groups.mp_size(), rows * groups.mp_rank()
        self.weight = nn.Parameter(torch.empty(rows, dim, device="meta"))

    def forward(self, tokens: Tensor) -> Tensor:
        row = tokens - self.first
        mine = (row >= 0) & (row < len(self.weight))
        return Reduce.apply(F.embedding(row * mine, self.weight) * mine.unsqueeze(-1))
