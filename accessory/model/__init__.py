"""One handwritten LLaMA: `from accessory.model import Transformer; model = Transformer.from_pretrained(path)`."""

from accessory.model.args import ModelArgs
from accessory.model.llama import SHARD_DIM, Transformer, shard_dim

__all__ = ["ModelArgs", "SHARD_DIM", "Transformer", "shard_dim"]
