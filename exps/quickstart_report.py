"""What a quick-start run changed, read from its metrics.jsonl and samples.jsonl: `python exps/quickstart_report.py output/quickstart 30`"""

import json
import statistics
import sys
from pathlib import Path

NEXT = """
Next, your own checkpoint (Meta's consolidated.NN.pth, Hugging Face, GGUF) and data:
  pretrained_path=/path/to/llama-2-7b data_config=my_data.yaml bash exps/finetune_lora_7b.sh     (adapters)
  pretrained_path=/path/to/llama-2-7b data_config=my_data.yaml bash exps/finetune_7b.sh          (every weight)
  the variables are explained at the top of both scripts; add --dry_run true to see memory and steps first
and this model:
  {python} -m accessory.main_generate --pretrained_path {work}/merged --prompt "..."
  from accessory.model import Transformer; model = Transformer.from_pretrained("{work}/merged")"""


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def indented(answer: str) -> str:
    return answer.replace("\n", "\n" + " " * 18)


def report(work: Path, resumed_at: int) -> str:
    """The summary as text: validation loss before and after, speed, the sample answer before and after."""
    metrics, samples = read(work / "run" / "metrics.jsonl"), read(work / "run" / "samples.jsonl")
    before, *_, after = [line for line in metrics if "val_loss" in line]
    speed = statistics.median(line["tokens_per_second"] for line in metrics if "loss" in line)
    fall = 100 * (1 - after["val_loss"] / before["val_loss"])
    perplexity, accuracy = ([line[key] for line in (before, after)] for key in ("val_perplexity", "val_accuracy"))
    return "\n".join(
        [
            "",
            f"=== What {after['step']} steps changed"
            + f" (saved and resumed at step {resumed_at})" * (resumed_at < after["step"]),
            f"validation loss   {before['val_loss']:.4f} -> {after['val_loss']:.4f}   ({fall:.1f} % lower, on held-out examples)",
            f"perplexity        {perplexity[0]:.2f} -> {perplexity[1]:.2f}",
            f"token accuracy    {100 * accuracy[0]:.1f} % -> {100 * accuracy[1]:.1f} %",
            f"speed             {speed:.0f} tokens/s",
            f"asked             {samples[0]['prompt']}",
            f"before            {indented(samples[0]['answer'])}",
            f"after             {indented(samples[-1]['answer'])}",
            NEXT.format(work=work, python=sys.executable),
        ]
    )


if __name__ == "__main__":
    print(report(Path(sys.argv[1]), int(sys.argv[2])))
