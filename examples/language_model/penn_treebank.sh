#!/usr/bin/env bash
# Trains the models of the comparison in README.md on Penn Treebank, one after the other, and scores
# the test split. Finished runs are kept; an interrupted one goes on where it stopped. Runs: random,
# random-reallocated, cooccurrence, cooccurrence-reallocated; all of them by default.
#
#   bash examples/language_model/penn_treebank.sh FOLDER_WITH_PTB_FILES OUTPUT_FOLDER [RUN …]
set -euo pipefail
text=${1:?folder with ptb.train.txt, ptb.valid.txt and ptb.test.txt}
out=${2:?folder to write to}
shift 2
runs=("$@")
[ ${#runs[@]} -gt 0 ] || runs=(random random-reallocated cooccurrence cooccurrence-reallocated)
plugin=$(cd "$(dirname "$0")/../../fairseq_lightrnn" && pwd)
task=(--user-dir "$plugin" --task lightrnn_language_modeling --tokens-per-sample 35)

mkdir -p "$out"
if [ ! -f "$out/bin/test.idx" ]; then
    fairseq-preprocess --only-source --trainpref "$text/ptb.train.txt" \
        --validpref "$text/ptb.valid.txt" --testpref "$text/ptb.test.txt" --destdir "$out/bin"
fi
for run in "${runs[@]}"; do
    table=${run%-reallocated} reallocation=()
    [ "$run" = "$table" ] || reallocation=(--reallocate-epochs 3,6)
    fairseq-train "$out/bin" "${task[@]}" --arch lightrnn_lm --dropout 0.2 \
        --initial-table "$table" "${reallocation[@]}" \
        --optimizer adam --lr 0.002 --clip-norm 1 --batch-size 64 --max-epoch 10 --seed 1 --cpu \
        --save-dir "$out/$run" --no-epoch-checkpoints --log-format json --log-interval 100 \
        --log-file "$out/$run.train.log" --num-workers 0
    fairseq-eval-lm "$out/bin" "${task[@]}" --path "$out/$run/checkpoint_best.pt" --cpu \
        --gen-subset test --batch-size 64 2>&1 | tee "$out/$run.test.log"
done
