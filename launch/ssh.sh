#!/usr/bin/env bash
# Trains on any machines that ssh reaches, one process each; the first one coordinates.
#
#   HOSTS="10.0.0.1 10.0.0.2" launch/ssh.sh --config=configs/emoji.py \
#       --config.data.cache=/shared/cache --workdir=/shared/runs/emoji
#
# DIR (default: where this script's repository lies) is the repository on each of them, with its
# .venv; the latent cache and the workdir must lie where all of them see them. PORT defaults to
# 9876. Addresses in numbers avoid names that mean another machine elsewhere. Ctrl-C, or SIGTERM to
# this script, is passed on: the run saves and ends.
set -euo pipefail
: "${HOSTS:?addresses of the machines, the coordinator first}"
read -r -a hosts <<<"$HOSTS"
directory=${DIR:-$(cd "$(dirname "$0")/.." && pwd)}
coordinator="${hosts[0]}:${PORT:-9876}"
remote_shell=${SSH:-ssh -o BatchMode=yes}
pids=()

# To one process: all of them agree on the step at which they end.
pass_on() {
    $remote_shell "${hosts[0]}" "pkill -TERM -f -- '[-]-coordinator=$coordinator .*process_id=0 '"
}
trap pass_on INT TERM

for i in "${!hosts[@]}"; do
    command="cd $(printf '%q' "$directory") && exec .venv/bin/python train.py"
    command+=" --coordinator=$coordinator --num_processes=${#hosts[@]} --process_id=$i"
    command+="$(printf ' %q' "$@")"
    # In a process group of its own, so that Ctrl-C reaches this script alone. `remote_shell` may
    # be several words.
    setsid $remote_shell "${hosts[i]}" "$command" > >(setsid sed -u "s/^/[$i] /") 2>&1 </dev/null &
    pids+=($!)
done

. "$(dirname "$0")/wait_for_all.sh"
