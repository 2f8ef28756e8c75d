#!/usr/bin/env bash
# The demo (`make demo` builds what it needs and calls this): a small GPT learns to write like this project's own sources
# and documents, one byte a token, while its batch size follows the noise of its gradients. Writes data/demo_* and
# out/demo, which it makes anew each time. Arguments are passed on to the trainer: scripts/demo.sh --max-steps 20
set -euo pipefail
cd "$(dirname "$0")/.."

mkdir -p data out
build/text_to_tokens --out data/demo README.md Makefile ./*.c llmc/*.h dev/*/*.c dev/*/*.h

rm -rf out/demo
./train_gpt -i data/demo_train.bin -j data/demo_val.bin --tokenizer data/demo_tokenizer.bin -o out/demo \
    -e L=4,H=4,C=128,T=128 -b 8 -t 128 -d 8192 --max-tokens 1.2M \
    --lr 2e-3 --lr-schedule linear --final-lr-frac 0.1 --warmup 60K --weight-decay 0.1 \
    --batch-schedule gns --batch-min 4 --batch-max 64 \
    --val-every 200K --prompt 'static inline ' --temperature 0.8 --sample-every 600K --sample-length 200 "$@"
