#!/usr/bin/env bash
# Set-up and the main job on this machine, with GPUs if there are any:
#     bash scripts/quickstart.sh
source "$(dirname "$0")/setup.sh" ""

steps=300 stages=2
data=data/python-stdlib run=runs/quickstart model=out/quickstart

if [ ! -e "$data/prepared.json" ]; then
    python scripts/prepare_data.py --source python-stdlib --tokenizer sentencepiece:4096 --seq-len 128 --output "$data"
fi

if [ "$(python -c 'import torch; print(torch.cuda.device_count())')" -lt "$stages" ]; then
    export DS_ACCELERATOR=cpu OMP_NUM_THREADS=$((($(nproc) + stages - 1) / stages))
fi

if [ ! -e "$run/checkpoints/global_step$steps/ds_local.json" ]; then
    # a signal goes on to the ranks, which save and leave; the same command goes on from there
    trap 'pkill -TERM -P "$!" || kill -TERM "$!"; wait "$!"; exit 143' TERM INT HUP
    deepspeed --num_gpus "$stages" scripts/train.py --model configs/gpt2-nano.json --data "$data" --output "$run" \
        --max-steps "$steps" --eval-every 100 --save-every 100 --resume --deepspeed --deepspeed_config ds_config.json &
    wait "$!"
    trap - TERM INT HUP
else
    python scripts/summarize.py "$run"
fi

[ -e "$model/config.json" ] && [ "$model/config.json" -nt "$run/checkpoints/latest" ] || python scripts/export_hf.py "$run" --output "$model"
echo "--- the trained model continues 'def __init__(self' ---"
python scripts/generate.py "$model" --prompt "def __init__(self" --max-new-tokens 80
