"""What a checkpoint of all weights and moments costs the training: 100 M parameters in fp32, 1.2 GB. Program:
bench/sides/save_state.py; bench/save_stall.py shows the optimizer steps that are done meanwhile.

Judged by wall time whatever --threads says: the CPU time of a thread that waits for a disk is not what training waits
(`more.stall_s`)."""

from bench.rows import OURS, Goal, Row, Side

SIZES = {"dim": 768, "n_layers": 8, "n_heads": 12, "n_kv_heads": 12, "hidden_dim": 3072, "vocab_size": 16000}


def prepare(directory, device: str) -> dict:
    from bench import workload

    return {"model": workload.model(directory, SIZES, device)["fp32"], "directory": str(directory)}


WAYS = ("ours", "torch_save", "torch_save_fsync", "dcp", "dcp_async")
ROW = Row(
    "saving",
    "training stands still for a checkpoint of 100 M parameters and their moments, 1.2 GB (tokens: parameters)",
    [Side(way, OURS, "save_state", {"way": way, "units": 2}) for way in WAYS],
    [
        Goal("torch_save", "stall_s", at_most=0.1),
        Goal("torch_save_fsync", "stall_s", at_most=0.1),
        Goal("torch_save", "first_s", at_most=0.1),
        Goal("dcp_async", "stall_s", at_most=1.0),
    ],
    prepare,
)
