#!/usr/bin/env bash
# Over the machines of a hostfile, started from the first of them; needs pdsh, and ssh by key to each:
#     HOSTFILE=configs/hostfile bash scripts/launch/deepspeed.sh [arguments of train.py]
source "$(dirname "$0")/job.sh"
hostfile=${HOSTFILE:-configs/hostfile}
python scripts/check_cluster.py --hostfile "$hostfile"
exec deepspeed --hostfile "$hostfile" --master_port "$port" scripts/train.py "${job[@]}"
