#!/usr/bin/env bash
# run_clm_before.sh with ds_local: two GPUs are two stages, so a step of 32 sequences is 8
# micro-batches. run_clm_model.json has the --config_overrides, run_clm_config.json the rest.
#     bash examples/ports/run_clm_after.sh TEXT_FILE TOKENIZER_FOLDER OUTPUT_FOLDER
set -e
python scripts/prepare_data.py --source "$1" --validation-share 0.05 \
    --tokenizer "$2" --seq-len 64 --output "$3/data"
deepspeed --num_gpus 2 scripts/train.py \
    --model examples/ports/run_clm_model.json \
    --data "$3/data" \
    --output "$3/run" \
    --max-steps 20 --eval-every 10 \
    --save-every 10 --keep-last 2 --keep-best \
    --seed 42 \
    --deepspeed --deepspeed_config examples/ports/run_clm_config.json
python scripts/export_hf.py "$3/run/checkpoints/best" --output "$3/model"
