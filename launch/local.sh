#!/usr/bin/env bash
# Trains on the GPUs of this machine, one process each: faster than one process for all of them.
#
#   GPUS="0 1 2 3" launch/local.sh --config=configs/emoji.py --workdir=runs/emoji
#
# Paths are relative to the repository. PORT defaults to 9876, PYTHON to .venv/bin/python. Ctrl-C, or
# SIGTERM to this script, is passed on: the run saves and ends. How far it is stands in log.jsonl.
set -euo pipefail
: "${GPUS:?numbers of the GPUs, as nvidia-smi -L lists them}"
read -r -a gpus <<<"$GPUS"
[ "${#gpus[@]}" -gt 0 ] || { echo "GPUS must hold numbers, got '$GPUS'" >&2; exit 1; }
cd "$(dirname "$0")/.."
coordinator="127.0.0.1:${PORT:-9876}"
pids=()

# To one process: all of them agree on the step at which they end. If that one is gone, to all.
pass_on() {
    kill -TERM "${pids[0]}" 2>/dev/null || kill -TERM "${pids[@]}" 2>/dev/null || true
}
trap pass_on INT TERM

for i in "${!gpus[@]}"; do
    # In sessions of their own, so that Ctrl-C reaches this script alone.
    CUDA_VISIBLE_DEVICES=${gpus[i]} setsid "${PYTHON:-.venv/bin/python}" train.py \
        --coordinator="$coordinator" --num_processes="${#gpus[@]}" --process_id="$i" "$@" \
        > >(setsid sed -u "s/^/[$i] /") 2>&1 </dev/null &
    pids+=($!)
done

. launch/wait_for_all.sh
