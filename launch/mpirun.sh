#!/usr/bin/env bash
# Run one step on several workers under Open MPI (pip install 'teacherstudent[mpi]' brings it along).
#
#   launch/mpirun.sh NUM_WORKERS STEP conf.toml [section.key=value …]
#
# NUM_WORKERS counts all workers. On several machines, which must see the same files at the same places:
#
#   HOSTS=gpu01:4,gpu02:4     machines and how many workers each takes  (default: all on this one)
#   MPIRUN_OPTIONS='…'        further options of mpirun, such as --mca btl_tcp_if_include eth0
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
python=python3 mpirun=mpirun
[ -x "$root/.venv/bin/python" ] && python=$root/.venv/bin/python
[ -x "$root/.venv/bin/mpirun" ] && mpirun=$root/.venv/bin/mpirun

if [ "$(id -u)" -eq 0 ]; then  # Open MPI refuses to run as root unless told twice
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
# shellcheck disable=SC2086  # MPIRUN_OPTIONS is a list of words
exec "$mpirun" -n "$num_workers" ${HOSTS:+--host "$HOSTS"} --oversubscribe --bind-to none \
    -x OMP_NUM_THREADS -x PYTHONPATH ${MPIRUN_OPTIONS:-} "$python" -m teacherstudent "$@"
