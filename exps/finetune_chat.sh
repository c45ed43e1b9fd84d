#!/usr/bin/env bash
# A LLaMA learns dialogs: ShareGPT's form or messages, every answer learnt, the model's own chat template or one by name.
#
#   pretrained_path=/path/to/model data_config=chats.json bash exps/finetune_chat.sh
#   bash exps/finetune_chat.sh --preview 3     shows three dialogs with what is learnt in colour, and stops
#   SMOKE=1 bash exps/finetune_chat.sh         the same run on a tiny random model: seconds, no GPU
#
# It sets the variables of exps/finetune_7b.sh (lora=true: of finetune_lora_7b.sh), which may also come from the environment.
set -euo pipefail

lora=${lora:-false}                                       # true: adapters instead of every weight
template=${template:-vicuna}                              # checkpoint: the chat_template beside the tokenizer; names: docs/data.md
export pretrained_path=${pretrained_path:-/path/to/llama-2-7b}
export data_config=${data_config:-/path/to/chats.json}    # {"conversations": [...]}, {"messages": [...]}, or a YAML of several
export exp_name=${exp_name:-finetune_chat} val_ratio=${val_ratio:-0.01}
export max_seq_len=${max_seq_len:-2048} epochs=${epochs:-3} batch_size=${batch_size:-2}  # Vicuna's: 2048 tokens, 3 epochs, 2e-5, 128 a step
packing=${packing:-best_fit}                              # dialogs differ in length: micro batches of equal size; none: one dialog an item

cd "$(dirname "${BASH_SOURCE[0]}")/.."
more=(--template "$template" --packing "$packing")
if [ "${SMOKE:-0}" = 1 ]; then
  export pretrained_path=output/smoke/tiny exp_name=smoke/finetune_chat data_config=exps/data/chats_few.jsonl max_seq_len=256 batch_size=2 val_ratio=0.2
  more+=(--global_batch_size 2)
fi
script=exps/finetune_7b.sh; [ "$lora" != true ] || script=exps/finetune_lora_7b.sh
exec bash "$script" "${more[@]}" "$@"
