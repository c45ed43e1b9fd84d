"""What main_generate is asked with: prompts from a flag or a file, a tokenizer that does or does not belong to the model."""

from pathlib import Path

import pytest
import torch

from accessory.data.readers import prompt_lines
from accessory.generation.engine import choose
from accessory.main_generate import GenerateArgs
from accessory.model import Transformer
from accessory.tokenizer import MAX_SPARE_ROWS, Tokenizer
from tests.helpers import tiny_tokenizer, write_tiny_checkpoint


def test_a_line_ends_with_a_line_feed_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffone\u2028still one\x0cone\x85\r\n\n  two \r\n \nthree".encode())
    assert prompt_lines(file, "--prompts_file") == ["one\u2028still one\x0cone\x85", "  two ", "three"]
    file.write_bytes(b"fine\n\xff\xfe")
    with pytest.raises(ValueError, match=r"^--prompts_file .*prompts.txt: byte 5 is not UTF-8: save it as UTF-8$"):
        prompt_lines(file, "--prompts_file")


def test_one_prompt_that_is_not_empty() -> None:
    assert GenerateArgs("here", prompt="none").prompt == "none"
    for given in ({}, {"prompt": ""}, {"prompt": "a", "prompts_file": "b"}):
        with pytest.raises(ValueError, match="give one of --prompt, which is not to be empty, and --prompts_file"):
            GenerateArgs("here", **given)
    with pytest.raises(ValueError, match=r"--prompt '\\udcff': not UTF-8"):
        GenerateArgs("here", prompt="\udcff")


def test_a_tokenizer_that_is_not_the_models(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.model"
    file.write_bytes(tiny_tokenizer())
    size = Tokenizer.open(file).vocab_size
    for rows in (size, size + MAX_SPARE_ROWS):
        assert Tokenizer.open_for(file, rows, "model").vocab_size == size
    for rows in (size - 1, size + MAX_SPARE_ROWS + 1):
        with pytest.raises(ValueError, match=f"has {size} tokens, the embedding of model has {rows} rows: they do not"):
            Tokenizer.open_for(file, rows, "model")


def test_ids_that_the_model_has_not(tmp_path: Path) -> None:
    model = Transformer.from_pretrained(write_tiny_checkpoint(tmp_path / "tiny"))
    size = model.args.vocab_size
    assert model(torch.tensor([[0, size - 1]])).shape == (1, 2, size)
    for wrong in (-1, size):
        with pytest.raises(ValueError, match=f"tokens: {wrong} is none of this model's {size}"):
            model(torch.tensor([[1, wrong]]))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers(temperature: float) -> None:
    draw = torch.Generator()
    with pytest.raises(ValueError, match="logits are not finite"):
        choose(torch.tensor([[1.0, float("nan")]]), temperature, 1.0, draw)
    assert choose(torch.tensor([[1.0, 3.0, 2.0]]), 1e-45, 0.9, draw).tolist() == [1]
