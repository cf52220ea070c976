#!/usr/bin/env bash
# With torchrun; run it on each machine:
#     NODES=2 DEVICES=8 NODE_RANK=0 MASTER_ADDR=10.0.0.1 bash scripts/launch/torchrun.sh
source "$(dirname "$0")/job.sh"
exec torchrun --nnodes "${NODES:-1}" --nproc_per_node "${DEVICES:-8}" --node_rank "${NODE_RANK:-0}" \
    --master_addr "${MASTER_ADDR:-127.0.0.1}" --master_port "$port" scripts/train.py "${job[@]}"
