#!/usr/bin/env bash
# Trains one gated model of two layers with every regulariser, and scores the test split. Uses the
# GPU where there is one. What stands behind OUTPUT goes to fairseq-train and overrides the flags
# here. The learning rate is held, then decays: with more time give all three of --hold-steps,
# --decay-steps and --max-update.
#
#   bash examples/language_model/best_model.sh FOLDER OUTPUT [FLAG …]
#
# FOLDER holds one file each of train, valid and test, such as ptb.train.txt or wiki.train.tokens.
set -euo pipefail
text=${1:?folder with the text}
out=${2:?folder to write to}
shift 2
python=${PYTHON:-python}
plugin=$(cd "$(dirname "$0")/../../fairseq_lightrnn" && pwd)
task=(--user-dir "$plugin" --task lightrnn_language_modeling)
device=(--cpu)
if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then device=(); fi

mkdir -p "$out/best"
if [ ! -f "$out/bin/test.idx" ]; then
    "$python" -m fairseq_cli.preprocess --only-source --destdir "$out/bin" \
        --trainpref "$text"/*train.t* --validpref "$text"/*valid.t* --testpref "$text"/*test.t*
fi
"$python" -m fairseq_cli.train "$out/bin" "${task[@]}" "${device[@]}" --carry-hidden-state \
    --tokens-per-sample 70 --random-block-lengths --batch-size 64 \
    --arch lightrnn_lm_gated --embed-dim 1024 --hidden-size 1024 --num-layers 2 --word-dim 257 \
    --output-ffn-dim 2048 --dropout 0.4 --dropout-out 0.5 --regularise awd,activation=1,change=0.5 \
    --optimizer adam --weight-decay 0.03 --lr 0.002 --lr-scheduler tri_stage --warmup-steps 200 \
    --hold-steps 2200 --decay-steps 1900 --max-update 4300 --clip-norm 0.5 --seed 1 \
    --save-dir "$out/best" --no-epoch-checkpoints \
    --num-workers 0 --log-format json --log-interval 100 --log-file "$out/best/train.log" "$@"
"$python" -m fairseq_cli.eval_lm "$out/bin" "${task[@]}" "${device[@]}" --tokens-per-sample 70 \
    --batch-size 40 --path "$out/best/checkpoint_best.pt" --gen-subset test 2>&1 |
    tee "$out/best/test.log"
