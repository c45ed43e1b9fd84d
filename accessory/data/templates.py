"""The words around an instruction, and where in the tokens the answer begins.

    record {instruction, input?, output} --prompt-->  "Below is ... ### Response:"  +  output
                                         --tokens-->  [BOS] prompt ids | answer ids  EOS
                                         --labels-->   -100 ... -100   | answer ids  EOS

The words are Stanford Alpaca's two prompts, byte for byte (tatsu-lab/stanford_alpaca, train.py). BOS stands in front
where the tokenizer's family uses it (`Tokenizer.add_bos`). Test: pytest tests/unit/test_sft.py
"""

from ..tokenizer import Tokenizer

WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)


def prompt(instruction: str, input: str = "") -> str:
    """Stanford's prompt, with the input's section where `input` is not empty. Braces in the texts stay as they are."""
    template = WITH_INPUT if input else WITHOUT_INPUT
    return template.format(instruction=instruction, input=input)


def encode_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """A prompt's ids, in training as in generation."""
    return tokenizer.encode(text, bos=tokenizer.add_bos)


def encode_example(tokenizer: Tokenizer, text: str, output: str) -> tuple[list[int], int]:
    """-> (ids of prompt + output + EOS, how many of them are the prompt's).

    Prompt and output are tokenised as one string, as Stanford does, where that begins with the prompt's own ids. Where
    it does not (an output ":" merges with the prompt's last ":" in some vocabularies) the output is tokenised as a
    continuation of its own. Either way the first ids are exactly those that generation starts from, and every token is
    wholly prompt or wholly answer: there is no label to be off by one."""
    head, joint = encode_prompt(tokenizer, text), encode_prompt(tokenizer, text + output)
    if joint[: len(head)] != head:
        joint = head + tokenizer.encode_continuation(output)
    assert tokenizer.eos_id is not None
    return [*joint, tokenizer.eos_id], len(head)
