#!/usr/bin/env bash
# With accelerate; run it on each machine:
#     NODES=2 DEVICES=8 NODE_RANK=0 MASTER_ADDR=10.0.0.1 bash scripts/launch/accelerate.sh
# Only its launcher is used; what accelerate would configure is in the DeepSpeed config.
source "$(dirname "$0")/job.sh"
nodes=${NODES:-1} devices=${DEVICES:-8}
exec accelerate launch --multi_gpu --num_machines "$nodes" --num_processes $((nodes * devices)) --machine_rank "${NODE_RANK:-0}" \
    --main_process_ip "${MASTER_ADDR:-127.0.0.1}" --main_process_port "$port" --mixed_precision no --dynamo_backend no \
    scripts/train.py "${job[@]}"
