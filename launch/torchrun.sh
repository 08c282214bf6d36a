#!/usr/bin/env bash
# Run one step on several workers under torchrun.
#
#   launch/torchrun.sh NUM_WORKERS STEP conf.toml [section.key=value …]
#
# NUM_WORKERS counts the workers of this machine. On several machines run the same command on each, with
#
#   NUM_NODES=4               how many machines                         (default 1)
#   NODE_RANK=0               this one's number                         (default 0)
#   MASTER_ADDR=gpu01         a machine that all the others can reach   (needed when NUM_NODES > 1)
#   MASTER_PORT=29500         a free port on it                         (default 29500)
#
# What to train stands in conf.toml; this script only says where.
set -euo pipefail

if [ $# -lt 3 ]; then
    echo "usage: $0 NUM_WORKERS STEP conf.toml [section.key=value ...]" >&2
    exit 2
fi
num_workers=$1
shift

root=$(cd "$(dirname "$0")/.." && pwd)
python=python3
[ -x "$root/.venv/bin/python" ] && python=$root/.venv/bin/python

if [ "${NUM_NODES:-1}" -gt 1 ]; then
    where=(--nnodes "$NUM_NODES" --node-rank "${NODE_RANK:-0}"
           --master-addr "${MASTER_ADDR:?set MASTER_ADDR to a machine that all the others can reach}"
           --master-port "${MASTER_PORT:-29500}")
else
    where=(--standalone)
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
exec "$python" -m torch.distributed.run "${where[@]}" --nproc-per-node "$num_workers" -m teacherstudent "$@"
