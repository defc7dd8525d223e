#!/bin/sh
# A worker of a DiLoCo run, told by the environment what to do; with arguments, that command instead.
#   FOLDER  where the run is: a path, s3://bucket/path ...      STORE   this machine's copy of the run's token store
#   WORKER  this worker's name (default: the host's name)       KEYS    file with its key, for a signed run
#   DEVICE  auto, cpu, cuda or cuda:N
# SIGTERM ends it cleanly: what it has not pushed goes to another worker.
set -eu

if [ "$#" -gt 0 ]; then
  exec "$@"
fi
for name in FOLDER STORE; do
  eval "value=\${$name:-}"
  if [ -z "$value" ]; then
    echo "worker: set $name. Example: FOLDER=s3://bucket/run STORE=/data/stdlib WORKER=alice worker" >&2
    exit 2
  fi
done
set -- "$FOLDER" --worker "${WORKER:-$(hostname)}" --store "$STORE" --device "${DEVICE:-auto}"
if [ -n "${KEYS:-}" ]; then
  set -- "$@" --keys "$KEYS"
fi
exec fastweight diloco learn "$@"
