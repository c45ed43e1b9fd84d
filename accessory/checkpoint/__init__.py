"""Checkpoints on disk: formats.py opens every format, formats_write.py writes, adapter.py keeps what LoRA trained."""
