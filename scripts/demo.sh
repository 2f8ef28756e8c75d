#!/usr/bin/env bash
# The demo (`make demo` builds what it needs and calls this): a small GPT learns to write like this project's own sources
# and documents, one byte a token, while its batch size follows the noise of its gradients. Writes data/demo_* and
# out/demo, which it makes anew each time. Arguments are passed on to the trainer: scripts/demo.sh --seed 7
set -euo pipefail
cd "$(dirname "$0")/.."

lowest=4 highest=64 # bounds of the batch size

scripts/own_text.sh data/demo

mkdir -p out
rm -rf out/demo
./train_gpt -i data/demo_train.bin -j data/demo_val.bin --tokenizer data/demo_tokenizer.bin -o out/demo \
    -e L=4,H=4,C=128,T=128 -b 16 -t 128 -d 8192 --max-tokens 1500K \
    --lr 2e-3 --lr-schedule linear --final-lr-frac 0.1 --warmup 50K --weight-decay 0.1 \
    --batch-schedule gns --batch-min $lowest --batch-max $highest --gns-tau 30K \
    --val-every 250K --prompt 'static inline ' --temperature 0.8 --sample-every 1500K --sample-length 200 "$@"

# What the log says, in two lines; fails if the loss did not fall, or the batch did not move.
awk -F, -v lowest=$lowest -v highest=$highest '
    NR == 1 { for (i = 1; i <= NF; i++) column[$i] = i; next }
    NR == 2 { first = $column["train/lossf"] }
    $column["val/loss"] != "" { last = $column["val/loss"] }
    { b = $column["batch"]; if (b > lowest && b < highest && !seen[b]++) between++ }
    END {
        printf "\nThe loss fell from %.2f to %.2f (validation); the batch took %d sizes between its bounds of %d and %d.\n", \
            first, last, between, lowest, highest
        print "The whole run is in out/demo/log.csv; continue with more tokens by -y 1, or draw it: scripts/report.py out/demo"
        exit !(last < first && between >= 3)
    }' out/demo/log.csv
