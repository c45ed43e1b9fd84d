"""TRL's SFTTrainer as it is, on examples packed by TRL itself (best fit decreasing, padding-free).

Each optimizer step packs the same examples as ours, so that losses can be compared; on full packs of other examples a step would
cost the same a token. Timed from step to step by a callback. Settings: mode autocast, bf16 or fp32; compile.
"""

import tempfile

import torch
from datasets import Dataset, concatenate_datasets
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import SFTConfig, SFTTrainer, pack_dataset

from bench import measure
from bench.sides import batches

CAPACITY = 8192  # no window is longer: each becomes one row


def packed(data: dict) -> Dataset:
    """One row a window: input_ids, labels, seq_lengths."""
    made = []
    for window in batches.windows(data):
        labels = [[batches.IGNORED] * prompt + ids[prompt:].tolist() for ids, prompt in window]
        rows = Dataset.from_dict({"input_ids": [ids.tolist() for ids, _ in window], "labels": labels})
        made.append(pack_dataset(rows, CAPACITY, "bfd"))
        assert len(made[-1]) == 1, len(made[-1])
    return concatenate_datasets(made)


class Timer(TrainerCallback):
    def __init__(self, data: dict, device: str):
        self.laps, self.device, self.peak, self.steps = measure.Laps(device), device, 0.0, 0
        self.first, self.per_unit = data["warmup"] * data["windows_per_unit"], data["windows_per_unit"]

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if self.steps == self.first:
            measure.reset_peak(self.device)
        if self.steps >= self.first and (self.steps - self.first) % self.per_unit == 0:
            self.laps.lap()
            self.peak = measure.peak_mb(self.device)
        self.steps += 1


def main() -> None:
    work = measure.begin()
    data, settings, device = work["data"], work["settings"], work["device"]
    half = settings["mode"] == "bf16"
    model = AutoModelForCausalLM.from_pretrained(
        data["models"]["fp32"], dtype=torch.bfloat16 if half else torch.float32, attn_implementation="sdpa"
    )
    words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")
    timer = Timer(data, device)
    with tempfile.TemporaryDirectory() as directory:
        config = SFTConfig(
            output_dir=directory, use_cpu=device == "cpu", bf16=settings["mode"] == "autocast", fp16=False, per_device_train_batch_size=1,
            gradient_checkpointing=False, max_length=None, padding_free=True, learning_rate=data["lr"],
            lr_scheduler_type="constant", warmup_steps=0, optim="adamw_torch_fused", adam_beta1=0.9, adam_beta2=0.95,
            weight_decay=0.0, max_grad_norm=1.0, logging_steps=1, report_to="none", save_strategy="no",
            max_steps=(data["warmup"] + data["units"]) * data["windows_per_unit"] + 1, disable_tqdm=True,
            train_sampling_strategy="sequential", dataset_kwargs={"skip_prepare_dataset": True},
            torch_compile=settings.get("compile", False),
        )  # fmt: skip
        trainer = SFTTrainer(
            model=model, args=config, train_dataset=packed(data), processing_class=tokenizer, callbacks=[timer]
        )
        trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    measure.report(
        loss=losses[: data["losses"]],
        tokens=batches.tokens_per_unit(data),
        seconds=timer.laps.seconds,
        cpu_seconds=timer.laps.cpu,
        peak_mb=timer.peak,
    )


if __name__ == "__main__":
    main()
