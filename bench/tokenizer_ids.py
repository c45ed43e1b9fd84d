"""Every kind of tokenizer id for id against its reference, over 10,000 lines of mixed text.

python -m bench.tokenizer_ids [--lines 10000]

Runs the checks of tests/unit/test_tokenizer_references.py, which take 300 lines, on more. Needs ../shared/assets.
"""

import time

from accessory.config import run_tool
from tests.unit import test_tokenizer_references as references


def main(*, lines: int = 10_000) -> None:
    """Prints one line for each comparison that held; the first difference ends it with an AssertionError."""
    checks = (
        ("sentencepiece, transformers' LlamaTokenizer", references.test_sentencepiece_is_transformers, ()),
        ("sentencepiece, continuation", references.test_a_continuation_is_sentencepiece_without_its_prefix, ()),
        ("special tokens, legacy", references.test_special_tokens_and_both_spacings_are_transformers, ("legacy",)),
        ("special tokens, plain", references.test_special_tokens_and_both_spacings_are_transformers, ("plain",)),
        ("Llama 3, Meta's encoding on tiktoken", references.test_llama3_is_metas, ()),
        ("tokenizer.json, transformers", references.test_tokenizer_json_is_transformers, ()),
    )
    for name, check, arguments in checks:
        start = time.perf_counter()
        check(*arguments, count=lines)
        print(f"{name:<50} {lines:,} lines equal, {time.perf_counter() - start:.1f} s", flush=True)


if __name__ == "__main__":
    run_tool(main)
