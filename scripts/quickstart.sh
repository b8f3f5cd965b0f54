#!/usr/bin/env bash
# Trains and evaluates a language model with a word table on real text.
# See `bash scripts/quickstart.sh --help`.
set -euo pipefail

usage() {
    cat <<'TEXT'
Usage: bash scripts/quickstart.sh [OPTIONS] [TRAIN VALID TEST]

Sets everything up, trains the recommended language model with fairseq's own commands, and shows what
came of it: about five minutes on two cores.

Without files, the text is documentation that is already on this machine: the docstrings and help
texts of the Python standard library, numpy and scipy. TRAIN VALID TEST are text files of your
own: UTF-8, one sentence a line, words separated by spaces.

What an earlier run has finished is reused as long as its input is the same.

Options:
  --out DIR                  folder for everything that is made
                             (default: runs/quickstart, with own files runs/quickstart-own)
  --tokenize                 split the words of own files and drop their case first
  --epochs N                 epochs of training (default: 2)
  --width N                  width of the embeddings and of the LSTM (default: the model's own)
  --min-count N              words seen less often in TRAIN become <unk> (default: 2)
  --prompt TEXT              words to continue at the end (default: a fixed one, with own files the
                             beginning of a line of TEST)
  --seed N                   seed of everything random (default: 1)
  -h, --help                 show this text
TEXT
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
tools="$root/scripts/quickstart"

mistake() {
    printf 'quickstart: %s\n' "$1" >&2
    printf 'See: bash scripts/quickstart.sh --help\n' >&2
    exit 2
}

whole_number() { # FLAG VALUE LEAST
    if ! [[ $2 =~ ^[1-9][0-9]{0,8}$ ]] || (($2 < $3)); then
        mistake "$1 $2: give a whole number, at least $3"
    fi
}

# --- the command line -----------------------------------------------------------------------------

out='' tokenize=0 epochs=2 width='' min_count=2 prompt='' seed=1
files=()
while (($#)); do
    case $1 in
        -h | --help) usage && exit 0 ;;
        --tokenize) tokenize=1 ;;
        --out | --epochs | --width | --min-count | --prompt | --seed)
            [[ $# -ge 2 && -n $2 ]] || mistake "$1 needs a value"
            case $1 in
                --out) out=$2 ;;
                --epochs) epochs=$2 ;;
                --width) width=$2 ;;
                --min-count) min_count=$2 ;;
                --prompt) prompt=$2 ;;
                --seed) seed=$2 ;;
            esac
            shift
            ;;
        -*) mistake "unknown option $1" ;;
        *) files+=("$1") ;;
    esac
    shift
done
whole_number --epochs "$epochs" 1
[[ -z $width ]] || whole_number --width "$width" 1
whole_number --min-count "$min_count" 1
whole_number --seed "$seed" 1
case ${#files[@]} in
    0)
        ((tokenize == 0)) || mistake "--tokenize is for files of your own: give TRAIN VALID TEST"
        out=${out:-$root/runs/quickstart}
        ;;
    3)
        for file in "${files[@]}"; do
            [[ -f $file && -r $file ]] || mistake "$file is not a file that can be read"
            [[ -s $file ]] || mistake "$file is empty: give a text of one sentence a line"
        done
        mapfile -t files < <(realpath -- "${files[@]}")
        out=${out:-$root/runs/quickstart-own}
        ;;
    *) mistake "give three text files, TRAIN VALID TEST, or none (got ${#files[@]})" ;;
esac
mkdir -p -- "$out" || mistake "--out $out: the folder cannot be made"
out=$(realpath -- "$out")
cd "$root"
# Shown commands are easier to read with short paths.
out=${out#"$root"/}
logs=$out/logs steps=$out/steps
mkdir -p "$logs" "$steps"
if command -v flock >/dev/null; then
    exec 9>"$steps/lock"
    flock -n 9 || mistake "another quickstart is at work in $out: wait for it or give another --out"
fi

# --- steps ----------------------------------------------------------------------------------------
# A step is skipped if it was finished with the same key, a hash of its input and its command. The
# key of a step is part of the keys of those that use what it made.

step='' hint='' step_log=''

failed() {
    local status=$1
    trap - EXIT
    ((status == 0)) && exit 0
    if [[ -z $step ]]; then
        exit "$status"
    fi
    printf '\nquickstart: the step "%s" ' "$step" >&2
    if ((status == 130)); then
        printf 'was interrupted. Run the same command again to go on.\n' >&2
    else
        printf 'failed (exit status %s).\n' "$status" >&2
        if [[ -n $step_log ]]; then
            printf '  Its last words:\n' >&2
            tail -n 8 -- "$step_log" | cut -c 1-300 | sed 's/^/    /' >&2
            printf '  Its complete output: %s\n' "$step_log" >&2
        fi
        printf '  What to do: %s\n' "$hint" >&2
    fi
    exit "$status"
}
trap 'failed $?' EXIT
trap 'exit 130' INT

number=0
begin() { # NAME TITLE HINT
    step=$1 hint=$3 step_log='' started=$SECONDS
    number=$((number + 1))
    printf '[%d/7] %s\n' "$number" "$2"
}

say() { printf '      %s\n' "$1"; }

key_of() { printf '%s\n' "$@" | sha256sum | cut -d' ' -f1; }

is_done() { # KEY: the step was finished with this key
    [[ -f $steps/$step.done && $(<"$steps/$step.done") == "$1" ]]
}

finish() { # KEY
    printf '%s\n' "$((SECONDS - started))" >"$steps/$step.seconds"
    printf '%s\n' "$1" >"$steps/$step.done"
}

run() { # COMMAND...: shows it, runs it, keeps its output in the step's log
    step_log=$logs/$step.log
    printf '$ %s\n' "$(shown "$@")" | tee -a "$step_log"
    "$@" 2>&1 | python "$tools/progress.py" "$step_log" ${shown_epochs:+"$shown_epochs"}
}

shown() { # COMMAND...: as one would type it, in lines of 100 characters
    local word line='' text=''
    for word; do
        [[ $word =~ ^[A-Za-z0-9_./:,=+@%-]+$ ]] || word="'${word//\'/\'\\\'\'}'"
        if ((${#line} + ${#word} > 94)) && [[ $word == --* ]]; then
            text+="$line\\"$'\n    '
            line=''
        fi
        line+="$word "
    done
    text+=$line
    printf '%s' "${text% }"
}

shown_epochs='' # of the step, where it is a training

# --- set-up ---------------------------------------------------------------------------------------

begin setup "Set-up" "see the messages above; most often the package index cannot be reached"
step_log=$logs/setup.log
bash scripts/setup.sh 2>&1 | tee "$step_log" | sed -un 's/^setup: /      /p'
# shellcheck disable=SC1091
source .venv/bin/activate
finish setup

# --- corpus ---------------------------------------------------------------------------------------

begin corpus "Text" "see the message above"
corpus=$out/corpus
if ((${#files[@]})); then
    arguments=(own "${files[@]}")
    ((tokenize == 0)) || arguments+=(--tokenize)
else
    arguments=(build)
fi
run python scripts/quickstart/corpus.py "${arguments[@]}" --out "$corpus"
key=$(python -c 'import json, sys; print(json.load(open(sys.argv[1]))["corpus_sha256"])' \
    "$corpus/manifest.json")
is_done "$key" || finish "$key"

# --- binarised data -------------------------------------------------------------------------------

begin preprocess "Vocabulary, and the text as numbers" "look into its output for the file that it names"
data=$out/data
command=(fairseq-preprocess --only-source --trainpref "$corpus/train.txt"
    --validpref "$corpus/valid.txt" --testpref "$corpus/test.txt" --destdir "$data"
    --thresholdsrc "$min_count" --padding-factor 1 --workers 2)
key=$(key_of "$key" "${command[@]}")
if is_done "$key" && [[ -s $data/train.bin ]]; then
    say "done before with the same text: $data"
else
    rm -rf "$data" "$logs/preprocess.log"
    run "${command[@]}"
    finish "$key"
fi

# --- training -------------------------------------------------------------------------------------

begin train "Training" \
    "run the same command again, it goes on after the last finished epoch; if memory is short, with a smaller --width"
checkpoints=$out/checkpoints
rates='' # one for each epoch, the last one lower
for ((epoch = 1; epoch < epochs; epoch++)); do rates+=0.004,; done
rates+=0.0015
command=(fairseq-train "$data" --user-dir fairseq_lightrnn --task lightrnn_language_modeling
    --arch lightrnn_lm_gated)
[[ -z $width ]] || command+=(--embed-dim "$width" --hidden-size "$width")
command+=(--tokens-per-sample 64 --batch-size 32
    --optimizer adam --lr "$rates" --lr-scheduler fixed --warmup-updates 100 --clip-norm 1
    --max-epoch "$epochs" --no-epoch-checkpoints --save-dir "$checkpoints"
    --seed "$seed" --num-workers 0 --log-format json --log-interval 20)
# Another version of the plugin is another model.
plugin=$(find fairseq_lightrnn -name '*.py' -not -path '*/commands/*' | LC_ALL=C sort | xargs cat | sha256sum)
key=$(key_of "$key" "$plugin" "${command[@]}")
if is_done "$key" && [[ -s $checkpoints/checkpoint_best.pt ]]; then
    say "done before with the same text and settings: $checkpoints"
else
    if [[ -f $steps/train.begun && $(<"$steps/train.begun") == "$key" ]]; then
        say "going on with the training that was begun before: $checkpoints"
    else
        rm -rf "$checkpoints" "$logs/train.log"
        printf '%s\n' "$key" >"$steps/train.begun"
    fi
    shown_epochs=$epochs
    run "${command[@]}"
    shown_epochs=''
    finish "$key"
fi
best=$checkpoints/checkpoint_best.pt

# --- evaluation -----------------------------------------------------------------------------------

begin evaluate "Evaluation on the test text" \
    "if the checkpoint cannot be read, delete $checkpoints and run the same command again"
command=(fairseq-eval-lm "$data" --user-dir fairseq_lightrnn --task lightrnn_language_modeling
    --path "$best" --gen-subset test --tokens-per-sample 64 --batch-size 64 --log-format none)
evaluate_key=$(key_of "$key" "${command[@]}")
if is_done "$evaluate_key"; then
    say "done before with the same model: $logs/evaluate.log"
else
    rm -f "$logs/evaluate.log"
    run "${command[@]}"
    finish "$evaluate_key"
fi

# --- a prompt -------------------------------------------------------------------------------------

begin continue "A prompt continued" "give other words with --prompt"
if [[ -z $prompt ]]; then
    if ((${#files[@]})); then
        prompt=$(awk 'NF >= 4 { print $1, $2, $3; found = 1; exit } { if (!first) first = $1 }
            END { if (!found) print first }' "$corpus/test.txt")
    else
        prompt='this function returns'
    fi
elif ((${#files[@]} == 0 || tokenize)); then
    prompt=$(PYTHONPATH=$tools python -c \
        'import sys; from prose import tokenize; print(*tokenize(sys.argv[1]))' "$prompt")
fi
command=(fairseq-interactive "$data" --user-dir fairseq_lightrnn --task lightrnn_language_modeling
    --path "$best" --beam 1 --sampling --sampling-topk 10 --unkpen 100 --max-len-b 40
    --seed "$seed")
continue_key=$(key_of "$key" "$prompt" "${command[@]}")
if is_done "$continue_key"; then
    say "done before with the same model: $logs/continue.log"
else
    rm -f "$logs/continue.log"
    printf '$ echo %s |\n' "$(shown "$prompt")"
    run "${command[@]}" <<<"$prompt"
    finish "$continue_key"
fi

# --- summary --------------------------------------------------------------------------------------

begin summary "Summary" "see the message above; deleting $out and running again begins anew"
python "$tools/summary.py" --out "$out" --checkpoint "$best" --seed "$seed" --prompt "$prompt"
step=''
printf '\nAll of it took %d min %02d s. To run the commands above yourself: source .venv/bin/activate\n' \
    $((SECONDS / 60)) $((SECONDS % 60))
