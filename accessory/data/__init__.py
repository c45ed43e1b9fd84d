"""From files to batches: records.py reads, formats.py understands, templates.py words, dialog.py tokenises and labels,
sft.py mixes, packing.py packs, loader.py orders and batches."""
