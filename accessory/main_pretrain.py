"""Pre-train a LLaMA on token stores: from a checkpoint, in full or with LoRA, or from random weights.

    python tools/build_corpus.py --src text/ --dst corpus --tokenizer_path DIR        first: text -> tokens, once
    torchrun --nproc_per_node 8 -m accessory.main_pretrain --pretrained_path DIR --corpus corpus --output_dir out ...
    ... --llama_config model_configs/llama2_7b.json --tokenizer_path tokenizer.model --corpus corpus        from scratch

exps/pretrain_7b.sh and exps/continue_lora_7b.sh are the usual way in. The same command again continues the run
(--resume auto).
"""

from typing import TYPE_CHECKING

from accessory import config
from accessory.data.blocks import Blocks, PretrainDataArgs, load_corpus
from accessory.flags import LoopArgs, OptimArgs, ParallelArgs, RunArgs, TuningArgs
from accessory.tokenizer import Tokenizer

if TYPE_CHECKING:  # what imports torch is imported where it is used: --help and a wrong flag need not wait for it
    from accessory.model import Transformer


def load(data: PretrainDataArgs, tokenizer: Tokenizer, seed: int) -> tuple[Blocks, Blocks | None]:
    from accessory.train.run import say_counts

    sets = load_corpus(data, tokenizer, seed)
    say_counts(*sets, lambda r: f"{r.documents} documents in all")
    return sets


def answer(train_set: Blocks, model: "Transformer", tokenizer: Tokenizer, prompts: list[str], most: int) -> list[str]:
    """How the prompts go on, greedily. Every rank calls it."""
    from accessory.generation.engine import generate

    ids = [tokenizer.encode(p, bos=tokenizer.add_bos) for p in prompts]
    answers = generate(model, ids, most, eos_ids=tokenizer.eos_ids)
    return [tokenizer.decode(new, after=head) for head, new in zip(ids, answers)]


def main(
    run: RunArgs,
    parallel: ParallelArgs,
    tuning: TuningArgs,
    data: PretrainDataArgs,
    optimizer_args: OptimArgs,
    loop_args: LoopArgs,
) -> None:
    from accessory.parallel import groups
    from accessory.train.run import train

    finished = train(run, parallel, tuning, data, optimizer_args, loop_args, load, answer)
    groups.destroy()
    if not finished:
        config.leave_unfinished()


if __name__ == "__main__":
    config.run(main, RunArgs, ParallelArgs, TuningArgs, PretrainDataArgs, OptimArgs, LoopArgs, doc=__doc__)
