#!/usr/bin/env bash
# One command for everything: installs what is missing, then trains, chats, teaches or tests. See --help.
set -euo pipefail
from=$PWD
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

usage() {
  cat <<'TEXT'
Train a small ChatGPT from text to chat, on a laptop or on eight GPUs.

  bash run_all.sh [PRESET]         train every stage and print the report card; again: skip what is finished,
                                   resume what was interrupted. PRESET: laptop (default), gpu, speedrun, or FILE.yaml
      --run NAME                   the run's name; its folder is runs/NAME         (default: the preset's name)
      --depth N                    layers of the model: the one dial of its size
      --text FILE...               train on your own .txt, .md, .jsonl, .parquet files or folders
      --conversations FILE...      fine-tune on your own conversations (.jsonl)
      --data FOLDER                evaluate on CORE, MMLU, ARC, GSM8K, HumanEval when their files are there
      --set STAGE.PARAM=VALUE      override one parameter of one stage (tokenizer, base, sft, rl, eval, report)
      --processes N                processes on this machine                       (default: one per GPU)
      --plan [--hardware 8xH100]   train nothing: print parameters, memory, hours, dollars, disk, and the rules' origins
      --until STEP                 stop early: tokenizer, base, eval-base, sft, eval-sft, rl, eval-rl
  bash run_all.sh miniseries       train depths 2 3 4 6 8 on the laptop's corpus and fit the scaling law, with a picture;
                                   30 to 40 minutes on 2 cores with bf16 and AMX; resumes   [--depths 2 4] [--set …] [--run NAME]
  bash run_all.sh chat             talk to the trained model in the browser   [--run NAME] [--port 8866]
  bash run_all.sh lab              open the course in JupyterLab
  bash run_all.sh book             build the course as a web site in _book/
  bash run_all.sh refresh [NN...]  run the lessons of these notebooks (default: all) and store their outputs
  bash run_all.sh test             run all tests
TEXT
}

fail() { echo "error: $*" >&2; exit 1; }

find_python() {
  local name
  for name in python3 python3.11 python3.12 python3.13 python3.14 python; do
    if "$name" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$name"; return
    fi
  done
  fail "Python 3.11 or newer with venv is needed and was not found on PATH (on Debian: apt install python3 python3-venv)"
}

install() {
  local stamp="$here/.venv/installed" want have
  want=$(cd "$here" && cat requirements.lock settings.ini setup.py pyproject.toml | cksum; echo "$here")
  have=$(cat "$stamp" 2>/dev/null || true)
  if [ "$have" = "$want" ] && "$here/.venv/bin/python" -c '' 2>/dev/null; then return; fi
  echo "Installing into .venv (once; a few minutes)"
  if [ "${have##*$'\n'}" != "$here" ] || ! "$here/.venv/bin/python" -c '' 2>/dev/null; then    # none, moved, or its Python is gone
    [ ! -L "$here/.venv" ] || fail ".venv is a link, and what it leads to would be emptied; remove the link"
    local python; python=$(find_python) || exit 1
    "$python" -m venv --clear "$here/.venv"
  fi
  (cd "$here" && .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.lock \
    && .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .)
  echo "$want" > "$stamp"
}

# What only tests use: Python packages, and two of Debian's; without them the tests that need them skip and say so.
install_test_tools() {
  local stamp="$here/.venv/installed-test" want
  want=$(cksum < "$here/requirements-test.lock"; cat "$here/.venv/installed")
  if [ "$(cat "$stamp" 2>/dev/null || true)" != "$want" ]; then
    echo "Installing what the tests compare with (once)"
    if "$bin/python" -m pip install --quiet --disable-pip-version-check -c "$here/requirements.lock" -r "$here/requirements-test.lock"; then
      echo "$want" > "$stamp"
    else
      echo "could not install requirements-test.lock; the tests that need it will skip"
    fi
  fi
  # Triton, whose interpreter runs the GPU's kernels (08) on a CPU: beside the environment, since in it PyTorch would try to use it
  if [ ! -d "$here/.venv/interpreter/triton-3.8.0.dist-info" ]; then
    "$bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target "$here/.venv/interpreter" triton==3.8.0 \
      || echo "could not install triton; the test of the GPU's kernels will skip"
  fi
  [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || return 0
  local missing=()
  command -v chromium >/dev/null || missing+=(chromium)
  command -v bwrap >/dev/null || missing+=(bubblewrap)
  [ ${#missing[@]} = 0 ] && return 0
  echo "Installing ${missing[*]} for the tests"
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"; } \
    >/dev/null 2>&1 || echo "could not install ${missing[*]}; the tests that need them will skip"
}

chat() {
  local run=laptop rest=()
  while [ $# -gt 0 ]; do
    case $1 in
      --run) [ $# -gt 1 ] || fail "--run needs a name"; run=$2; shift 2 ;;
      --run=*) run=${1#*=}; shift ;;
      *) rest+=("$1"); shift ;;
    esac
  done
  [ -n "$run" ] || fail "--run needs a name"
  case $run in
    */*) cd "$from"; [ -d "$run" ] || fail "there is no folder $run; --run NAME means runs/NAME"; run=$(realpath "$run") ;;
    *) run=$here/runs/$run ;;
  esac
  [ -d "$run/base" ] || fail "there is no trained model in $(basename "$run"); run \`bash run_all.sh\` first, or give --run NAME"
  cd "$here"
  exec "$bin/python" -m nanochat_nb.ui --run "$run" ${rest[@]+"${rest[@]}"}
}

case ${1:-} in
  help) usage; exit 0 ;;
  chat|lab|book|refresh|test) ;;        # these have a help of their own
  *) for word in "$@"; do case $word in -h|--help) usage; exit 0 ;; esac; done ;;
esac
install
bin="$here/.venv/bin"
export PATH="$bin:$PATH"
case ${1:-} in
  chat) shift; chat "$@" ;;
  lab)
    shift; cd "$here"
    git config --local include.path ../.gitconfig 2>/dev/null || true
    exec "$bin/jupyter" lab "$@" nbs/00_runtime.ipynb ;;
  book)
    shift; cd "$here"
    "$bin/python" -m sphinx -W --keep-going -q -b html -c chapters . _book "$@"
    echo "The book: _book/index.html" ;;
  refresh) shift; cd "$here"; exec "$bin/python" -m nanochat_nb.launch refresh "$@" ;;
  test)
    shift; cd "$here"; install_test_tools
    # two processes of one thread each: most tests wait for processes that start or compute on one core;
    # `run_all.sh test -n 0` takes one, as a debugger needs
    OMP_NUM_THREADS=1 exec "$bin/python" -m pytest -q -n 2 --dist loadfile --durations=15 tests "$@" ;;
  *)
    cd "$from"
    # freed small blocks join their neighbours at once, so that large tensors fit in again: an eighth less memory (00)
    export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.tcache_count=0}"
    exec "$bin/python" -m nanochat_nb.launch "$@" ;;
esac
