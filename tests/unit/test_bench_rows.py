"""The benchmark's small rows: descriptions hold together, our ways compute what the others compute, bytes and curves are
counted right. Nothing is timed and no peer's environment is needed."""

import dataclasses
import itertools
import json
import re

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

from accessory.data.sft import DataArgs
from accessory.model.attention import Segments, attend
from accessory.parallel import groups
from bench import (
    ablate_layers,
    adapt_language,
    ceiling,
    convert_7b,
    growth,
    gsm8k,
    kill_saves,
    loader,
    qlora_curve,
    resume_matrix,
    rows,
    run,
    save_stall,
)
from bench.rows import loading
from bench.sides import adamw_step, grow, head, linears, load_weights, packed_attention, plain_llama, traffic
from tests.helpers import tiny_args, write_tiny_checkpoint

SMALL_ROWS = (
    "head_loss_32k_bf16",
    "head_loss_gpu_128k_frozen",
    "packed_attention",
    "packed_attention_gpu",
    "linears_gpu",
    "optimizer",
    "loading",
    "loading_gpu",
    "startup",
    "saving",
    "ranks_mp",
    "growth",
)


def test_rows_are_found_and_import_nothing_heavy():
    found = run.all_rows()
    assert set(SMALL_ROWS) <= set(found)
    for name in SMALL_ROWS:
        programs = {side.program for side in found[name].sides}
        assert all((run.ROOT / "bench" / "sides" / f"{p}.py").exists() for p in programs), programs
        assert found[name].sides[0].env == rows.OURS  # what losses are held against


SHAPE = {"vocab": 97, "dim": 16, "rows": 40, "ignored": 0.35}


@pytest.mark.parametrize("way", ["ours", "eager", "torch auto", "torch 256"])
def test_ways_of_the_head_agree(way):
    if way.startswith("torch") and not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        pytest.skip("this torch has no loss over chunks")
    hidden, weight, labels = head.inputs(SHAPE | {"dtype": "fp32"}, "cpu")
    assert 0 < int((labels == -100).sum()) < 40
    loss = head.WAYS[way](hidden, weight, labels)
    expected = F.cross_entropy(hidden @ weight.t(), labels, reduction="sum")
    wanted = torch.autograd.grad(expected, (hidden, weight))
    torch.testing.assert_close(loss, expected)
    for got, want in zip(torch.autograd.grad(loss, (hidden, weight)), wanted):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_ways_of_packed_attention_agree():
    settings = {"lengths": [3, 5, 2], "heads": 4, "kv_heads": 2, "head_dim": 8, "dtype": "fp32"}
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 10, h, 8, generator=draw) for h in (4, 2, 2))
    bounds = torch.tensor([0, *itertools.accumulate(settings["lengths"])], dtype=torch.int32)
    expected = attend(q, k, v, Segments(bounds, q.device), None)
    for way in ("ours", "block mask", "transformers", "one by one"):  # varlen and flex want a GPU
        prepare, compute = packed_attention.WAYS[way](settings, "cpu")
        torch.testing.assert_close(compute(q, k, v, prepare()), expected, msg=way)


def test_parallel_linears_on_one_rank_are_plain_ones():
    groups.ensure()
    found = {}
    for way in ("ours", "plain"):
        made = linears.layers({"way": way, "dim": 24, "ffn": 40, "dtype": "fp32"}, "cpu")
        x = torch.randn(5, 24, generator=torch.Generator().manual_seed(0), requires_grad=True)
        loss = linears.forward(made, x).square().sum()
        found[way] = (loss, *torch.autograd.grad(loss, (x, *(m.weight for m in made.values()))))
    assert len(found["ours"]) == 9 and all(torch.equal(a, b) for a, b in zip(found["ours"], found["plain"]))


def test_ways_of_loading_weights_find_the_same_numbers(tmp_path):
    args = tiny_args(tie_word_embeddings=False)
    write_tiny_checkpoint(tmp_path / "one", args, dtype=torch.bfloat16)
    loading.run("meta_to_hf", src=tmp_path / "one", dst=tmp_path / "hf")
    found = []
    for way in ("ours_one", "ours_hf", "safetensors", "transformers"):
        loaded = load_weights.WAYS[way]({"one": tmp_path / "one", "hf": tmp_path / "hf"}, "cpu")()
        names = next(pair for pair in load_weights.COMPARED if pair[0] in loaded)
        found.append([loaded[name].detach() for name in names])
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


def test_ways_of_the_optimizer_step_agree():
    settings = {"small": 5, "small_size": 7, "large": 2, "large_size": 200_000, "clip": 1.0}
    found = {}
    for way in ("ours", "ours_sharded", "fused_clip", "default_clip"):
        parameters = adamw_step.parameters(settings, "cpu")
        gradients = adamw_step.gradients(parameters)
        step, parameters = adamw_step.WAYS[way](settings, parameters, gradients)
        step()  # Adam hides a factor that all steps have: the first is clipped, the second is not
        for gradient in gradients:
            gradient.fill_(1e-3)
        step()
        found[way] = [p.detach().to_local() if hasattr(p, "to_local") else p.detach() for p in parameters]
    for way, values in found.items():
        for got, want in zip(values, found["default_clip"]):
            torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6, msg=way)


def test_plain_llama_is_ours():
    from accessory.model import Transformer

    args = tiny_args(tie_word_embeddings=False)
    ours = Transformer(args).init_weights()
    theirs = plain_llama.Llama(
        {k: getattr(args, k) for k in ("dim", "n_layers", "n_heads", "vocab_size", "norm_eps", "rope_theta")}
        | {"n_kv_heads": args.kv_heads, "hidden_dim": args.ffn_dim}
    )
    theirs.load_state_dict(ours.state_dict())
    tokens = torch.arange(12).view(2, 6)
    torch.testing.assert_close(theirs(tokens), ours(tokens), atol=1e-5, rtol=1e-5)


def test_traffic_counts_messages_and_what_a_ring_sends():
    groups.ensure()
    with traffic.Traffic(4) as sent:  # as if four ranks took part
        dist.all_reduce(torch.zeros(10))
        dist.all_gather_into_tensor(torch.zeros(8), torch.zeros(8))
        dist.barrier()
    assert sent.calls == {"reduce": [1, 40], "gather": [1, 32]}
    assert sent.wire == 40 * 2 * 3 / 4 + 32 * 3 / 4


def test_flops_of_a_token():
    from accessory.model import Transformer

    args = tiny_args(tie_word_embeddings=False)
    model = Transformer(args)
    layer = 2 * args.dim**2 + 2 * args.dim * args.kv_heads * args.head_size + 3 * args.dim * args.ffn_dim
    products = args.n_layers * layer + args.dim * args.vocab_size
    attention = 2 * 64 * args.dim * args.n_layers
    assert grow.flops(model, 64, full=True) == 6 * products + 3 * attention
    assert grow.flops(model, 64, full=False) == 4 * products + 3 * attention


def result_of(sides: list[dict], rounds: list[dict]) -> dict:
    return {"sides": sides, "rounds": rounds, "clock": "cpu_seconds", "limits": {"fp32_gflops": 100.0}}


def test_curves_take_medians_and_leave_failures_out(tmp_path, monkeypatch, capsys):
    def printed(seconds: float) -> dict:
        more = {"extra_mb": 50.0, "formula_mb": 40.0, "mflops": 1.0}
        return {"tokens": 100, "cpu_seconds": [seconds], "peak_mb": 1.0, "more": more}

    sides = [{"name": n, "settings": {"curve": "length", "x": x, "length": x}} for n, x in (("a", 256), ("b", 512))]
    sides.append({"name": "c", "settings": {"curve": "mp", "x": 4, "length": 25}})
    ranks = printed(2.0) | {"more": {"sent_mb": 3.0, "formula_mb": 2.0}}  # of one rank of four, for 100 tokens
    rounds = [{"a": printed(s), "b": {"error": "no"}, "c": ranks} for s in (1.0, 2.0, 50.0)]
    curves = growth.points(result_of(sides, rounds))
    assert [p["x"] for p in curves["length"]] == [256] and curves["length"][0]["speed"] == 50.0
    path = tmp_path / "growth.json"
    path.write_text(json.dumps(result_of(sides, rounds)))
    monkeypatch.setattr("sys.argv", ["growth", str(path)])
    growth.main()
    told = capsys.readouterr().out
    assert "| 256 | 50 | 0% | 50 | 40 | 1.25 |" in told and "| 4 | 25 | 50 | 120,000 | 80,000 | 1.5000 |" in told


def test_the_loaders_benchmark_reads_its_own_store(capsys):
    """Blocks want to know of a store what build_corpus writes into it."""
    loader.main(tokens=20_000, block_size=128, tokens_per_step=512, document=50)
    assert "million tokens/s" in (told := capsys.readouterr().out) and "ms a step of 4 x 128" in told
    with pytest.raises(ValueError, match="--tokens 512: one step's"):
        loader.main(tokens=512, block_size=128, tokens_per_step=512, document=50)


@pytest.mark.parametrize("program", [kill_saves, qlora_curve, resume_matrix, save_stall, ceiling, growth, run])
def test_help_says_what_a_program_measures_and_runs_nothing(program, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [program.__name__, "--help"])
    with pytest.raises(SystemExit) as ended:
        program.main()
    assert ended.value.code == 0 and program.__doc__.splitlines()[0] in capsys.readouterr().out


@pytest.mark.parametrize(
    "program, words, said",
    [(qlora_curve, "--pretrained_path x --data /nosuch", "--data /nosuch: no such file"), (kill_saves, "--kills 0", "--kills 0: 1 or more"), (ceiling, "sft --beside hf", "--beside hf: no such side; there are ours-bf16,"),
     (ceiling, "sft --rounds 0", "--rounds 0: it must be 1 or more"), (growth, "/nosuch.json", "/nosuch.json: No such file"),
     (growth, str(run.ROOT / "bench" / "results" / "sft-cpu-1.json"), "sft-cpu-1.json: no result of the row growth")],
)  # fmt: skip
def test_a_wrong_word_is_told_in_a_line(program, words, said, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [program.__name__, *words.split()])
    with pytest.raises(SystemExit) as ended:
        program.main()
    assert ended.value.code == 2 and said in capsys.readouterr().err.splitlines()[-1]


def test_an_ablation_that_there_is_not_is_told_before_any(capsys):
    for flags in ({"only": "nosuch"}, {"precision": "fp8"}):
        with pytest.raises(ValueError, match=f"--{next(iter(flags))} "):
            ablate_layers.main(**flags)
    assert not capsys.readouterr().out


QUOTED = re.compile(r"`python (?:-m bench\.|bench/)(\w+)(?:\.py)?( [^`]*)?`")


def test_commands_that_the_documents_quote_have_the_flags_that_their_programs_want():
    """Words after `, the rest as above` are those of the command before it."""
    found = 0
    for page in ("benchmarks.md", "checkpoints.md", "data.md", "parallelism.md"):
        text = (run.ROOT / "docs" / page).read_text(encoding="utf-8")
        for command in QUOTED.finditer(text):
            source = (run.ROOT / "bench" / f"{command[1]}.py").read_text(encoding="utf-8")
            given = set(re.findall(r"--(\w+)", command[2] or ""))
            taken = set(re.findall(r'add_argument\(\s*"--(\w+)"', source)) | set(
                re.findall(r"^    (\w+): ", source, re.M)
            )
            wanted = set(re.findall(r'add_argument\(\s*"--(\w+)", [^)]*required=True', source))
            if main := re.search(r"^def main\(\s*\*,(.*?)\) -> None", source, re.M | re.S):
                words = [word.strip() for word in main[1].split(",") if word.strip()]
                taken |= {word.partition(":")[0] for word in words}
                wanted |= {word.partition(":")[0] for word in words if "=" not in word}
            if command[1] == "packing":
                taken, wanted = (
                    taken | {f.name for f in dataclasses.fields(DataArgs)},
                    {"data_config", "tokenizer_path"},
                )
            assert given <= taken, (page, command[0], given - taken)
            above = text[command.end() :].startswith(", the rest as above")
            assert above or wanted <= given, (page, command[0], wanted - given)
            found += 1
    assert found > 20


def test_converting_deletes_only_what_it_wrote(tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "model.safetensors").write_text("somebody's")
    with pytest.raises(ValueError, match="hf is there already and would be deleted"):
        convert_7b.main(work=str(tmp_path), llama_config="model_configs/tiny.json")
    assert (tmp_path / "hf" / "model.safetensors").read_text() == "somebody's"


def test_wrong_words_leave_no_directory_that_would_be_in_the_way(tmp_path):
    (tmp_path / "english.txt").write_text("a" * 300)
    (tmp_path / "poet.tang.0.json").write_text(json.dumps([{"paragraphs": ["a"]}] * 20, indent=1))
    usual = {"pretrained_path": "x", "poems": str(tmp_path), "english": str(tmp_path / "english.txt")}
    for wrong in ({"poems": "/nosuch"}, {"english": str(tmp_path / "poet.tang.0.json")}, {"seeds": 0}):
        with pytest.raises(ValueError, match=f"--{next(iter(wrong))} "):
            adapt_language.main(**usual | {"work": str(tmp_path / "work")} | wrong)
        assert not (tmp_path / "work").exists()
    with pytest.raises(ValueError, match="--seeds 0: 1 or more"):
        gsm8k.main(part="learn", pretrained_path="x", gsm8k="y", seeds=0)
