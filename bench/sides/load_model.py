"""From files to the first logits, in one of several ways; a process loads once. Imports are not counted (more.import_s), the
files are in the page cache, where whoever wrote or read them last left them.

settings: way (WAYS). data: meta (directory of consolidated.*.pth and params.json), one (the same in one file), hf (as safetensors), tokens.
"peak_mb" is the resident set, in which pages of mapped files count too; more.anonymous_mb is the most of RssAnon, looked at
every few milliseconds: what the program itself holds, and the machine cannot take back.
"""

import json
import threading
import time
from pathlib import Path

import torch

from bench import measure

STATUS = Path("/proc/self/status")


class Anonymous:
    """The most of RssAnon while the block runs, in MB."""

    def __enter__(self) -> "Anonymous":
        self.most, self.done = 0.0, threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()

    def _watch(self) -> None:
        while not self.done.wait(0.005):
            line = next(x for x in STATUS.read_text().splitlines() if x.startswith("RssAnon:"))
            self.most = max(self.most, int(line.split()[1]) * 1024 / 1e6)


def ours(data: dict, device: str, files: str = "meta"):
    from accessory.model import Transformer

    return lambda tokens: Transformer.from_pretrained(data[files], device=device)(tokens)


def plain(data: dict, device: str, mapped: bool = False):
    """torch.load of every shard, put together, load_state_dict: what a script without a library does. Mapped: what it
    can do at best, one copy of each weight into memory of its own, which the model computes with."""
    from bench.sides.plain_llama import Llama

    def run(tokens: torch.Tensor) -> torch.Tensor:
        files = sorted(Path(data["meta"]).glob("consolidated.*.pth"))
        shards = [torch.load(f, map_location="cpu", weights_only=True, mmap=mapped) for f in files]
        whole = {n: _joined(n, [s[n] for s in shards]) for n in shards[0] if n != "rope.freqs"}
        del shards
        with torch.device("meta" if mapped else "cpu"):
            model = Llama(json.loads((Path(data["meta"]) / "params.json").read_text())).to(torch.bfloat16)
        model.load_state_dict(whole, assign=mapped)
        return model.to(device)(tokens)

    return run


def _joined(name: str, parts: list[torch.Tensor]) -> torch.Tensor:
    if "norm" in name:
        return parts[0]
    return torch.cat(parts, dim=1 if name.split(".")[-2] in ("wo", "w2") else 0)


def transformers(data: dict, device: str):
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM._model_mapping.keys()
    import transformers.models.llama.modeling_llama  # noqa: F401  an import, not loading

    return lambda tokens: (
        AutoModelForCausalLM.from_pretrained(data["hf"], dtype=torch.bfloat16).to(device)(tokens).logits
    )


WAYS = {
    "ours": ours,
    "ours_one": lambda data, device: ours(data, device, "one"),
    "ours_hf": lambda data, device: ours(data, device, "hf"),
    "plain_torch": plain,
    "plain_mapped": lambda data, device: plain(data, device, mapped=True),
    "transformers": transformers,
}


def main() -> None:
    start = time.perf_counter()
    work = measure.begin()
    data, device = work["data"], work["device"]
    run = WAYS[work["settings"]["way"]](data, device)
    imported, found, tokens = time.perf_counter() - start, [], torch.tensor([data["tokens"]], device=device)

    def unit() -> None:
        with torch.no_grad():
            found.append(run(tokens))

    before = measure.now_mb(device)
    with Anonymous() as memory:
        timed = measure.timed(unit, 0, 1, device)
    logits = found[0].float()
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:])
    more = {"anonymous_mb": memory.most, "import_s": imported, "before_mb": before}
    measure.report(loss=[loss], tokens=data["parameters"], **timed, more=more)


if __name__ == "__main__":
    main()
