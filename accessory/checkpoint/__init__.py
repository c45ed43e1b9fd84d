"""Checkpoints on disk: `open_checkpoint` reads every format, formats_write.py writes them, adapter.py keeps what LoRA trained."""
