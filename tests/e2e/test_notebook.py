"""The README's notebook lines in a fresh interpreter without torchrun, on every format that is read; nothing is set up at import."""

import os
import re
import subprocess
import sys
import textwrap

import pytest
import torch

from tests.helpers import ROOT, random_weights, tiny_args, write_tiny_checkpoint


def interpreter(code: str, *argv: str) -> str:
    """stdout of a new Python without any of torchrun's variables."""
    mine = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
    environment = {k: v for k, v in os.environ.items() if k not in mine} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *argv],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout


def test_the_lines_of_the_readme(tmp_path) -> None:
    """One process, several checkpoints one after the other, as a notebook does: one shard, two, Hugging Face's, in bf16."""
    directory = tmp_path / "hf"
    args = tiny_args(vocab_size=320, tie_word_embeddings=False)
    write_tiny_checkpoint(tmp_path / "one", args)
    write_tiny_checkpoint(tmp_path / "two", args, shards=2, embedding_dim=1)
    write_tiny_checkpoint(tmp_path / "accessory", args, shards=2, style="consolidated")
    from accessory.checkpoint.formats_write import write_hf
    from accessory.weights import TensorSource

    directory.mkdir()
    write_hf(directory, TensorSource(random_weights(args)), args)
    out = interpreter(
        """
        import sys, torch
        from accessory.model import Transformer
        assert not torch.distributed.is_initialized() and torch.get_default_dtype() == torch.float32  # importing does nothing
        tokens = torch.randint(0, 320, (2, 9), generator=torch.Generator().manual_seed(0))
        first = None
        for path in sys.argv[1:]:
            model = Transformer.from_pretrained(path)
            logits = model(tokens)
            assert logits.shape == (2, 9, 320) and logits.requires_grad  # research may want gradients
            first = logits if first is None else first
            assert torch.equal(logits, first), path
        loss, count, metrics = model(tokens, labels=tokens)
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        half = Transformer.from_pretrained(path, dtype=torch.bfloat16)
        assert half(tokens).dtype == torch.bfloat16
        from accessory.generation.engine import generate
        assert [len(a) for a in generate(model, [[1, 2], [3]], 4)] == [4, 4]
        print(count.item(), f"{loss.item() / count.item():.6f}")
        """,
        *(str(tmp_path / name) for name in ("one", "two", "accessory", "hf")),
    )
    model_loss = out.split()
    assert model_loss[0] == "16"

    from accessory.model import Transformer

    tokens = torch.randint(0, 320, (2, 9), generator=torch.Generator().manual_seed(0))
    model = Transformer(args)
    model.load_state_dict(random_weights(args), assign=True)
    logits = model(tokens)
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).item()
    assert abs(float(model_loss[1]) - expected) < 1e-5


def test_the_readmes_own_block(tmp_path) -> None:
    blocks = [
        b for b in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S) if "from_pretrained" in b
    ]
    if not blocks:
        pytest.skip("README.md has no Python block with from_pretrained")
    path = write_tiny_checkpoint(tmp_path / "tiny")
    for block in blocks:
        block = re.sub(r"from_pretrained\([^,)]+", "from_pretrained(path", block)  # whatever path it shows
        given = "import sys, torch\npath, tokens = sys.argv[1], torch.tensor([[1, 5, 9]])\n"
        out = interpreter(given + block + "\nprint(tuple(model(tokens).shape))", str(path))
        assert out.splitlines()[-1] == "(1, 3, 320)"


def test_a_model_made_from_sizes_alone() -> None:
    out = interpreter(
        """
        import torch
        from accessory.model import ModelArgs, Transformer
        model = Transformer(ModelArgs(dim=32, n_layers=1, n_heads=4, vocab_size=50)).init_weights(seed=1)
        assert model(torch.tensor([[1, 2, 3]])).shape == (1, 3, 50)
        again = Transformer(ModelArgs(dim=32, n_layers=1, n_heads=4, vocab_size=50)).init_weights(seed=1)
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
        try:
            Transformer.from_pretrained("/no/such/checkpoint")
        except ValueError as error:
            print(error)
        """
    )
    assert "/no/such/checkpoint" in out and out.count("\n") == 1
