#!/usr/bin/env bash
# megatron_before.sh with ds_local: megatron_model.json has the shape, megatron_config.json batch,
# optimizer and schedule; text is read as it is, without a preprocessed .bin.
#     bash examples/ports/megatron_after.sh TEXT_FILE TOKENIZER_FOLDER OUTPUT_FOLDER
set -e
python scripts/prepare_data.py --source "$1" --validation-share 0.05 \
    --tokenizer "$2" --seq-len 64 --output "$3/data"
deepspeed --num_gpus 2 scripts/train.py \
    --model examples/ports/megatron_model.json \
    --data "$3/data" \
    --output "$3/run" \
    --num-stages 2 \
    --max-steps 20 --eval-every 10 --save-every 10 \
    --deepspeed --deepspeed_config examples/ports/megatron_config.json
python scripts/export_hf.py "$3/run" --output "$3/model"
