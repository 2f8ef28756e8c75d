#!/bin/sh
# Whole runs of the CUDA trainer, alone and in turns with the CPU trainer, on a tiny data set; from the repository's root:
#     sh dev/test/gpu_runs.sh [CPU_TRAINER [GPU_TRAINER]]
# Needs build/text_to_tokens. Ends with the line "N passed, N failed"; the exit status is 1 if any test failed.
cpu=${1:-./train_gpt} gpu=${2:-./train_gptcu}
folder=$(mktemp -d) || exit 1
trap 'rm -rf "$folder"' EXIT
passed=0 failed=0

build/text_to_tokens --out "$folder/data" README.md llmc/model.h llmc/train.h >/dev/null || exit 1

# Two layers, erf GELU, a cosine block. Nothing depends on the budget, so that a run may end early and go on: the learning
# rate is constant after its warmup (and so low that differences of rounding do not grow), the noise scale's memory is given.
options="-i $folder/data_train.bin -j $folder/data_val.bin -e L=2,H=4,C=64,T=64 --gelu erf --cosine-attention 1
         -b 6 -t 64 -d 1024 --lr 1e-3 --warmup 5steps --lr-schedule constant --gns-all-every 3 --gns-tau 5K --val-every 5steps
         --val-tokens 4096 --log-tensors all --grad-clip 0.5"

# start TRAINER OUT OPTION...: a run with these options; what it says goes to OUT.txt and OUT.err
start() {
    trainer=$1 out=$2
    shift 2
    "$trainer" $options -o "$folder/$out" -y 1 "$@" >"$folder/$out.txt" 2>"$folder/$out.err"
}

# The log without the columns that measure time.
timeless() {
    awk -F, 'NR == 1 { for (i = 1; i <= NF; i++) time[i] = $i == "dt" || $i == "tokens_per_sec" || $i == "mfu" }
             { for (i = 1; i <= NF; i++) if (!time[i]) printf "%s,", $i; print "" }' "$folder/$1/log.csv"
}

# same_runs A B STEP: the same log, and the same bits in the checkpoint after this many steps
same_runs() {
    timeless "$1" >"$folder/log1" && timeless "$2" >"$folder/log2" && cmp "$folder/log1" "$folder/log2" || return 1
    [ "$(wc -l <"$folder/log1")" -eq $(($3 + 1)) ] || return 1
    for file in model.bin optimizer.bin state.txt; do
        step=$(printf 'step_%08d' "$3")
        cmp "$folder/$1/checkpoints/$step/$file" "$folder/$2/checkpoints/$step/$file" || return 1
    done
}

# The column of the log, a number a line.
column() {
    awk -F, -v name="$2" 'NR == 1 { for (i = 1; i <= NF; i++) if ($i == name) c = i; next } $c != "" { print $c }' \
        "$folder/$1/log.csv"
}

# close_numbers N: two files of N numbers, file1 and file2, differ by at most 0.5% each
close_numbers() {
    paste "$folder/file1" "$folder/file2" | awk -v wanted="$1" '
        { d = $1 / $2 - 1; if (!(d * d <= 0.005 * 0.005)) { print "line " NR ": " $1 " and " $2; bad = 1 } }
        END { exit bad || NR != wanted }'
}

# close_runs A B N: the same losses in N rows, but for rounding
close_runs() {
    column "$1" train/lossf >"$folder/file1" && column "$2" train/lossf >"$folder/file2" && close_numbers "$3"
}

# whole_and_halves WHOLE HALVES OPTION...: twenty steps at once leave what ten and, in another process, ten more leave, to
# the bit
whole_and_halves() {
    whole=$1 halves=$2
    shift 2
    start "$gpu" "$whole" -x 20 "$@" && start "$gpu" "$halves" -x 10 "$@" && start "$gpu" "$halves" -x 20 "$@" &&
        grep -q 'resuming    from' "$folder/$halves.txt" && same_runs "$whole" "$halves" 20
}

# A schedule of twenty steps, every one of another size. As in a run of 16 sequences a step, the first ten take 160, all 320.
moving_batch() {
    tokens=0 steps=
    for size in 3 7 16 40 5 23 12 31 1 22 2 37 9 26 4 19 11 28 6 18; do
        steps=$steps,$tokens:$size
        tokens=$((tokens + 64 * size))
    done
    echo "steps:${steps#,}"
}

# Also with a batch that moves: in micro-batches of one to six sequences, whose products have their algorithms chosen anew.
ten_and_ten() {
    whole_and_halves whole halves && whole_and_halves moving moving_halves --batch-schedule "$(moving_batch)" &&
        [ "$(column moving batch | sort -u | wc -l)" -eq 20 ]
}

# Killed somewhere after its first checkpoint and resumed, a run leaves what the unbroken one leaves.
killed() {
    start "$gpu" unbroken -x 300 --keep 0 -n 20steps || return 1
    "$gpu" $options -o "$folder/killed" -x 300 --keep 0 -n 20steps >"$folder/killed.txt" 2>&1 &
    process=$!
    for i in $(seq 3000); do
        grep -q 'checkpoint at step' "$folder/killed.txt" && break
        sleep 0.02
    done
    kill -9 $process
    wait $process 2>/dev/null
    [ $? -eq 137 ] || return 1
    start "$gpu" killed -x 300 --keep 0 -n 20steps && same_runs unbroken killed 300
}

# The losses of 20 steps are those of the CPU trainer; so are they if one of the two takes over after ten.
takes_over() {
    start "$cpu" on_cpu -x 20 && close_runs whole on_cpu 20 || return 1
    start "$cpu" cpu_first -x 10 && start "$gpu" cpu_first -x 20 && close_runs cpu_first on_cpu 20 || return 1
    start "$gpu" gpu_first -x 10 && start "$cpu" gpu_first -x 20 && close_runs gpu_first on_cpu 20
}

# Both find the same validation loss in the same checkpoint.
evaluates() {
    start "$cpu" on_cpu --eval-only && sed -n 's/^eval | val loss //p' "$folder/on_cpu.txt" >"$folder/file1" &&
        start "$gpu" on_cpu --eval-only && sed -n 's/^eval | val loss //p' "$folder/on_cpu.txt" >"$folder/file2" &&
        close_numbers 1
}

# Micro-batches and what is computed again are the machine's business: the run stays the same but for rounding.
other_settings() {
    for recompute in 0 1 2; do
        start "$gpu" "recompute$recompute" -x 20 --recompute $recompute -b $((4 * recompute + 3)) &&
            close_runs whole "recompute$recompute" 20 || return 1
    done
}

# refused MODEL TEXT: the command is wrong: status 2, one line that contains the text, and nothing is written
refused() {
    start "$gpu" refused -x 20 -e "$1"
    [ $? -eq 2 ] && [ "$(wc -l <"$folder/refused.err")" -eq 1 ] && grep -q "$2" "$folder/refused.err" &&
        [ ! -e "$folder/refused" ]
}

refusals() {
    refused L=2,H=3,C=36,T=64 'heads of 16, 32, 48' && refused L=2,H=2,C=20,T=64 '20 channels in 2 heads' &&
        refused L=2,H=1,C=144,T=64 'not of 144'
}

for test in ten_and_ten killed takes_over evaluates other_settings refusals; do
    if $test >"$folder/output" 2>&1; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        echo "FAILED $test"
        cat "$folder/output"
        cat "$folder"/*.err # whatever the runs had to say
    fi
done
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
