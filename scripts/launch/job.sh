# Sourced by the scripts beside it: what to train. Any of it can be set from outside, as in MODEL=configs/llama-1b.json.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
model=${MODEL:-configs/gpt2-xl.json}
config=${CONFIG:-configs/deepspeed/$(basename "$model")}
steps=${STEPS:-$(sed -n 's/.*"total_num_steps": *\([0-9]*\).*/\1/p' "$config")}
job=(--model "$model" --deepspeed_config "$config" --data "${DATA:-data/corpus}" --output "${RUN:-runs/$(basename "$model" .json)}"
     --max-steps "$steps" --num-stages "${STAGES:-8}" --save-every 1000 --eval-every 1000 --deepspeed "$@")
port=${PORT:-29500}
