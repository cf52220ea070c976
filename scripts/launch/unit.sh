#!/usr/bin/env bash
# One unit of stages that may die alone (docs/units.md); run it for each unit, on its machine:
#     UNIT=2 CONFIG=FILE bash scripts/launch/unit.sh [arguments of train.py]
# CONFIG sets local_parallel.link.reconnect_seconds. DEVICES: stages of the unit on this machine; CUDA_VISIBLE_DEVICES: their
# GPUs. RESTARTS: how often torchrun's agent starts the unit again; 0: whoever runs this does.
source "$(dirname "$0")/job.sh"
unit=${UNIT:?which unit is this, counted from 0?} devices=${DEVICES:-1} restarts=${RESTARTS:-1000}
agent=(torchrun --nproc_per_node "$devices" --max-restarts "$restarts" --shutdown-timeout 120)
if [ "${NODES:-1}" != 1 ]; then # each unit's agents meet at a port of their own
    agent+=(--nnodes "$NODES" --rdzv-backend c10d --rdzv-endpoint "${MASTER_ADDR:?of the unit}:$((port + unit))" --rdzv-id "unit-$unit")
else
    agent+=(--standalone)
    [ "$devices/$restarts" != 1/0 ] || agent=(python)
fi
exec "${agent[@]}" scripts/train.py "${job[@]}" --resume --unit "$unit"
