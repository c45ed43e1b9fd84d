"""A LLaMA in torch alone, as one would write it without a library: what DTensor's plans are for, and `load_state_dict`.

Names are Meta's, so that consolidated.*.pth fits. Rotary pairs as Meta turns them. No packing, no cache.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    def __init__(self, p: dict):
        super().__init__()
        self.size = p["dim"] // p["n_heads"]
        keys = p["n_kv_heads"] * self.size
        self.wq = nn.Linear(p["dim"], p["dim"], bias=False)
        self.wk, self.wv = (nn.Linear(p["dim"], keys, bias=False) for _ in range(2))
        self.wo = nn.Linear(p["dim"], p["dim"], bias=False)

    def forward(self, x: Tensor, turn: Tensor) -> Tensor:
        q, k, v = (w(x).unflatten(-1, (-1, self.size)).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        q, k = rotate(q, turn), rotate(k, turn)
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        return self.wo(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, p: dict):
        super().__init__()
        self.w1, self.w3 = (nn.Linear(p["dim"], p["hidden_dim"], bias=False) for _ in range(2))
        self.w2 = nn.Linear(p["hidden_dim"], p["dim"], bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, p: dict):
        super().__init__()
        self.attention_norm, self.ffn_norm = (nn.RMSNorm(p["dim"], p["norm_eps"]) for _ in range(2))
        self.attention, self.feed_forward = Attention(p), FeedForward(p)

    def forward(self, x: Tensor, turn: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), turn)
        return x + self.feed_forward(self.ffn_norm(x))


class Llama(nn.Module):
    """`model(tokens (B, T))` -> logits (B, T, V). p: params.json with dim, n_layers, n_heads, n_kv_heads, hidden_dim, vocab_size,
    norm_eps, rope_theta."""

    def __init__(self, p: dict):
        super().__init__()
        self.p = p
        self.tok_embeddings = nn.Embedding(p["vocab_size"], p["dim"])
        self.layers = nn.ModuleList(Block(p) for _ in range(p["n_layers"]))
        self.norm = nn.RMSNorm(p["dim"], p["norm_eps"])
        self.output = nn.Linear(p["dim"], p["vocab_size"], bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        size = self.p["dim"] // self.p["n_heads"]
        speed = self.p["rope_theta"] ** (-torch.arange(0, size, 2, device=tokens.device) / size)
        angles = torch.arange(tokens.shape[1], device=tokens.device)[:, None] * speed
        turn = torch.polar(torch.ones_like(angles), angles)  # (T, Dh/2)
        x = self.tok_embeddings(tokens)
        for layer in self.layers:
            x = layer(x, turn)
        return self.output(self.norm(x))


def rotate(x: Tensor, turn: Tensor) -> Tensor:  # (B, H, T, Dh)
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)
