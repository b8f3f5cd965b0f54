#!/usr/bin/env bash
# Reallocation at 415,000 words beside the epoch that it follows: trains one epoch on every tenth
# line of the German laws with the vocabulary of all of them, reallocates, and writes the statistics
# for scripts/benchmark_allocation.py --instances. EVERY=100 takes every hundredth line.
#
#   bash examples/allocation/gesetze.sh FOLDER_WITH_GESETZE_FILES OUTPUT_FOLDER
set -euo pipefail
text=${1:?folder with gesetze.train.txt and gesetze.valid.txt}
out=${2:?folder to write to}
plugin=$(cd "$(dirname "$0")/../../fairseq_lightrnn" && pwd)
mkdir -p "$out"
[ -f "$out/all/dict.txt" ] || fairseq-preprocess --only-source --dict-only \
    --trainpref "$text/gesetze.train.txt" --destdir "$out/all"
if [ ! -f "$out/bin/valid.idx" ]; then
    awk -v every="${EVERY:-10}" '(NR - 1) % every == 0' "$text/gesetze.train.txt" > "$out/part.txt"
    fairseq-preprocess --only-source --srcdict "$out/all/dict.txt" --trainpref "$out/part.txt" \
        --validpref "$text/gesetze.valid.txt" --destdir "$out/bin"
fi
fairseq-train "$out/bin" --user-dir "$plugin" --task lightrnn_language_modeling \
    --tokens-per-sample 35 --arch lightrnn_lm --dropout 0.2 \
    --initial-table random --reallocate-epochs 1 --reallocation-objective row-first \
    --max-epoch 2 --max-update 1200 \
    --optimizer adam --lr 0.002 --clip-norm 1 --batch-size 64 --seed 1 --cpu --num-workers 0 \
    --save-dir "$out/model" --no-epoch-checkpoints --disable-validation --log-format json \
    --log-interval 100 --log-file "$out/train.log"
if [ ! -e "$out/gesetze-415k" ]; then
    lightrnn-reallocate "$out/model/checkpoint_last.pt" "$out/bin" --output "$out/new.pt" \
        --objective row-first \
        --report "$out/report.json" --export "$out/gesetze-415k" --max-tokens 4096
fi
