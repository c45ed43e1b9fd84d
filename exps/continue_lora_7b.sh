#!/usr/bin/env bash
# Continued pre-training of a 7B LLaMA in a new language: LoRA on all seven linears, the embedding and the head in full.
#
#   bash exps/adapt_language.sh                   the whole way: tokenizer, larger vocabulary, corpus, this script, merge, export
#   bash exps/continue_lora_7b.sh                 edit the variables, or set them in the environment; again: it continues
#   bash exps/continue_lora_7b.sh --dry_run true  any flag of accessory.main_pretrain may follow and wins; --help lists them
#   SMOKE=1 bash exps/continue_lora_7b.sh         the same run on a tiny random model: seconds, no GPU
#
# Two stages, as Chinese-LLaMA's 7B: first exp_name=stage1 with --lora_rank 0 --trainable tok_embeddings,output after this
# script, then stage 2 from pretrained_path=output/stage1/latest. Relative paths are looked up from the repository's root.
set -euo pipefail

pretrained_path=${pretrained_path:-/path/to/llama-2-7b-expanded}  # from tools/expand_vocab.py; any format
tokenizer_path=${tokenizer_path:-}                        # empty: the one beside the weights
corpus=${corpus:-/path/to/corpus}                         # stores of tools/build_corpus.py, comma-separated, DIR=0.5 for half of one an epoch
block_size=${block_size:-512}                             # tokens of a sequence: Chinese-LLaMA's; 1024 in its third version
val_ratio=${val_ratio:-0.001}                             # share of the blocks held out
exp_name=${exp_name:-continue_lora_7b}                    # the run's name: everything it leaves is in output/$exp_name

nproc_per_node=${nproc_per_node:-1}                       # one process per GPU
model_parallel=${model_parallel:-1}                       # ranks that share a replica: 1 for 7B on 48 GB, 2 for 13B
data_parallel=${data_parallel:-fsdp}                      # fsdp: least memory; sdp: keeps gathered weights within a step; ddp: copies
precision=${precision:-bf16}                              # of the arithmetic; trained weights and gradients are fp32
checkpointing=${checkpointing:-true}                      # recompute activations: less memory for about a third more time

lora_rank=${lora_rank:-8}                                 # Chinese-LLaMA's first version; 64 with alpha 128 in the later ones
lora_alpha=${lora_alpha:-32}                              # the adapters' output is scaled by lora_alpha / lora_rank
lora_dropout=${lora_dropout:-0.05}                        # on the adapters' input
lora_targets=${lora_targets:-wq,wk,wv,wo,w1,w2,w3}        # all seven linears
modules_to_save=${modules_to_save-tok_embeddings,output}  # new tokens are learned here: trained in full, saved with the adapter

batch_size=${batch_size:-4}                               # sequences per replica in one micro batch: what the memory allows
global_batch_size=${global_batch_size:-128}               # sequences a step over all replicas
epochs=${epochs:-1}                                       # a corpus is seen once
max_steps=${max_steps:-}                                  # optimizer steps instead of epochs; empty: epochs
lr=${lr:-2e-4}                                            # Chinese-LLaMA's; 1e-4 in its third version
min_lr=${min_lr:-0}                                       # where the cosine ends
warmup_ratio=${warmup_ratio:-0.05}                        # share of the steps
weight_decay=${weight_decay:-0.01}                        # on matrices only
clip_grad=${clip_grad:-1.0}                               # norm of the whole gradient
eval_steps=${eval_steps:-200}                             # validate every so many steps, and before the first
save_steps=${save_steps:-200}                             # save every so many steps; training goes on meanwhile
save_total_limit=${save_total_limit:-3}                   # newest checkpoints kept beside the best; 5 GB each for 7B: embedding, head, moments
seed=${seed:-0}                                           # order of the data

cd "$(dirname "${BASH_SOURCE[0]}")/.."
source exps/setup_env.sh run
if [ "${SMOKE:-0}" = 1 ]; then                            # other values for the same variables, nothing else
  [ -d output/smoke/tiny ] || "$python" tools/make_tiny.py --dst output/smoke/tiny --mp 2
  "$python" tools/build_corpus.py --src output/smoke/tiny/train.jsonl --field output --dst output/smoke/tiny-corpus \
    --tokenizer_path output/smoke/tiny --num_processes 1
  smoke pretrained_path=output/smoke/tiny corpus=output/smoke/tiny-corpus exp_name=smoke/continue_lora_7b block_size=32 val_ratio=0.1 \
    nproc_per_node=1 model_parallel=1 precision=fp32 batch_size=2 global_batch_size=4 max_steps=4 lr=1e-2 eval_steps=0 save_steps=2
fi
output_dir=${output_dir:-output/$exp_name}

exec "$python" -m accessory.launch --nproc_per_node "$nproc_per_node" \
  ${NNODES:+--nnodes "$NNODES" ${NODE_RANK:+--node_rank "$NODE_RANK"} ${MASTER_ADDR:+--master_addr "$MASTER_ADDR"} --master_port "${MASTER_PORT:-29500}"} \
  -m accessory.main_pretrain \
  --pretrained_path "$pretrained_path" --tokenizer_path "$tokenizer_path" \
  --corpus "$corpus" --block_size "$block_size" --val_ratio "$val_ratio" \
  --output_dir "$output_dir" --resume auto \
  --model_parallel_size "$model_parallel" --data_parallel "$data_parallel" --precision "$precision" --checkpointing "$checkpointing" \
  --lora_rank "$lora_rank" --lora_alpha "$lora_alpha" --lora_dropout "$lora_dropout" \
  --lora_targets "$lora_targets" --modules_to_save "$modules_to_save" \
  --batch_size "$batch_size" --global_batch_size "$global_batch_size" --epochs "$epochs" --max_steps "$max_steps" \
  --lr "$lr" --min_lr "$min_lr" --lr_scheduler cosine --warmup_ratio "$warmup_ratio" \
  --weight_decay "$weight_decay" --clip_grad "$clip_grad" \
  --eval_steps "$eval_steps" --save_steps "$save_steps" --save_total_limit "$save_total_limit" --seed "$seed" \
  "$@"
