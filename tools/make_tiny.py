"""A tiny random LLaMA with everything a run needs, for trying scripts out: SMOKE=1 bash exps/finetune_7b.sh uses it.

python tools/make_tiny.py --dst DIR [--mp 2]
-> consolidated.00.pth consolidated.01.pth params.json tokenizer.model (sentencepiece) data.yaml train.jsonl val.jsonl
"""

import io
import json
from pathlib import Path

from accessory.checkpoint.formats_write import new_directory, write_meta
from accessory.config import run_tool
from accessory.model import ModelArgs, Transformer
from accessory.weights import TensorSource

PARAMS = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 32, "norm_eps": 1e-5}
VOCAB_SIZE = 320
COLOURS = {"grass": "green", "the sky": "blue", "snow": "white", "coal": "black", "a lemon": "yellow", "blood": "red"}
PHRASES = (
    "What colour is {}?",
    "Tell me the colour of {}.",
    "Name the colour that {} has.",
    "Which colour would you give {}?",
    "Colour of {}:",
)


def main(*, dst: str, mp: int = 2) -> None:
    """Writes the directory, random weights from seed 0 in fp32 in --mp shards; leaves it alone when it is already there."""
    if Path(dst).exists():
        print(f"{dst}: already there")
        return
    rows = [
        {"instruction": p.format(thing), "input": "", "output": f"It is {colour}."}
        for p in PHRASES
        for thing, colour in COLOURS.items()
    ]
    try:
        with new_directory(dst) as directory:
            for name, part in (("train", rows[: -len(COLOURS)]), ("val", rows[-len(COLOURS) :])):
                (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
            entries = [f"  - {{path: {split}.jsonl, type: text, split: {split}}}\n" for split in ("train", "val")]
            (directory / "data.yaml").write_text("META:\n" + "".join(entries))
            (directory / "tokenizer.model").write_bytes(tokenizer(rows))
            params = PARAMS | {"vocab_size": VOCAB_SIZE}
            weights = Transformer(ModelArgs.from_dict(params)).init_weights().state_dict()
            write_meta(directory, TensorSource(weights), params, shards=mp)
    except OSError:  # two runs at once: the other was first
        if not (Path(dst) / "params.json").exists():
            raise
    print(f"{dst}: {mp} shard(s) of a random model, its tokenizer and data")


def tokenizer(rows: list[dict[str, str]]) -> bytes:
    """A sentencepiece model of LLaMA's kind (BPE, byte fallback, bos 1, eos 2) trained on the rows."""
    from sentencepiece import SentencePieceTrainer

    text, model = [value for row in rows for value in row.values() if value], io.BytesIO()
    kind = {"model_type": "bpe", "vocab_size": VOCAB_SIZE, "byte_fallback": True, "hard_vocab_limit": False}
    SentencePieceTrainer.train(sentence_iterator=iter(text), model_writer=model, minloglevel=2, **kind)
    return model.getvalue()


if __name__ == "__main__":
    run_tool(main)
