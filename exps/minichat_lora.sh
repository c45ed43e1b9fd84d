#!/usr/bin/env bash
# MiniChat with LoRA: MiniMA's dialogs ([{"User", "Assistant"}, ...]) in its template, adapters and the head trained.
#
#   pretrained_path=/path/to/minima-3b data_config=chats.jsonl bash exps/minichat_lora.sh
#   SMOKE=1 bash exps/minichat_lora.sh         the same run on a tiny random model: seconds, no GPU
#
# It sets the variables of exps/finetune_lora_7b.sh, which may also come from the environment; flags that follow are passed on.
set -euo pipefail

export pretrained_path=${pretrained_path:-/path/to/minima-3b}
export data_config=${data_config:-/path/to/chats.jsonl}
export exp_name=${exp_name:-minichat_lora} val_ratio=${val_ratio:-0.001}
export lora_rank=${lora_rank:-8} lora_alpha=${lora_alpha:-16} lora_dropout=${lora_dropout:-0.05} modules_to_save=${modules_to_save-output}
export lr=${lr:-2e-5} epochs=${epochs:-3} batch_size=${batch_size:-16} accum_iter=${accum_iter:-2} max_seq_len=${max_seq_len:-4096}
export warmup_ratio=${warmup_ratio:-0.1} weight_decay=${weight_decay:-0.01}    # run_instruction_llama_lora_ds.py's; 16 x 2, cosine: its script

cd "$(dirname "${BASH_SOURCE[0]}")/.."
more=(--template minichat --early_stop_patience 2)
if [ "${SMOKE:-0}" = 1 ]; then
  export pretrained_path=output/smoke/tiny exp_name=smoke/minichat_lora data_config=exps/data/chats_few.jsonl max_seq_len=512 batch_size=2 accum_iter=1 val_ratio=0.2 lr=1e-2
fi
exec bash exps/finetune_lora_7b.sh "${more[@]}" "$@"
