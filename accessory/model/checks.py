"""What a caller gives the model, looked at before anything is computed: a mistake is a ValueError of one line that names the
argument, where else results would be wrong in silence, or an error come from deep inside. Test: tests/unit/test_mistakes.py."""

from typing import Any

import torch
from torch import Tensor, nn

from accessory.parallel.derivatives import by_hand


def check_tokens(tokens: Any, model: nn.Module) -> None:
    """Token ids of the model (`args.vocab_size`), (batch, tokens)."""
    if not isinstance(tokens, Tensor) or tokens.dim() != 2 or tokens.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"tokens {told(tokens)}: whole numbers in (batch, tokens) are expected")
    check_weights(model, tokens.is_meta)
    if tokens.device.type != "cpu" or not tokens.numel() or not by_hand():
        return  # a GPU would be waited for, a graph would end; vmap has no number
    # a rank's embedding takes foreign ids for another rank's, and would give zeros for those that no rank has
    least, most = tokens.aminmax()
    if least < 0 or most >= model.args.vocab_size:
        wrong = int(least if least < 0 else most)
        raise ValueError(f"tokens: {wrong} is none of this model's {model.args.vocab_size}: check the tokenizer")


def check_weights(model: nn.Module, planned: bool = False) -> None:
    """`planned`: nothing is to be computed, sizes alone are of interest."""
    first = next(model.parameters(), None)
    if first is not None and first.is_meta and not planned:
        raise ValueError("the model has no weights yet: init_weights(), or load_state_dict(.., assign=True)")


def check_positions(positions: Any, tokens: Tensor) -> None:
    if not isinstance(positions, Tensor) or positions.shape not in (tokens.shape, (1, tokens.shape[1])):
        raise ValueError(f"positions {told(positions)} for tokens {tuple(tokens.shape)}: one for each is expected")


def check_window(length: int, window: int) -> None:
    if length > window:
        raise ValueError(
            f"a sequence of {length} tokens, but this model attends over a sliding window of {window}, which is not "
            f"implemented: --max_seq_len {window} or less (in generation: fewer --max_new_tokens) gives its exact results"
        )


def told(given: Any) -> str:
    """In a word: (2, 9) of torch.float32, or list."""
    return f"{tuple(given.shape)} of {given.dtype}" if isinstance(given, Tensor) else type(given).__name__
