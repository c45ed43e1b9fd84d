#!/usr/bin/env bash
# A LLaMA learns a new language: larger vocabulary, continued pre-training with LoRA, merged, exported.
#
#   bash exps/adapt_language.sh            edit the variables, or set them in the environment; again: it continues
#   SMOKE=1 bash exps/adapt_language.sh    the whole way with a tiny random model and a few poems: seconds, no GPU
#
#   text -> tokenizer/ (the base's, larger) -> expanded/ (the model, larger) -> corpus/ -> run/ -> merged/ -> hf/
#
# Each of them is made once; remove one, and those after it, to make it anew. Relative paths: from the repository's root.
set -euo pipefail

pretrained_path=${pretrained_path:-/path/to/llama-2-7b}   # the base, any format, with its tokenizer beside it
text=${text:-/path/to/text}                               # files or directories, comma-separated: .txt, .jsonl, .parquet, .gz, .zst
field=${field:-text}                                      # where a .jsonl or .parquet record has its text
documents=${documents:-lines}                             # of a .txt: lines = a document a line; file = one document a file
new_tokens=${new_tokens:-20000}                           # Chinese-LLaMA's tokenizer before merging; pieces the base has are not added
init=${init:-pieces}                                      # new rows: pieces = mean of the tokens it was; mean; normal
work=${work:-output/adapt_language}                       # everything it makes
sample_prompts=${sample_prompts:-}                        # a text, or a file with one on each line, continued at every validation

cd "$(dirname "${BASH_SOURCE[0]}")/.."
source exps/setup_env.sh run
if [ "${SMOKE:-0}" = 1 ]; then                            # other values for the same variables, nothing else
  [ -d output/smoke/tiny ] || "$python" tools/make_tiny.py --dst output/smoke/tiny --mp 2
  smoke pretrained_path=output/smoke/tiny text=exps/data/poems_zh.txt work=output/smoke/adapt_language new_tokens=700 \
    block_size=64 val_ratio=0.1 nproc_per_node=1 precision=fp32 checkpointing=false batch_size=4 global_batch_size=8 max_steps=4 \
    lr=1e-2 eval_steps=0 save_steps=0
  export block_size val_ratio nproc_per_node precision checkpointing batch_size global_batch_size max_steps lr eval_steps save_steps
fi
title() { printf '\n=== %s\n' "$*"; }

if [ -f "$work/finished" ]; then
  printf 'Finished: %s/hf; remove %s to start anew.\n' "$work" "$work"
  exit 0
fi
mkdir -p "$work"

if [ ! -d "$work/tokenizer" ]; then
  title "1. The tokenizer learns the text's words; every old token keeps its id"
  kind=$("$python" -c 'import sys; from accessory.tokenizer import Tokenizer; print(Tokenizer.open(sys.argv[1]).kind)' "$pretrained_path")
  if [ "$kind" = sentencepiece ]; then                    # its merges cannot be continued: pieces of a second model are added
    [ -d "$work/extra" ] || "$python" tools/train_tokenizer.py --src "$text" --field "$field" --vocab_size "$new_tokens" --dst "$work/extra"
    "$python" tools/merge_tokenizer.py --base "$pretrained_path" --extra "$work/extra" --dst "$work/tokenizer"
  else
    "$python" tools/merge_tokenizer.py --base "$pretrained_path" --src "$text" --field "$field" --vocab_size "+$new_tokens" --dst "$work/tokenizer"
  fi
fi
if [ ! -d "$work/expanded" ]; then
  title "2. The model gets a row for each new token"
  "$python" tools/expand_vocab.py --src "$pretrained_path" --tokenizer_path "$work/tokenizer" --init "$init" --sample_text "$text" --field "$field" --dst "$work/expanded"
fi
if [ ! -d "$work/corpus" ]; then
  title "3. The text becomes tokens, once"
  "$python" tools/build_corpus.py --src "$text" --field "$field" --documents "$documents" --tokenizer_path "$work/tokenizer" --dst "$work/corpus"
fi
title "4. Continued pre-training (exps/continue_lora_7b.sh; its variables may be set in the environment)"
SMOKE=0 pretrained_path=$work/expanded tokenizer_path= corpus=$work/corpus output_dir=$work/run \
  bash exps/continue_lora_7b.sh ${sample_prompts:+--sample_prompts "$sample_prompts"} "$@"
if [ ! -d "$work/merged" ]; then
  title "5. Adapter + base -> one model in Meta's files"
  "$python" tools/merge_lora.py --base "$work/expanded" --adapters "$work/run/latest" --dst "$work/merged"
fi
if [ ! -d "$work/hf" ]; then
  title "6. -> a Hugging Face directory"
  "$python" tools/meta_to_hf.py --src "$work/merged" --dst "$work/hf"
fi
touch "$work/finished"
