"""What a batch is worth: functions (model, batch) -> (loss_sum, num_tokens, metrics), sums over this rank's tokens."""

from typing import Any

from torch import Tensor, nn


def next_token(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Cross-entropy of the labelled tokens of a padding-free batch (tokens, labels, positions, cu_seqlens)."""
    return model(batch.tokens, labels=batch.labels, positions=batch.positions, cu_seqlens=batch.cu_seqlens)
