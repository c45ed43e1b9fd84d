"""Answer a prompt, or every line of a file, with any checkpoint: `python -m accessory.main_generate --pretrained_path DIR --prompt "..."`

Runs in one process, or under torchrun with --model_parallel_size. stdout holds the answers and nothing else, one after the
other; with --prompts_file one JSON object {"prompt", "answer"} a line.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from accessory import config
from accessory.config import flag
from accessory.data import carried
from accessory.data.dialog import Template
from accessory.data.readers import prompt_lines
from accessory.data.templates import question_ids
from accessory.flags import PRECISIONS
from accessory.tokenizer import Tokenizer

# what imports torch is imported where it is used: --help and a wrong flag need not wait for it


@dataclass
class GenerateArgs:
    """Generation"""

    pretrained_path: str = flag(
        "", "checkpoint directory (or .gguf), an adapter saved by a run, or a list a,b,c of them"
    )
    base: str | None = flag(None, "an adapter's base, when it is no longer where its adapter.json says")
    pretrained_type: str | None = flag(
        None, "insist on this format; none: recognised", choices=("meta_ori", "consolidated", "hf", "gguf")
    )
    llama_config: list[str] = flag([], "params.json-style files; none: the checkpoint's own")
    tokenizer_path: str | None = flag(None, "tokenizer.model or tokenizer.json; none: the checkpoint's own")
    prompt: str = flag("", "one instruction")
    prompts_file: str | None = flag(None, "a text file with one instruction on each line")
    template: str | None = flag(
        None,
        "words around the instruction; checkpoint: the chat_template beside the tokenizer; none given: what the checkpoint "
        "was trained with (its template.json), else alpaca",
    )
    raw: bool = flag(False, "continue the text as it is, without the instruction template")
    max_new_tokens: int = flag(128, "most tokens of an answer")
    temperature: float = flag(0.0, "0: greedy; else sampling at this temperature")
    top_p: float = flag(1.0, "sample from the smallest set of tokens with this much probability")
    seed: int = flag(0, "of the sampling")
    batch_size: int = flag(8, "prompts answered side by side")
    model_parallel_size: int = flag(1, "ranks that share the model")
    precision: str | None = flag(None, "of weights and arithmetic; none: the checkpoint's own", choices=PRECISIONS)

    def __post_init__(self) -> None:
        if not self.pretrained_path:
            raise ValueError("--pretrained_path is missing: name a checkpoint directory")
        if bool(self.prompt) == bool(self.prompts_file):
            raise ValueError("give one of --prompt, which is not to be empty, and --prompts_file")
        try:
            self.prompt.encode()
        except UnicodeEncodeError:  # Python keeps such bytes of a command line as half characters
            raise ValueError(f"--prompt {self.prompt!a}: not UTF-8: check the terminal's encoding") from None
        if self.max_new_tokens < 1 or self.batch_size < 1 or self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                "--max_new_tokens and --batch_size are 1 or more, --temperature 0 or more, --top_p above 0 and at most 1"
            )


def main(args: GenerateArgs) -> None:
    from accessory.generation.engine import generate
    from accessory.model.pretrained import build, carried_tuning, fill, open_pretrained
    from accessory.parallel import groups
    from accessory.parallel.fsdp import DTYPES

    groups.init(args.model_parallel_size)
    checkpoint, model_args = open_pretrained(args.pretrained_path, args.pretrained_type, args.llama_config, args.base)
    path = args.tokenizer_path or checkpoint.tokenizer
    if path is None:
        inside = ", or convert it with tools/gguf_to_meta.py, which takes the one that is inside"
        gguf = inside if checkpoint.kind == "gguf" else ""
        raise ValueError(f"{args.pretrained_path} has no tokenizer beside it: name one with --tokenizer_path{gguf}")
    tokenizer = Tokenizer.open_for(path, model_args.vocab_size, args.pretrained_path)
    prompts = [args.prompt] if args.prompt else prompt_lines(args.prompts_file, "--prompts_file")
    template = None if args.raw else template_of(args, tokenizer, checkpoint.parts)
    model = build(checkpoint, model_args, carried_tuning(checkpoint))
    dtype = DTYPES[args.precision] if args.precision else checkpoint.source.dtype("tok_embeddings.weight")
    fill(model, checkpoint, lambda name: dtype, groups.device(), show_progress=groups.rank() == 0, mapped=True)
    model.eval().requires_grad_(False)
    for start in range(0, len(prompts), args.batch_size):
        some = prompts[start : start + args.batch_size]
        worded = [
            question_ids(tokenizer, t, template) if template else tokenizer.encode(t, bos=tokenizer.add_bos)
            for t in some
        ]
        answers = generate(
            model, worded, args.max_new_tokens, args.temperature, args.top_p, tokenizer.eos_ids, args.seed + start
        )
        for text, head, new in zip(some, worded, answers):
            if groups.rank() == 0:
                answer = tokenizer.decode(new, after=head).strip()
                print(
                    answer if args.prompt else json.dumps({"prompt": text, "answer": answer}, ensure_ascii=False),
                    flush=True,
                )


def template_of(args: GenerateArgs, tokenizer: Tokenizer, parts: list[Path]) -> Template:
    """--template, or the checkpoint's; rank 0 says on stderr which."""
    from accessory.parallel import groups

    file = carried.find(parts) if args.template is None else None
    template = carried.asked_with(tokenizer, args.template, "", carried.read(file) if file else None)
    origin = "--template" if args.template else file or f"by default, {args.pretrained_path} carries none"
    if groups.rank() == 0:
        print(f"template: {template.name} ({origin})", file=sys.stderr)
    return template


def entry(args: GenerateArgs) -> None:
    import torch

    from accessory.parallel import groups

    with torch.inference_mode():
        main(args)
    groups.destroy()


if __name__ == "__main__":
    config.run(entry, GenerateArgs, doc=__doc__)
