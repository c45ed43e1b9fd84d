#!/usr/bin/env bash
# Stanford Alpaca: every weight of a 7B LLaMA on 52,000 instructions, with the values of its train.py.
#
#   pretrained_path=/path/to/llama-7b alpaca=/path/to/alpaca_data.json bash exps/finetune_alpaca.sh
#   SMOKE=1 bash exps/finetune_alpaca.sh       the same run on a tiny random model: seconds, no GPU
#
# It sets the variables of exps/finetune_7b.sh, which may also come from the environment; flags that follow are passed on.
set -euo pipefail

alpaca=${alpaca:-/path/to/alpaca_data.json}               # {"instruction", "input", "output"}: the data set, or your own in its form
export pretrained_path=${pretrained_path:-/path/to/llama-7b}
export exp_name=${exp_name:-finetune_alpaca}              # 3 epochs, 128 sequences, 2e-5, 3 % warm-up, cosine, 512 tokens: its README
export epochs=${epochs:-3} lr=${lr:-2e-5} warmup_ratio=${warmup_ratio:-0.03} weight_decay=${weight_decay:-0} max_seq_len=${max_seq_len:-512}
export batch_size=${batch_size:-4} val_ratio=${val_ratio:-0.01} save_total_limit=${save_total_limit:-1}

cd "$(dirname "${BASH_SOURCE[0]}")/.."
more=(--global_batch_size 128 --template alpaca)
if [ "${SMOKE:-0}" = 1 ]; then
  export pretrained_path=output/smoke/tiny exp_name=smoke/finetune_alpaca data_config=output/smoke/tiny/data.yaml max_seq_len=256 batch_size=2 epochs=1 lr=1e-3
  more=(--global_batch_size 4 --template alpaca)
else
  export data_config=${data_config:-$alpaca}
fi
exec bash exps/finetune_7b.sh "${more[@]}" "$@"
