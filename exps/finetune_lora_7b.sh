#!/usr/bin/env bash
# LoRA fine-tuning of a 7B LLaMA on instructions: adapters of rank 8 on all seven linears, the weights stay as they are.
#
#   bash exps/finetune_lora_7b.sh                 edit the variables, or set them in the environment; again: it continues
#   bash exps/finetune_lora_7b.sh --dry_run true  any flag of accessory.main_finetune may follow and wins; --help lists them
#   SMOKE=1 bash exps/finetune_lora_7b.sh         the same run on a tiny random model: seconds, no GPU
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=host0 bash exps/finetune_lora_7b.sh     and the same with NODE_RANK=1 on the second machine
#
# Relative paths are looked up from the repository's root.
set -euo pipefail

pretrained_path=${pretrained_path:-/path/to/llama-2-7b}   # consolidated.NN.pth, Accessory's files, Hugging Face's, or a .gguf
pretrained_type=${pretrained_type:-}                      # meta_ori, consolidated, hf or gguf; empty: recognised by its files
llama_config=${llama_config:-}                            # model_configs/*.json, comma-separated, later keys win; empty: its own params.json
tokenizer_path=${tokenizer_path:-}                        # tokenizer.model or tokenizer.json; empty: the one beside the weights
data_config=${data_config:-exps/data/quickstart.yaml}     # the small set shipped here; copy the file and name your own data in it
val_ratio=${val_ratio:-0}                                 # share of the training files held out, where data_config has no split: val
exp_name=${exp_name:-finetune_lora_7b}                    # the run's name: everything it leaves is in output/$exp_name

nproc_per_node=${nproc_per_node:-1}                       # one process per GPU
model_parallel=${model_parallel:-1}                       # 1 for 7B on 24 GB, 2 for 13B, 4 or 8 for 70B; the shards on disk may be any number
data_parallel=${data_parallel:-fsdp}                      # fsdp: least memory; sdp: keeps gathered weights within a step; ddp: copies
precision=${precision:-bf16}                              # of the arithmetic (fp16, fp32, tf32); trained weights stay fp32
checkpointing=${checkpointing:-true}                      # recompute activations: less memory for about a third more time

lora_rank=${lora_rank:-8}                                 # 20 million trained weights for 7B on all seven linears; 16 to 64 learn more
lora_alpha=${lora_alpha:-16}                              # the adapters' output is scaled by lora_alpha / lora_rank
lora_dropout=${lora_dropout:-0.05}                        # on the adapters' input
lora_targets=${lora_targets:-wq,wk,wv,wo,w1,w2,w3}        # attention alone (wq,wk,wv,wo) is smaller and learns less
modules_to_save=${modules_to_save:-}                      # trained in full beside them, e.g. tok_embeddings,output for a new language

batch_size=${batch_size:-4}                               # sequences per replica in one micro batch: what the memory allows
accum_iter=${accum_iter:-32}                              # 4 x 32 x 1 replica = 128 sequences a step; with n replicas take 32 / n
epochs=${epochs:-3}                                       # Alpaca's
max_steps=${max_steps:-}                                  # optimizer steps instead of epochs; empty: epochs
max_seq_len=${max_seq_len:-512}                           # tokens; Alpaca's answers fit, dialogs and documents want more
lr=${lr:-2e-4}                                            # adapters start from zero and take ten times the full recipe's rate
min_lr=${min_lr:-0}                                       # where the cosine ends
warmup_ratio=${warmup_ratio:-0.03}                        # share of the steps
weight_decay=${weight_decay:-0}                           # none over so few epochs
clip_grad=${clip_grad:-1.0}                               # norm of the whole gradient
eval_steps=${eval_steps:-0}                               # validate every so many steps; 0: after each epoch, and before the first step
save_steps=${save_steps:-0}                               # save every so many steps; 0: after each epoch
save_total_limit=${save_total_limit:-2}                   # newest checkpoints kept beside the best; adapter and optimizer for 7B: 0.3 GB each
seed=${seed:-0}                                           # order of the data

cd "$(dirname "${BASH_SOURCE[0]}")/.."
source exps/setup_env.sh run
if [ "${SMOKE:-0}" = 1 ]; then                            # other values for the same variables, nothing else
  [ -d output/smoke/tiny ] || "$python" tools/make_tiny.py --dst output/smoke/tiny --mp 2
  smoke pretrained_path=output/smoke/tiny data_config=output/smoke/tiny/data.yaml exp_name=smoke/finetune_lora_7b \
    nproc_per_node=1 model_parallel=1 precision=fp32 batch_size=2 accum_iter=2 epochs=1 max_steps=4 max_seq_len=256 lr=1e-2
fi
output_dir=${output_dir:-output/$exp_name}

exec "$python" -m accessory.launch --nproc_per_node "$nproc_per_node" \
  ${NNODES:+--nnodes "$NNODES" ${NODE_RANK:+--node_rank "$NODE_RANK"} ${MASTER_ADDR:+--master_addr "$MASTER_ADDR"} --master_port "${MASTER_PORT:-29500}"} \
  -m accessory.main_finetune \
  --pretrained_path "$pretrained_path" --pretrained_type "$pretrained_type" \
  --llama_config "$llama_config" --tokenizer_path "$tokenizer_path" \
  --data_config "$data_config" --val_ratio "$val_ratio" --max_seq_len "$max_seq_len" \
  --output_dir "$output_dir" --resume auto \
  --model_parallel_size "$model_parallel" --data_parallel "$data_parallel" --precision "$precision" --checkpointing "$checkpointing" \
  --lora_rank "$lora_rank" --lora_alpha "$lora_alpha" --lora_dropout "$lora_dropout" \
  --lora_targets "$lora_targets" --modules_to_save "$modules_to_save" \
  --batch_size "$batch_size" --accum_iter "$accum_iter" --epochs "$epochs" --max_steps "$max_steps" \
  --lr "$lr" --min_lr "$min_lr" --lr_scheduler cosine --warmup_ratio "$warmup_ratio" \
  --weight_decay "$weight_decay" --clip_grad "$clip_grad" \
  --eval_steps "$eval_steps" --save_steps "$save_steps" --save_total_limit "$save_total_limit" --seed "$seed" \
  "$@"
