#!/usr/bin/env bash
# All tests, with their own set-up: bash tests/run.sh            what follows goes to pytest: bash tests/run.sh tests/unit -k lora
# Runs on two CPU cores; tests/gpu skips itself where there is no GPU. The slowest tests are listed at the end.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source exps/setup_env.sh test

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}               # several ranks share the cores: more threads each only get in the way
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1       # the reference implementations ask nobody

"$python" -m ruff check .
slow=(--durations=15 --durations-min=2)
if [ $# -gt 0 ]; then exec "$python" -m pytest "${slow[@]}" "$@"; fi
exec "$python" -m pytest -n 3 --dist loadfile "${slow[@]}" tests    # three files at a time: many wait for ranks and launchers
