#!/usr/bin/env bash
# Runs a command, and again when it ends badly, at most STARTS_PER_HOUR (20) times within an hour:
#     bash scripts/launch/again.sh COMMAND [arguments]
# TERM is passed on, and then the command is not started again.
limit=${STARTS_PER_HOUR:-20} starts=() told=
pass_on() { jobs -p | xargs --no-run-if-empty kill -TERM; }
trap 'told=1; pass_on' TERM
while :; do
    starts+=("$SECONDS")
    "$@" &
    child=$!
    [ -z "$told" ] || pass_on # it was told in the moment of the start
    wait "$child" && exit 0
    while kill -0 "$child" 2>/dev/null; do wait "$child"; done # a signal ends a wait, not the command
    [ -z "$told" ] || exit 0
    if ((${#starts[@]} >= limit && SECONDS - starts[-limit] < 3600)); then
        echo "ended badly $limit times within an hour, so it is not started again: $*" >&2
        exit 1
    fi
done
