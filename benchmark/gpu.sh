#!/usr/bin/env bash
# What wants a GPU, in one go: recorded steps against eager ones, speed at the paper's sizes, one training end to end.
#
#     bash benchmark/gpu.sh FOLDER                    # five minutes on an H100; results go to FOLDER
#     bash benchmark/gpu.sh FOLDER --dataset-path hopper.hdf5 --eval-episodes 0     # flags for the training
#     bash benchmark/gpu.sh --dry FOLDER              # tiny sizes on the CPU: does it run?
set -euo pipefail
dry=()
training=(--env-id hopper-medium-v2 --quick --cuda)
if [ "${1:-}" = --dry ]; then
    dry=(--dry --rounds 1)
    training=(--env-id liquidation --dataset-episodes 100 --pool-size 2 --active-models 2 --dynamics-epochs 1
        --behaviour-updates 10 --warmup 10 --iterations 40 --eval-every 20 --eval-episodes 10 --final-episodes 10)
    shift
fi
folder=$(realpath -m "${1:?usage: bash benchmark/gpu.sh [--dry] FOLDER [flags of pspo.py]}")
shift
mkdir -p "$folder"
repository=$(dirname "$(realpath "$0")")/..
python "$repository/benchmark/speed.py" --gpu "${dry[@]}" 2>&1 | tee "$folder/speed.txt"
python "$repository/pspo.py" "${training[@]}" --runs-dir "$folder" "$@" 2>&1 | tee "$folder/training.txt"
