#!/usr/bin/env bash
# A small Llama-like model with pretrain_gpt.py of Megatron-DeepSpeed, on two GPUs, a stage each.
#     bash megatron_before.sh DATA_PREFIX TOKENIZER_MODEL
set -e
deepspeed --num_gpus 2 pretrain_gpt.py \
    --num-layers 4 --hidden-size 64 --ffn-hidden-size 176 --num-attention-heads 4 \
    --swiglu --normalization rmsnorm --use-rotary-position-embeddings \
    --untie-embeddings-and-output-weights \
    --seq-length 64 --max-position-embeddings 64 \
    --pipeline-model-parallel-size 2 \
    --micro-batch-size 4 --global-batch-size 32 \
    --train-iters 20 \
    --lr 2e-3 --min-lr 2e-4 --lr-decay-style WSD --lr-wsd-decay-iters 4 --lr-warmup-iters 2 \
    --clip-grad 1.0 --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 \
    --data-path "$1" --split 95,5,0 \
    --tokenizer-type SentencePieceTokenizer --tokenizer-model "$2" \
    --eval-interval 10 \
    --save runs/mine --save-interval 10
