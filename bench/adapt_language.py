"""Does exps/adapt_language.sh teach a language? SmolLM2-135M and Tang poems, three seeds, against held-out text.

    python bench/adapt_language.py --pretrained_path output/quickstart/smollm2-135m --poems DIR --english FILE [--steps 20]

    poems, every tenth held out -> exps/adapt_language.sh -> perplexity per character of the held-out poems, and of English

Perplexity per character, exp(summed loss / characters), compares models with different tokenizers; each text stands behind
one EOS, so that every token of it is predicted. Tokenizer, larger model and corpus are made once, the training for each seed.
The poems are chinese-poetry's JSON (records with `paragraphs`).
"""

import json
import math
import os
import shutil
import subprocess
from pathlib import Path

import torch

from accessory.config import run_tool
from accessory.model import Transformer
from accessory.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
HELD_OUT, SCORED = 10, 50  # every tenth poem; so many of them are scored
TOKENS = 2048  # scored at a time
EXPECTED = 0.05  # least fall of the held-out perplexity per character, worst seed: written down before the first run


def main(
    *, pretrained_path: str, poems: str, english: str, work: str = "output/adapt_bench", steps: int = 20, seeds: int = 3
) -> None:
    """Prints a table and leaves it as DIR/result.json. Some minutes a seed on two cores. --work must not exist."""
    place = Path(work)
    texts = [
        "".join(p["paragraphs"])
        for f in sorted(Path(poems).glob("poet.tang.*.json"))
        for p in json.loads(f.read_text())
    ]
    texts = [text for text in texts if text]
    held_out, train = texts[::HELD_OUT][:SCORED], [t for i, t in enumerate(texts) if i % HELD_OUT]
    paragraphs = [line.strip() for line in Path(english).read_text().splitlines() if len(line) > 200][:8]
    if not train:
        raise ValueError(f"--poems {poems}: no poet.tang.*.json with paragraphs there")
    if not paragraphs:
        raise ValueError(f"--english {english}: no line of more than 200 characters")
    if seeds < 1:
        raise ValueError(f"--seeds {seeds}: 1 or more")
    place.mkdir(parents=True)
    (place / "poems.jsonl").write_text("".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in train))
    rows = [("base", *score_all(pretrained_path, held_out, paragraphs))]
    for seed in range(seeds):
        run = place / f"seed{seed}"
        if seed:
            run.mkdir()
            for name in ("tokenizer", "expanded", "corpus"):
                (run / name).symlink_to((place / "seed0" / name).resolve())
        variables = {"pretrained_path": pretrained_path, "text": place / "poems.jsonl", "work": run, "new_tokens": 3000}
        variables |= {
            "block_size": 128,
            "val_ratio": 0.002,
            "precision": "fp32",
            "checkpointing": "false",
            "seed": seed,
        }
        variables |= {"batch_size": 8, "global_batch_size": 8, "max_steps": steps, "lr": 1e-3, "eval_steps": steps}
        subprocess.run(
            ["bash", "exps/adapt_language.sh"],
            cwd=ROOT,
            check=True,
            env=os.environ | {k: str(v) for k, v in variables.items()},
        )
        if seed == 0:
            rows.append(("larger vocabulary, not trained", *score_all(run / "expanded", held_out, paragraphs)))
        rows.append((f"adapted, seed {seed}", *score_all(run / "merged", held_out, paragraphs)))
        for name in ("run", "merged", "hf"):
            shutil.rmtree(run / name)
    print(f"\n{'':32} {'poems: tokens/char':>20} {'perplexity/char':>16} {'English: perplexity/char':>26}")
    for name, *numbers in rows:
        print(f"{name:32} {numbers[0]:20.3f} {numbers[1]:16.3f} {numbers[2]:26.4f}")
    worst = max(row[2] for row in rows if row[0].startswith("adapted"))
    fall = 1 - worst / rows[0][2]
    print(f"worst seed: {fall:.1%} lower than the base's (expected before the run: at least {EXPECTED:.0%})")
    (place / "result.json").write_text(json.dumps({"rows": rows, "fall_of_the_worst_seed": fall}, indent=1))


def score_all(path: str | Path, chinese: list[str], english: list[str]) -> tuple[float, float, float]:
    """(tokens a character, perplexity a character) of the Chinese texts, perplexity a character of the English ones."""
    model, tokenizer = Transformer.from_pretrained(path, dtype=torch.float32), Tokenizer.open(path)
    tokens, nll, characters = score(model, tokenizer, chinese)
    _, other, letters = score(model, tokenizer, english)
    return tokens / characters, math.exp(nll / characters), math.exp(other / letters)


@torch.no_grad()
def score(model: Transformer, tokenizer: Tokenizer, texts: list[str]) -> tuple[int, float, int]:
    """(tokens, summed loss, characters)."""
    rows, nll, count, characters = [], 0.0, 0, sum(map(len, texts))
    for text in [*texts, None]:
        if text is not None:
            rows.append([tokenizer.eos_id, *tokenizer.encode(text)])
            count += len(rows[-1]) - 1
        if rows and (text is None or sum(map(len, rows)) > TOKENS):
            ids = torch.tensor([[i for row in rows for i in row]])
            bounds = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0).int()
            loss, targets, _ = model(ids, labels=ids, cu_seqlens=bounds)
            assert int(targets) == ids.shape[1] - len(rows)  # all but each row's EOS
            nll, rows = nll + loss.item(), []
    return count, nll, characters


if __name__ == "__main__":
    run_tool(main)
