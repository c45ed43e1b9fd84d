"""PEFT's adapter_config.json <-> the terms of our adapter.json. The tensors are in weights/peft.py.

Which weights have an adapter is told by the tensors; adapter_config.json says rank and scale, and must agree. Every field
that PEFT has written from 0.3 to 0.21 is known: what changes nothing is passed over, what would be computed differently is
refused by name. Test: tests/unit/test_peft.py (against peft itself).
"""

import re
from typing import Any

from accessory.model.args import ModelArgs
from accessory.model.lora import LINEARS, TuningArgs, folded, linear_of
from accessory.weights import expected_shapes, hf, is_lora

ENDS = ("tok_embeddings", "output")  # the two that our models have no adapters on
READ = """alpha_pattern base_model_name_or_path bias ensure_weight_tying exclude_modules init_lora_weights layers_pattern
layers_to_transform lora_alpha lora_dropout modules_to_save peft_type r rank_pattern target_modules task_type use_rslora""".split()
HARMLESS = """auto_mapping base_model_class corda_config eva_config inference_mode loftq_config lora_ga_config megatron_core
merge_weights peft_version qalora_group_size revision runtime_config unsloth_fixed velora_config""".split()
NONE = type(None)
TYPES: dict[str, Any] = {
    **dict.fromkeys(("target_modules", "exclude_modules", "layers_pattern"), (str, list, NONE)),
    **dict.fromkeys(("rank_pattern", "alpha_pattern"), (dict, NONE)),
    **{"modules_to_save": (list, NONE), "lora_dropout": (int, float, NONE), "layers_to_transform": (int, list, NONE)},
    "base_model_name_or_path": (str, NONE),
}
PLAIN_STARTS = "true false gaussian eva orthogonal mica".split()  # init_lora_weights that leave the base as it is


def check_config(config: dict[str, Any], where: object) -> None:
    """Raises ValueError naming `where`, key and value for what this library would compute differently."""
    if (kind := config.get("peft_type")) != "LORA":
        raise ValueError(f"{where}: peft_type {kind!r}: only LORA adapters are read")
    if (task := config.get("task_type")) not in (None, "CAUSAL_LM"):
        raise ValueError(f"{where}: task_type {task!r}: only CAUSAL_LM is read")
    for key in ("r", "lora_alpha"):
        if isinstance(config.get(key), bool) or not isinstance(config.get(key), (int, float)) or config[key] <= 0:
            raise ValueError(f"{where}: {key} {config.get(key)!r}: expected a number above 0")
    for key, types in TYPES.items():
        if not isinstance(value := config.get(key), types):
            raise ValueError(f"{where}: {key} {value!r} is not what peft writes there: copy the file again")
    for pattern in _regexes(config):
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{where}: {pattern!r} is no regular expression ({error}): copy the file again") from None
    if str(start := config.get("init_lora_weights", True)).lower() not in PLAIN_STARTS:
        raise ValueError(
            f"{where}: init_lora_weights {start!r} changed the base's weights as well: save the adapter in peft with "
            "path_initial_model_for_weight_conversion, which makes a plain LoRA of it"
        )
    for key, value in config.items():
        if key not in READ + HARMLESS and value not in (None, False, 0, "", [], {}):
            raise ValueError(
                f"{where}: {key} {value!r} is not supported: merge the adapter into its base with peft; if you know that it "
                "changes nothing in the model, remove it from the file"
            )


def _regexes(config: dict[str, Any]) -> list[str]:
    layers, saved = config.get("layers_pattern") or [], config.get("modules_to_save") or []
    both = [v for k in ("target_modules", "exclude_modules") if isinstance(v := config.get(k), str)]
    patterns = [*(config.get("rank_pattern") or ()), *(config.get("alpha_pattern") or ())]
    return [str(p) for p in [*both, *patterns, *saved, *([layers] if isinstance(layers, str) else layers)]]


def is_targeted(config: dict[str, Any], module: str) -> bool:
    """Whether PEFT puts an adapter on this module (`model.layers.0.self_attn.q_proj`): its rule, from tuners_utils.py."""
    if _named(config.get("exclude_modules"), module):
        return False
    if any(re.match(rf"(^|.*\.){m}($|\..*)", module) for m in config.get("modules_to_save") or ()):
        return False
    targets = config.get("target_modules")
    if targets == "all-linear":
        return module not in ("model.embed_tokens", "lm_head")
    if not _named(targets, module):
        return False
    layers, pattern = config.get("layers_to_transform"), config.get("layers_pattern") or r"[^.]*"
    if isinstance(targets, str) or layers is None or layers == []:
        return True
    for each in [pattern] if isinstance(pattern, str) else pattern:
        if match := re.match(rf"(?:^|.*?\.){each}\.(\d+)\.", module):
            return int(match[1]) in ([layers] if isinstance(layers, int) else layers)
    return False


def _named(targets: str | list[str] | None, module: str) -> bool:
    if isinstance(targets, str):
        return bool(re.fullmatch(targets, module))
    return any(module == t or module.endswith(f".{t}") for t in targets or ())


def _by_regex(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's rank_pattern and alpha_pattern: the first regular expression that matches the end of the module's name."""
    return next((v for p, v in (patterns or {}).items() if re.match(rf"(.*\.)?({p})$", module)), default)


def terms_from_config(
    config: dict[str, Any], ranks: dict[str, int], full: list[str], layers: int, where: object = "adapter_config.json"
) -> dict[str, Any]:
    """adapter.json's terms, without its base. `ranks`: {linear (Meta's name): rank} of the adapters in the file; `full`: its
    other weights and biases. Raises ValueError when the file and the config contradict each other."""
    for linear, rank in ranks.items():
        if rank != (said := _by_regex(config.get("rank_pattern"), hf_module(linear), config["r"])):
            raise ValueError(
                f"{where}: r is {said} for {hf_module(linear)}, but its lora_A in the file has rank {rank}"
            )
    default = float(config["lora_alpha"])
    alphas = {n: float(_by_regex(config.get("alpha_pattern"), hf_module(n), default)) for n in ranks}
    kinds = [k for k in (*LINEARS, *ENDS) if any(n.rsplit(".", 1)[-1] == k for n in ranks)]
    every = [n for i in range(layers) for n in linears_of_layer(i) if n.rsplit(".", 1)[-1] in kinds]
    every += [n for n in ranks if n in ENDS]
    return {
        "lora_rank": int(config["r"]) if ranks else 0,
        "lora_alpha": default,
        "lora_dropout": float(config.get("lora_dropout") or 0.0),
        "lora_targets": kinds,
        "use_rslora": bool(config.get("use_rslora")),
        "rank_pattern": folded({n: ranks.get(n, 0) for n in every}, int(config["r"])),
        "alpha_pattern": folded(alphas, default),
        **full_terms(full, layers),
    }


def linears_of_layer(layer: int) -> list[str]:
    return [f"layers.{layer}.{'attention' if k in ('wq', 'wk', 'wv', 'wo') else 'feed_forward'}.{k}" for k in LINEARS]


def full_terms(full: list[str], layers: int) -> dict[str, Any]:
    """What is trained in full as our flags say it: all norms, all seven biases, and modules_to_save for the rest."""
    names = set(full)
    norms = {"norm.weight"} | {f"layers.{i}.{n}.weight" for i in range(layers) for n in ("attention_norm", "ffn_norm")}
    norms |= {n for n in names if re.search(r"\.[qk]_norm\.weight$", n)}
    biases = {f"{n}.bias" for i in range(layers) for n in linears_of_layer(i)}
    rest = names - (norms if norms <= names else set()) - (biases if biases <= names else set())
    kinds: dict[str, list[str]] = {}
    for name in sorted(rest):
        kinds.setdefault(re.sub(r"^layers\.\d+\.(\w+\.)?(?=\w+\.(weight|bias)$)", "", name), []).append(name)
    saved = [s for k, v in kinds.items() for s in ([k] if len(v) == layers or v == [k] else v)]
    return {
        "modules_to_save": [s.removesuffix(".weight") if s.split(".")[0] in (*ENDS, "norm") else s for s in saved],
        "bias_tuning": biases <= names,
        "norm_tuning": norms <= names,
    }


def config_from_terms(terms: dict[str, Any], args: ModelArgs, names: list[str], base: str | None) -> dict[str, Any]:
    """adapter_config.json for an adapter with these tensors (Meta's names) over a base of `args`: the fields that every PEFT
    knows, and newer ones only where they say something. Raises ValueError for what PEFT has no place for."""
    tuning = TuningArgs.from_terms(terms)
    lora = sorted({linear_of(n) for n in names if is_lora(n)})
    if not lora:
        raise ValueError("PEFT has no adapters without LoRA: merge this one with tools/merge_lora.py --format hf")
    full = sorted(n for n in names if not is_lora(n))
    _check_export(lora, full, args)
    weights = {linear_of(n) for n in full if n.endswith(".weight")}
    one = bool(args.tie_word_embeddings) and "tok_embeddings" in weights and "output" not in weights  # and stays one
    weights |= {"output"} if one else set()
    scales = {n: tuning.alpha_of(n) for n in lora}
    config = {
        "base_model_name_or_path": base,
        "bias": "all" if any(n.endswith(".bias") for n in full) else "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": _whole(tuning.alpha),
        "lora_dropout": tuning.lora_dropout,
        "modules_to_save": _short(sorted(weights), args.n_layers) or None,
        "peft_type": "LORA",
        "r": tuning.lora_rank,
        "target_modules": _short(lora, args.n_layers),
        "task_type": "CAUSAL_LM",
    }
    extra = {
        "use_rslora": tuning.use_rslora,
        "rank_pattern": _patterns({n: tuning.rank_of(n) for n in lora}, tuning.lora_rank),
        "alpha_pattern": _patterns({n: _whole(a) for n, a in scales.items()}, _whole(tuning.alpha)),
        "ensure_weight_tying": one,
    }
    return dict(sorted((config | {k: v for k, v in extra.items() if v}).items()))


def _check_export(lora: list[str], full: list[str], args: ModelArgs) -> None:
    own = {n for n in expected_shapes(args, bool(args.tie_word_embeddings)) if n.endswith(".bias")}
    if new := [n for n in full if n.endswith(".bias") and n not in own]:
        raise ValueError(
            f"{new[0]} ({len(new)} such): PEFT has no place for biases that the base does not have: merge the adapter with "
            "tools/merge_lora.py --format hf"
        )
    weights = [linear_of(n) for n in full if n.endswith(".weight")]
    if both := sorted(set(lora) & set(weights)):
        raise ValueError(
            f"{both[0]} has a LoRA and is trained in full, which PEFT cannot: merge it with tools/merge_lora.py"
        )
    if half := [n for n in weights if f"{n}.bias" in own - set(full)]:
        raise ValueError(
            f"{half[0]}.weight is trained without its bias, which PEFT cannot: merge it with tools/merge_lora.py"
        )


def hf_module(linear: str) -> str:
    """layers.3.attention.wq -> model.layers.3.self_attn.q_proj"""
    name = hf.hf_name(f"{linear}.weight")
    assert name is not None, linear
    return name.removesuffix(".weight")


def _short(linears: list[str], layers: int) -> list[str]:
    """Modules as PEFT's lists name them: q_proj where every layer has it, else each by its full name."""
    kinds: dict[str, list[str]] = {}
    for module in map(hf_module, linears):
        kinds.setdefault("model.norm" if module == "model.norm" else module.rsplit(".", 1)[-1], []).append(module)
    once = ("embed_tokens", "lm_head", "model.norm")
    return sorted(s for k, v in kinds.items() for s in ([k] if k in once or len(v) == layers else v))


def _patterns(values: dict[str, Any], default: Any) -> dict[str, Any]:
    """{linear: value} as a PEFT pattern that no order of its keys can change: a kind where all of it agree, else full names."""
    kinds: dict[str, dict[str, Any]] = {}
    for module, value in ((hf_module(n), v) for n, v in values.items()):
        kinds.setdefault(module.rsplit(".", 1)[-1], {})[module] = value
    patterns: dict[str, Any] = {}
    for kind, mine in kinds.items():
        patterns |= {kind: next(iter(mine.values()))} if len(set(mine.values())) == 1 else mine
    return {k: v for k, v in patterns.items() if v != default}


def _whole(number: float) -> int | float:
    return int(number) if number == int(number) else number
