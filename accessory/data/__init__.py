"""From files to batches: records.py reads, templates.py words, sft.py tokenises, loader.py orders and batches."""
