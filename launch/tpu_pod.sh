#!/usr/bin/env bash
# Trains on all hosts of a Cloud TPU slice, or of several slices, from your own machine.
#
#   TPU=my-pod ZONE=us-central2-b REPO=https://github.com/me/ldm_jax \
#       launch/tpu_pod.sh --config=configs/emoji.py --config.data.cache=/mnt/shared/cache \
#       --workdir=/mnt/shared/runs/emoji
#
# Needs gcloud. Every host clones REPO, sets itself up once and starts the same command; workdir and
# cache must lie on a file system that all of them mount (Filestore, gcsfuse).
set -euo pipefail
: "${TPU:?name of the TPU}" "${ZONE:?its zone}" "${REPO:?git address that the hosts can clone}"
setup="test -d ldm_jax || git clone --depth=1 $REPO ldm_jax; cd ldm_jax; git pull -q; ./run setup"
setup="$setup; .venv/bin/pip install -q -c constraints.txt -e '.[tpu]'"
train="cd ldm_jax; exec .venv/bin/python train.py --cluster=tpu$(printf ' %q' "$@")"
exec gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all \
    --command="set -e; $setup; $train"
