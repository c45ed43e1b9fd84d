#!/usr/bin/env bash
# Pre-training of a 7B LLaMA on a token store, all weights: from a checkpoint, or from nothing.
#
#   python tools/build_corpus.py --src text/ --dst corpus --tokenizer_path tokenizer.model      first: text -> tokens, once
#   bash exps/pretrain_7b.sh                      edit the variables, or set them in the environment; again: it continues
#   bash exps/pretrain_7b.sh --dry_run true       any flag of accessory.main_pretrain may follow and wins; --help lists them
#   SMOKE=1 bash exps/pretrain_7b.sh              the same run on a tiny random model: seconds, no GPU
#   NNODES=4 NODE_RANK=0 MASTER_ADDR=host0 bash exps/pretrain_7b.sh    and the same with NODE_RANK=1, 2, 3 on the others
#
# Relative paths are looked up from the repository's root.
set -euo pipefail

pretrained_path=${pretrained_path-/path/to/llama-2-7b}    # continued from here, any format; set to nothing: from scratch, random weights
llama_config=${llama_config:-}                            # from scratch: model_configs/llama2_7b.json; else empty: the checkpoint's own
tokenizer_path=${tokenizer_path:-}                        # the corpus's tokenizer; empty: the one beside the weights
corpus=${corpus:-/path/to/corpus}                         # stores of tools/build_corpus.py, comma-separated, DIR=0.5 for half of one an epoch
block_size=${block_size:-4096}                            # tokens of a sequence: Llama 2's context, MiniMA's block
val_ratio=${val_ratio:-0.001}                             # share of the blocks held out
exp_name=${exp_name:-pretrain_7b}                         # the run's name: everything it leaves is in output/$exp_name

nproc_per_node=${nproc_per_node:-8}                       # one process per GPU
model_parallel=${model_parallel:-1}                       # ranks that share a replica: 1 where 7B fits, 2 or more for larger models
data_parallel=${data_parallel:-fsdp}                      # fsdp: least memory; sdp: keeps gathered weights within a step; ddp: copies
precision=${precision:-bf16}                              # of the arithmetic; trained weights and gradients are fp32
checkpointing=${checkpointing:-true}                      # recompute activations: less memory for about a third more time

batch_size=${batch_size:-4}                               # sequences per replica in one micro batch: what the memory allows
global_batch_size=${global_batch_size:-1024}              # sequences a step over all replicas, 4 million tokens: MiniMA's
epochs=${epochs:-1}                                       # a corpus is seen once
max_steps=${max_steps:-}                                  # optimizer steps instead of epochs; empty: epochs
lr=${lr:-3e-5}                                            # MiniMA's for going on with Llama 2; 3e-4 from scratch
min_lr=${min_lr:-3e-6}                                    # where the cosine ends
warmup_ratio=${warmup_ratio:-0.01}                        # share of the steps
weight_decay=${weight_decay:-0.1}                         # Llama's, on matrices only
clip_grad=${clip_grad:-1.0}                               # norm of the whole gradient
eval_steps=${eval_steps:-500}                             # validate every so many steps, and before the first
save_steps=${save_steps:-500}                             # save every so many steps; training goes on meanwhile
save_total_limit=${save_total_limit:-2}                   # newest checkpoints kept beside the best; one of 7B has 95 GB
seed=${seed:-0}                                           # order of the data, new weights

cd "$(dirname "${BASH_SOURCE[0]}")/.."
source exps/setup_env.sh run
if [ "${SMOKE:-0}" = 1 ]; then                            # other values for the same variables, nothing else
  [ -d output/smoke/tiny ] || "$python" tools/make_tiny.py --dst output/smoke/tiny --mp 2
  "$python" tools/build_corpus.py --src output/smoke/tiny/train.jsonl --field output --dst output/smoke/tiny-corpus \
    --tokenizer_path output/smoke/tiny --num_processes 1
  smoke pretrained_path=output/smoke/tiny corpus=output/smoke/tiny-corpus exp_name=smoke/pretrain_7b block_size=32 val_ratio=0.1 \
    nproc_per_node=2 model_parallel=2 precision=fp32 batch_size=2 global_batch_size=4 max_steps=4 lr=1e-3 min_lr=1e-4 eval_steps=0 save_steps=2
fi
output_dir=${output_dir:-output/$exp_name}

exec "$python" -m accessory.launch --nproc_per_node "$nproc_per_node" \
  ${NNODES:+--nnodes "$NNODES" ${NODE_RANK:+--node_rank "$NODE_RANK"} ${MASTER_ADDR:+--master_addr "$MASTER_ADDR"} --master_port "${MASTER_PORT:-29500}"} \
  -m accessory.main_pretrain \
  --pretrained_path "$pretrained_path" --llama_config "$llama_config" --tokenizer_path "$tokenizer_path" \
  --corpus "$corpus" --block_size "$block_size" --val_ratio "$val_ratio" \
  --output_dir "$output_dir" --resume auto \
  --model_parallel_size "$model_parallel" --data_parallel "$data_parallel" --precision "$precision" --checkpointing "$checkpointing" \
  --batch_size "$batch_size" --global_batch_size "$global_batch_size" --epochs "$epochs" --max_steps "$max_steps" \
  --lr "$lr" --min_lr "$min_lr" --lr_scheduler cosine --warmup_ratio "$warmup_ratio" \
  --weight_decay "$weight_decay" --clip_grad "$clip_grad" \
  --eval_steps "$eval_steps" --save_steps "$save_steps" --save_total_limit "$save_total_limit" --seed "$seed" \
  "$@"
