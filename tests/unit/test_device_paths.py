"""The bodies of tests/gpu at tiny sizes on the CPU, and what can be shown here of the paths that only a GPU takes: the varlen
kernel's two signatures (with a loop in the kernel's place), compiled layers, bf16 and fp16."""

import inspect
import threading

import pytest
import torch

from accessory.checkpoint.save import Saver
from accessory.data.loader import collate
from accessory.model import ModelArgs, Transformer, attention
from accessory.model.attention import Segments, causal_varlen
from accessory.parallel import groups
from accessory.train import plan
from accessory.train.loop import to_device
from tests.gpu import bodies, stand_in
from tests.gpu.bodies import LORA, TINY, counting, written_out

DATA = counting([9, 5, 14, 7, 11, 6, 8, 12], TINY["vocab_size"])


def looped(q, k, v, cu, longest_q, longest_k, causal):
    """The varlen kernel's result, one sequence at a time; checks what the kernel insists on."""
    assert cu.dtype == torch.int32 and longest_q == longest_k == int(cu.diff().max()) and causal
    return torch.cat(
        [written_out(q[a:b].float(), k[a:b].float(), v[a:b].float()) for a, b in zip(cu.tolist(), cu.tolist()[1:])]
    ).to(q.dtype)


def torch_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    assert query.shape == key.shape
    return looped(query, key, value, cu_seq_q, max_q, max_k, window_size == (-1, 0))


def torch_2_12(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
    seqused_k=None,
    block_table=None,
    num_splits=None,
):
    assert enable_gqa or query.shape == key.shape
    return looped(query, key, value, cu_seq_q, max_q, max_k, window_size == (-1, 0))


def test_this_torch_has_one_of_the_two_signatures() -> None:
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    known = [set(inspect.signature(f).parameters) for f in (torch_2_11, torch_2_12)]
    assert set(inspect.signature(varlen.varlen_attn).parameters) - {
        "scale",
        "seqused_k",
        "block_table",
        "num_splits",
    } in [k - {"scale", "seqused_k", "block_table", "num_splits"} for k in known]


@pytest.mark.parametrize("kernel", [torch_2_11, torch_2_12])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_packed_attention_through_a_kernel(monkeypatch, kernel, kv_heads: int) -> None:
    calls = []

    def counted(device):
        inner = causal_varlen(kernel)
        return lambda *a: calls.append(1) or inner(*a)

    monkeypatch.setattr(attention, "_varlen_kernel", counted)
    bodies.packed_attention_is_that_of_each_sequence("cpu", torch.bfloat16, 4, kv_heads, 8, [5, 1, 9], bound=2e-2)
    assert calls == [1]
    bodies.packed_attention_is_that_of_each_sequence(
        "cpu", torch.float32, 4, kv_heads, 8, [5, 1, 9], bound=1e-5
    )  # not for the kernel
    bodies.packed_attention_is_that_of_each_sequence(
        "cpu", torch.bfloat16, 4, kv_heads, 6, [5, 1, 9], bound=2e-2
    )  # nor this head dim
    assert calls == [1]


@pytest.mark.parametrize("length, calls", [(128, 0), (127, 1), (130, 1)])
def test_one_sequence_alone_takes_the_kernel_but_at_few_lengths(monkeypatch, length: int, calls: int) -> None:
    """torch would have cuDNN build a kernel for each length."""
    seen = []
    kernel = causal_varlen(torch_2_12)
    monkeypatch.setattr(attention, "_varlen_kernel", lambda device: lambda *given: seen.append(1) or kernel(*given))
    bodies.packed_attention_is_that_of_each_sequence("cpu", torch.bfloat16, 4, 2, 8, [length], bound=2e-2)
    assert len(seen) == calls
    bodies.packed_attention_is_that_of_each_sequence("cpu", torch.float32, 4, 2, 8, [length], bound=1e-5)
    assert len(seen) == calls  # not for the kernel


@pytest.mark.parametrize("grouped, kernel", [(False, torch_2_11), (True, torch_2_12)])
def test_the_plan_knows_what_a_kernel_keeps(monkeypatch, grouped: bool, kernel) -> None:
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    here = torch.device("cpu")
    assert not attention.keeps_groups(here, torch.bfloat16)  # no kernel
    monkeypatch.setattr(attention, "_varlen_kernel", lambda device: causal_varlen(kernel))
    assert attention.keeps_groups(here, torch.bfloat16) is grouped
    assert not attention.keeps_groups(here, torch.float32)  # not for the kernel
    groups.ensure()
    model = Transformer(ModelArgs.from_dict(TINY))  # 6 heads of 8 on 2
    whole, less = (plan.activations(model, 100, 2, "none", False, grouped=g) for g in (False, True))
    assert whole - less == 2 * 100 * 2 * 2 * (48 - 16)  # k and v of each layer, two bytes a number


def test_the_stand_in_wants_a_build_with_cuda(monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert stand_in.main(["-c", "pass"]) == 1
    assert "is a build without CUDA" in capsys.readouterr().err


def test_packed_attention_without_a_kernel() -> None:
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        packed = bodies.packed_attention_is_that_of_each_sequence("cpu", dtype, 4, 2, 8, [5, 1, 9], bound)
        assert packed.kernel is None


def test_a_batch_on_a_device_keeps_its_bounds_on_the_host(monkeypatch) -> None:
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: t)
    batch = collate(list(DATA[:3]))
    moved = to_device(batch, torch.device("meta"))
    assert moved.tokens.is_meta and moved.positions.is_meta and moved.labels.rows.is_meta and moved.labels.ids.is_meta
    assert not moved.labels.host_rows.is_meta
    assert (
        isinstance(moved.cu_seqlens, Segments)
        and moved.cu_seqlens.bounds == [0, 9, 14, 28]
        and moved.cu_seqlens.longest == 14
    )


def test_a_later_call_stays_on_the_device_of_an_earlier_one(monkeypatch) -> None:
    """Events are recorded on the current device: on another than the tensors' they say nothing of a copy's end."""
    groups.init(1, on="cpu")
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    groups.init(1)
    assert groups.device() == torch.device("cpu") and current == []
    try:
        groups.init(1, on="cuda:1")
        groups.init(1)
        assert groups.device() == torch.device("cuda:1") and current == [torch.device("cuda:1")] * 2
    finally:
        groups.init(1, on="cpu")


def test_the_saving_threads_stay_on_their_device(tmp_path, monkeypatch) -> None:
    run = bodies.train(tmp_path / "run", "cpu", TINY, DATA, steps=1, tuning=LORA, precision="fp32")
    names = [n for n, p in run.model.named_parameters() if p.requires_grad]
    used = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda to: used.append((str(to), threading.current_thread().name)))
    saver = Saver(tmp_path, run.model, run.optimizer, names, bodies.Nothing(), None)
    saver.start(1, run.state.to_json())
    saver.finish()
    assert used == []
    saver.device = torch.device("cuda:1")
    saver.start(2, run.state.to_json())
    saver.finish()
    saver.snapshot._make([], saver.device)
    assert used == [("cuda:1", "saving step 2"), ("cuda:1", threading.current_thread().name)]


def test_half_precision_is_that_of_transformers() -> None:
    pytest.importorskip("transformers")
    bodies.logits_and_loss_are_those_of_transformers("cpu", torch.bfloat16, 2e-2, n_kv_heads=2)
    bodies.logits_and_loss_are_those_of_transformers("cpu", torch.float32, 2e-5, n_kv_heads=2)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_layers_learn_what_eager_ones_learn(tmp_path, monkeypatch, checkpointing: bool) -> None:
    """With graphs counted: a compile that falls back to eager would pass every comparison."""
    from torch._dynamo.testing import CompileCounter

    counter, real = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda f: real(f, backend=counter))
    torch._dynamo.reset()
    flags = {"checkpointing": checkpointing, "validate": True, "sample": True}
    variants = {"eager": {}, "compiled": {"compile": True, **flags}}
    sizes = TINY | {
        "n_layers": 2 if checkpointing else 10
    }  # ten: more layers than dynamo's limit of graphs, they must share
    bodies.variants_learn_alike(
        tmp_path, "cpu", sizes, DATA, variants, {"compiled": 1e-5}, steps=8, tuning=LORA, precision="fp32", lr=2e-2
    )
    assert 4 <= counter.frame_count <= 24, counter.frame_count


def test_bf16_learns_what_fp32_learns(tmp_path) -> None:
    variants = {
        "fp32": {"precision": "fp32"},
        "bf16": {"precision": "bf16"},
        "bf16, ddp": {"precision": "bf16", "data_parallel": "ddp"},
    }
    runs = bodies.variants_learn_alike(
        tmp_path, "cpu", TINY, DATA, variants, {"bf16": 2e-2}, steps=20, dtype=torch.bfloat16
    )
    assert (runs["bf16"].losses == runs["bf16, ddp"].losses).all() and (
        runs["bf16"].losses != runs["fp32"].losses
    ).any()


def test_steps_wait_for_nothing(tmp_path) -> None:
    bodies.steps_wait_for_nothing(tmp_path, "cpu", TINY, DATA)  # what a CPU can tell is in test_targets.py


def test_fp16_scales_its_loss(tmp_path) -> None:
    bodies.fp16_scales_its_loss(tmp_path, "cpu", TINY, DATA, bound=2e-2, steps=12, tuning=LORA, lr=1e-2)


@pytest.mark.parametrize("data_parallel", ["fsdp", "ddp"])
def test_saved_state_returns(tmp_path, data_parallel: str) -> None:
    bodies.saved_state_returns(tmp_path, "cpu", TINY, DATA, tuning=LORA, precision="bf16", data_parallel=data_parallel)


def test_the_cache_changes_no_token() -> None:
    cached, plain = bodies.greedy_tokens("cpu", TINY, [[5, 6, 7, 8], [9], [10, 11]], new=6)
    assert cached == plain
