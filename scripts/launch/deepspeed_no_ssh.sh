#!/usr/bin/env bash
# Over the machines of a hostfile without ssh; run it on each machine, with its line in the hostfile counted from 0:
#     NODE_RANK=0 MASTER_ADDR=10.0.0.1 HOSTFILE=configs/hostfile bash scripts/launch/deepspeed_no_ssh.sh
source "$(dirname "$0")/job.sh"
hostfile=${HOSTFILE:-configs/hostfile}
[ -e "$hostfile" ] || { echo "there is no hostfile $hostfile; set HOSTFILE" >&2; exit 1; }
exec deepspeed --hostfile "$hostfile" --no_ssh --node_rank "${NODE_RANK:?which line of the hostfile is this machine?}" \
    --master_addr "${MASTER_ADDR:?address of the first machine}" --master_port "$port" scripts/train.py "${job[@]}"
