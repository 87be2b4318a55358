#!/usr/bin/env bash
# The records of a GPU, in stages that each end in four minutes: benchmarks/gpu.sh [STAGE ...]
#
#   PYTHON=python3 benchmarks/gpu.sh                     all of them, in order
#   PYTHON=python3 benchmarks/gpu.sh tiny step-130m      these
#
# It runs from a source tree that is not installed. Records go to benchmarks/records; the tables of those made are printed
# at the end. A stage that fails or runs out of time is said, and the next one begins.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-.venv/bin/python}
export PYTHONPATH=src${PYTHONPATH:+:$PYTHONPATH}
stages=(tiny tests start step-60m step-130m step-350m step-1b compiled-60m compiled-130m compiled-350m compiled-1b
  memory decode-350m decode-1b trainer-60m trainer-130m)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

bench() { "$python" -m foldrank bench "$@" --device cuda --out benchmarks/records | tee -a "$work/tables"; }
methods=(dense cola cola-dlr cola-dlr-folded)

# Sequences of 256 at a time: dense beside the others fits into 80 GB.
batch_of() { case $1 in 1b) echo 16 ;; 350m) echo 64 ;; *) echo 128 ;; esac; }

tiny() {
  "$python" -m foldrank doctor &&
    "$python" -m foldrank pretrain demo --train.steps 8 --train.eval_every 4 --data.max_documents 100 --out "$work/run" &&
    "$python" -m foldrank generate "$work/run/folded" --prompt "def " --max-new-tokens 8 &&
    for benchmark in start step memory prefill decode trainer; do
      "$python" -m foldrank bench "$benchmark" --recipe tiny-cola-dlr --layers 1 --vocabulary 512 --rounds 2 --device cuda >/dev/null || return
    done
}
tests() { "$python" -m pytest -q -p no:benchmark -W ignore -m gpu; }
start() { bench start --recipe llama-1b-cola-dlr --rounds 2; }
step() { bench step --recipe "llama-$1-cola-dlr" --batch-size "$(batch_of "$1")" --methods "${methods[@]}" --rounds 8; }
compiled() { bench step --recipe "llama-$1-cola-dlr" --batch-size "$(batch_of "$1")" --methods "${methods[@]/%/-compiled}" --rounds 8; }
memory() { bench memory --recipe llama-350m-cola-dlr --batch-size 32 --methods "${methods[@]}" cola-dlr-latents cola-dlr-checkpointed cola-dlr-chunked-loss; }
decode() {
  bench decode --recipe "llama-$1-cola-dlr" --sequence-length 128 --new-tokens 64 --rounds 4 &&
    bench decode --recipe "llama-$1-cola-dlr" --sequence-length 128 --new-tokens 64 --rounds 4 --methods dense-compiled lowrank-compiled cola-dlr-compiled
}
# 131,072 tokens a step at 130M, 32,768 at 60M, against the loop that is written by hand.
trainer() { bench trainer --recipe "llama-$1-cola-dlr" --batch-size "$([[ $1 == 130m ]] && echo 512 || echo 128)" --methods cola-dlr-compiled --steps 12 --rounds 4; }

export -f bench tiny tests start step compiled memory decode trainer batch_of
export python work
failed=()
for stage in "${@:-${stages[@]}}"; do
  [[ " ${stages[*]} " == *" $stage "* ]] || { echo "no stage is called $stage: there are ${stages[*]}" >&2; exit 2; }
  echo "== $stage"
  began=$SECONDS
  # Arrays are not exported: each stage is a shell of its own that reads this file's again.
  timeout 240 bash -c "methods=(${methods[*]}); ${stage%%-*} $([[ $stage == *-* ]] && echo "${stage#*-}")" || failed+=("$stage")
  echo "== $stage: $((SECONDS - began)) s"
done
[[ -f $work/tables ]] && { echo; cat "$work/tables"; }
[[ ${#failed[@]} == 0 ]] || { echo "failed: ${failed[*]}" >&2; exit 1; }
