#!/usr/bin/env bash
# A small GPT-2 from scratch with run_clm.py of transformers' examples, on two GPUs.
#     bash run_clm_before.sh TEXT_FILE TOKENIZER_FOLDER
set -e
deepspeed --num_gpus 2 run_clm.py \
    --config_name gpt2 \
    --config_overrides n_layer=4,n_embd=64,n_head=4,vocab_size=512,n_positions=64 \
    --tokenizer_name "$2" \
    --train_file "$1" \
    --validation_split_percentage 5 \
    --block_size 64 \
    --per_device_train_batch_size 4 \
    --gradient_accumulation_steps 4 \
    --learning_rate 2e-3 \
    --weight_decay 0.1 \
    --adam_beta2 0.95 \
    --lr_scheduler_type cosine \
    --warmup_steps 2 \
    --max_grad_norm 1.0 \
    --max_steps 20 \
    --eval_steps 10 \
    --save_steps 10 \
    --save_total_limit 2 \
    --load_best_model_at_end \
    --seed 42 \
    --output_dir runs/mine \
    --deepspeed trainer_config.json
