"""Fine-tune a LLaMA checkpoint on instructions, from its shards, at any model-parallel size: in full, or with LoRA.

    torchrun --nproc_per_node 2 -m accessory.main_finetune --pretrained_path DIR --data_config data.yaml --output_dir out
             --model_parallel_size 2 --lora_rank 8 ...

exps/finetune_7b.sh and exps/finetune_lora_7b.sh are the usual way in; they launch it through `accessory.launch`, which is
torchrun with a quiet end. The same command again continues the run (--resume auto).
"""

import sys
from functools import partial
from typing import TYPE_CHECKING

from accessory import config, log
from accessory.data.sft import DataArgs, SFTDataset, load_sft
from accessory.flags import LoopArgs, OptimArgs, ParallelArgs, RunArgs, TuningArgs
from accessory.tokenizer import Tokenizer

if TYPE_CHECKING:  # what imports torch is imported where it is used: --help and a wrong flag need not wait for it
    from accessory.model import Transformer


def load(data: DataArgs, tokenizer: Tokenizer, seed: int) -> tuple[SFTDataset, SFTDataset | None]:
    from accessory.data import carried
    from accessory.data.preview import preview
    from accessory.parallel import groups
    from accessory.train.run import say_counts

    sets = load_sft(data, tokenizer, seed, show_progress=groups.rank() == 0)
    say_counts(
        *sets, lambda r: f"{r.truncated} cut, {r.dropped} dropped as too long, {r.unlabelled} with nothing to learn"
    )
    log.say(carried.line(sets[0].template), groups.rank())
    if data.preview:
        if groups.rank() == 0:
            print(preview(sets[0], tokenizer, data.preview, colour=sys.stdout.isatty()))
        groups.destroy()
        raise SystemExit(0)
    return sets


def answer(
    data: DataArgs, train_set: SFTDataset, model: "Transformer", tokenizer: Tokenizer, prompts: list[str], most: int
) -> list[str]:
    """Greedy answers to instructions, worded as in training. Every rank calls it."""
    from accessory.data import carried
    from accessory.data.templates import question_ids
    from accessory.generation.engine import generate

    template = carried.asked_with(tokenizer, data.template, data.template_date or "", train_set.template)
    ids = [question_ids(tokenizer, p, template) for p in prompts]
    answers = generate(model, ids, most, eos_ids=tokenizer.eos_ids)
    return [tokenizer.decode(new, after=head).strip() for head, new in zip(ids, answers)]


def main(
    run: RunArgs,
    parallel: ParallelArgs,
    tuning: TuningArgs,
    data: DataArgs,
    optimizer_args: OptimArgs,
    loop_args: LoopArgs,
) -> None:
    if not run.pretrained_path:
        raise ValueError("--pretrained_path is missing: name a directory")
    from accessory.parallel import groups
    from accessory.train.run import train

    finished = train(run, parallel, tuning, data, optimizer_args, loop_args, load, partial(answer, data))
    groups.destroy()
    if not finished:
        config.leave_unfinished()


if __name__ == "__main__":
    config.run(main, RunArgs, ParallelArgs, TuningArgs, DataArgs, OptimArgs, LoopArgs, doc=__doc__)
