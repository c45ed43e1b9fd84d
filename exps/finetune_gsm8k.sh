#!/usr/bin/env bash
# A LLaMA learns grade-school mathematics: GSM8K with four special tokens, every weight or LoRA, as the Anyscale template does.
#
#   bash exps/finetune_gsm8k.sh --size=7b [--lora] [--as_test]    7b, 13b or 70b; --as_test: one step, one validation, a checkpoint
#   bash exps/finetune_gsm8k.sh --size=7b --dry_run true          any flag of accessory.main_finetune may follow
#   SMOKE=1 bash exps/finetune_gsm8k.sh                           the same way with a tiny random model: seconds, no GPU
#
#   raw GSM8K -> data/ -> tokenizer/ with <START_Q> ... -> expanded/ (a row for each) -> run/
#
# Edit the variables, or set them in the environment; the same command again continues. Relative paths: from the repository's root.
set -euo pipefail

size=7b lora=false
rest=()
for flag in "$@"; do
  case $flag in
    --size=7b | --size=13b | --size=70b) size=${flag#*=} ;;
    --size=*) echo "error: $flag: 7b, 13b or 70b" >&2; exit 1 ;;
    --lora) lora=true ;;
    --as_test | --as-test) rest+=(--as_test true) ;;
    *) rest+=("$flag") ;;
  esac
done

pretrained_path=${pretrained_path:-/path/to/llama-2-$size}  # any format, with its tokenizer beside it
gsm8k=${gsm8k:-/path/to/grade-school-math/data}           # train.jsonl and test.jsonl as published
kind=full; [ "$lora" = false ] || kind=lora
work=${work:-output/gsm8k_${size}_$kind}                  # everything it makes

# The template's values: 16 sequences on each of 16 devices (70b: 8 on 32), ctx-len 512, linear from 10 warm-up steps, keep 1
nproc_per_node=${nproc_per_node:-8}
case $size in 7b) parallel=1 ;; 13b) parallel=2 ;; *) parallel=8 ;; esac
export nproc_per_node model_parallel=${model_parallel:-$parallel} batch_size=${batch_size:-8} max_seq_len=${max_seq_len:-512}
export epochs=${epochs:-10} save_total_limit=${save_total_limit:-1} precision=${precision:-bf16} checkpointing=${checkpointing:-true}
global_batch_size=${global_batch_size:-256}               # as there, however many GPUs
if [ "$lora" = true ]; then                               # its lora.json: rank 8 on the feed-forward; new tokens are learnt in full
  export lr=${lr:-1e-4} lora_rank=${lora_rank:-8} lora_alpha=${lora_alpha:-16} lora_dropout=${lora_dropout:-0.05}
  export lora_targets=${lora_targets:-w1,w2,w3} modules_to_save=${modules_to_save-tok_embeddings,output}
else
  export lr=${lr:-5e-6}
fi

cd "$(dirname "${BASH_SOURCE[0]}")/.."
source exps/setup_env.sh run
if [ "${SMOKE:-0}" = 1 ]; then                            # other values for the same variables, nothing else
  [ -d output/smoke/tiny ] || "$python" tools/make_tiny.py --dst output/smoke/tiny --mp 2
  pretrained_path=output/smoke/tiny gsm8k=exps/data/gsm8k_few work=output/smoke/finetune_gsm8k
  export nproc_per_node=1 model_parallel=1 precision=fp32 checkpointing=false batch_size=2 epochs=1 max_seq_len=512 lr=1e-2
  global_batch_size=4
fi

mkdir -p "$work"
[ -d "$work/data" ] || "$python" tools/make_gsm8k.py --src "$gsm8k" --dst "$work/data"
[ -d "$work/tokenizer" ] || "$python" tools/merge_tokenizer.py --base "$pretrained_path" --special_tokens "$work/data/tokens.json" --dst "$work/tokenizer"
[ -d "$work/expanded" ] || "$python" tools/expand_vocab.py --src "$pretrained_path" --tokenizer_path "$work/tokenizer" --init mean --dst "$work/expanded"
if [ ! -f "$work/gsm8k.yaml" ]; then
  printf 'META:\n  - {path: data/train.jsonl}\n  - {path: data/test.jsonl, split: val}\n' >"$work/gsm8k.yaml"
fi
script=exps/finetune_7b.sh; [ "$lora" = false ] || script=exps/finetune_lora_7b.sh
SMOKE=0 pretrained_path=$work/expanded data_config=$work/gsm8k.yaml output_dir=$work/run val_ratio=0 \
  bash "$script" --global_batch_size "$global_batch_size" --lr_scheduler linear --warmup_steps 10 --weight_decay 0 \
  --adam_betas 0.9,0.999 --metric val_perplexity --seed 42 ${rest[@]+"${rest[@]}"}
