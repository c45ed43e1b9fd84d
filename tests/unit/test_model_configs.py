"""Every file in model_configs/ is a model that exists: it loads, and has the number of parameters that was published."""

import json
from pathlib import Path

import pytest
import torch

from accessory.model import ModelArgs, Transformer

CONFIGS = Path(__file__).parents[2] / "model_configs"
PUBLISHED = {  # file: parameters, with the tokenizer's 32000 rows where the file leaves vocab_size to the tokenizer (-1)
    "llama_7b": 6_738_415_616,
    "llama_13b": 13_015_864_320,
    "llama_30b": 32_528_943_616,
    "llama_65b": 65_285_660_672,
    "llama2_7b": 6_738_415_616,
    "llama2_13b": 13_015_864_320,
    "llama2_70b": 68_976_648_192,
    "codellama_7b": 6_738_546_688,
    "codellama_13b": 13_016_028_160,
    "codellama_34b": 33_743_970_304,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "llama3.1_8b": 8_030_261_248,
    "llama3.1_70b": 70_553_706_496,
    "llama3.2_1b": 1_235_814_400,
    "llama3.2_3b": 3_212_749_824,
    "tinyllama_1.1b": 1_100_048_384,
    "mistral_7b_v0.1": 7_241_732_096,
    "mistral_7b_v0.3": 7_248_023_552,
    "smollm2_135m": 134_515_008,
    "qwen2_0.5b": 494_032_768,
    "qwen2.5_0.5b": 494_032_768,
    "qwen2.5_1.5b": 1_543_714_304,
    "qwen2.5_3b": 3_085_938_688,
    "qwen2.5_7b": 7_615_616_512,
    "qwen3_0.6b": 596_049_920,
    "qwen3_1.7b": 1_720_574_976,
    "qwen3_4b": 4_022_468_096,
    "qwen3_8b": 8_190_735_360,
}
OVERLAYS = sorted(p.stem for p in CONFIGS.glob("*.json") if "dim" not in json.loads(p.read_text()))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_count(name):
    params = json.loads((CONFIGS / f"{name}.json").read_text())
    if params["vocab_size"] == -1:
        params["vocab_size"] = 32000
    with torch.device("meta"):  # nothing is allocated, not even a 70B's norms
        model = Transformer(ModelArgs.from_dict(params, f"{name}.json"))
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name]


def test_no_file_is_left_out():
    assert sorted(p.stem for p in CONFIGS.glob("*.json")) == sorted([*PUBLISHED, *OVERLAYS, "tiny"])


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_overlay_changes_only_its_keys(overlay):
    base = ModelArgs.from_files([CONFIGS / "llama2_7b.json"]).to_dict()
    both = ModelArgs.from_files([CONFIGS / "llama2_7b.json", CONFIGS / f"{overlay}.json"]).to_dict()
    changed = {key for key in both if both[key] != base.get(key)}
    assert changed == ({"rope_scaling"} if overlay.startswith("rope") else set())


def test_rope_scaling_of_the_families():
    factor = {
        name: (ModelArgs.from_files([CONFIGS / f"{name}.json"]).rope_scaling or {}).get("factor") for name in PUBLISHED
    }
    assert {name: value for name, value in factor.items() if value} == {
        "llama3.1_8b": 8,
        "llama3.1_70b": 8,
        "llama3.2_1b": 32,
        "llama3.2_3b": 32,
    }
