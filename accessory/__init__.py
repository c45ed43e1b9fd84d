"""Fine-tune LLaMA-family models from the checkpoint you have: pure PyTorch, tensor parallel with FSDP, LoRA built in."""

__version__ = "0.1.0"
