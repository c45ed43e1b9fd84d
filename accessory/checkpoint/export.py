"""What a run writes beside resume/: its weights in the published layout, or the adapter, gathered from the ranks.

    everything trains, or --only_save_trainable false:   consolidated.00-of-02.model.pth ...   one file per mp rank
    something is frozen:                                 adapter.safetensors + adapter.json    whole tensors, and the base's identity

A rank's piece is a cut (over dp) of a cut (over mp). Padding rows of the vocabulary and copies of kv heads are not written.
"""

import json
import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from accessory.checkpoint.adapter import base_record, write_adapter
from accessory.checkpoint.formats_write import write_consolidated
from accessory.model.args import ModelArgs
from accessory.model.llama import kv_copied, local_range, shard_dim
from accessory.parallel import groups
from accessory.parallel.fsdp import gathered


class BaseIdentity:
    """Path, sizes and sha256 of the base's files, hashed on rank 0 while the run goes on; `record()` waits for the hash.

    `expected`: what the checkpoint that is continued says of its base. Raises ValueError when this is another one, at once
    by the sizes or in `record()` by the hashes."""

    def __init__(self, checkpoint: Any, expected: dict[str, Any] | None = None):
        self.error: BaseException | None = None
        self.value = base_record(checkpoint, hashes=False)
        self.expected = expected or {}
        self._compare("size")
        self.thread = threading.Thread(target=self._hash, args=(checkpoint,), daemon=True)
        if groups.rank() == 0:
            self.thread.start()

    def _hash(self, checkpoint: Any) -> None:
        try:
            self.value = base_record(checkpoint, hashes=True)
        except OSError as error:
            self.error = error

    def record(self) -> dict[str, Any]:
        """The base's path, sizes and, on rank 0, hashes. Every rank calls it; all raise when rank 0 found another base."""
        error: BaseException | None = None
        if groups.rank() == 0:
            self.thread.join()
            try:
                if self.error is not None:
                    raise self.error
                self._compare("sha256")
            except (OSError, ValueError) as failed:
                error = failed
        groups.together(error)
        return self.value

    def _compare(self, key: str) -> None:
        then, now = self.expected.get(key, {}), self.value.get(key, {})
        if then and now and sorted(then.values()) != sorted(now.values()):
            raise ValueError(
                f"--pretrained_path {self.value['path']} is not the base this run started from ({self.expected['path']}; the "
                f"{key} of its files differs): give that one, or start anew in another --output_dir"
            )


def mp_slice(args: ModelArgs, name: str, parameter: nn.Parameter) -> Tensor:
    """This mp rank's slice of a parameter, gathered over dp, without padding rows. Collective over dp."""
    value = gathered(parameter.detach())
    if name in ("tok_embeddings.weight", "output.weight"):
        _, start, stop = local_range(args, name)
        value = value[: stop - start]
    return value


def whole(args: ModelArgs, name: str, parameter: nn.Parameter) -> Tensor:
    """The unsharded parameter, true rows, each kv head once. Collective over the world."""
    value = gathered(parameter.detach())
    dim = shard_dim(name)
    if dim is None:
        return value
    parts = groups.gather_over_mp(value)
    if kv_copied(name):
        parts = parts[:: max(1, groups.mp_size() // args.kv_heads)]
    value = torch.cat(parts, dim)
    return value[: args.vocab_size] if name in ("tok_embeddings.weight", "output.weight") else value


def write_model(
    directory: Path, model: nn.Module, params: dict[str, Any], dtypes: dict[str, torch.dtype], embedding_dim: int
) -> list[Path]:
    """Every parameter, in the dtype of the checkpoint it came from, as this mp rank's consolidated file. Every rank calls it.

    `embedding_dim` 1 splits tok_embeddings over its features, as Llama 1 and 2 files do. Returns the files this rank wrote."""
    tensors = {}
    for name, parameter in model.named_parameters():
        if name == "tok_embeddings.weight" and embedding_dim == 1 and groups.mp_size() > 1:
            value = whole(model.args, name, parameter).chunk(groups.mp_size(), 1)[groups.mp_rank()]
        else:
            value = mp_slice(model.args, name, parameter)
        if groups.dp_rank() == 0:
            tensors[name] = value.to("cpu", dtypes.get(name, value.dtype), copy=True)
        del value
    if groups.dp_rank() != 0:
        return []
    first = groups.mp_rank() == 0
    files = [
        write_consolidated(directory, tensors.items(), params if first else None, groups.mp_rank(), groups.mp_size())
    ]
    return files + ([directory / "params.json"] if first else [])


def write_trained(
    directory: Path, model: nn.Module, names: list[str], terms: dict[str, Any], params: dict[str, Any], step: int
) -> list[Path]:
    """The trained parameters, whole, as an adapter directory; rank 0 writes and reads back. Every rank calls it."""
    parameters, tensors = dict(model.named_parameters()), {}
    for name in names:
        value = whole(model.args, name, parameters[name])
        if groups.rank() == 0:
            tensors[name] = value.float().cpu()
    if groups.rank() != 0:
        return []
    (directory / "params.json").write_text(json.dumps(params, indent=1))
    return [*write_adapter(directory, tensors, terms, expect_trained=step > 0), directory / "params.json"]
