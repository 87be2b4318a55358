#!/usr/bin/env bash
# The records of a CPU, about an hour on two cores with nothing else running: benchmarks/cpu.sh [foldrank's python]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${1:-.venv/bin/python}

bench() { "$python" -m foldrank.cli bench "$@" --out benchmarks/records >/dev/null; }
m350=(--recipe llama-350m-cola-dlr --layers 2 --vocabulary 2667)
m1b=(--recipe llama-1b-cola-dlr --layers 2 --vocabulary 2667)
dlr=(cola cola-dlr cola-dlr-folded cola-dlr-activations)

# What DLR costs in training, and what low rank saves.
bench step --methods "${dlr[@]}" --rounds 30
for _ in 1 2; do bench step --methods "${dlr[@]:0:3}" --rounds 24; done
bench step "${m350[@]}" --batch-size 4 --methods "${dlr[@]:0:3}" --rounds 20
bench step "${m1b[@]}" --batch-size 2 --methods "${dlr[@]:0:3}" --rounds 16
bench step "${m350[@]}" --batch-size 4 --methods dense "${dlr[@]}" --rounds 16 --profile
bench step "${m1b[@]}" --batch-size 2 --methods dense "${dlr[@]}" --rounds 12 --profile
bench step "${m350[@]}" --batch-size 16 --methods dense "${dlr[@]}" --rounds 8
bench step "${m1b[@]}" --batch-size 16 --methods dense "${dlr[@]}" --rounds 6
bench layer "${m350[@]}" --batch-size 4 --rounds 20
bench layer "${m1b[@]}" --batch-size 2 --rounds 20

# From a recipe to a model.
bench start --recipe llama-1b-cola-dlr --rounds 3

# Decoding and reading.
folded=(dense dense-columnwise lowrank lowrank-columnwise cola-dlr cola-dlr-columnwise)
bench decode --recipe llama-350m-cola-dlr --sequence-length 64 --methods "${folded[@]}" --rounds 8 --profile
bench decode --recipe llama-350m-cola-dlr --sequence-length 64 --rounds 8 --profile --methods \
  dense-compiled dense-columnwise-compiled cola-dlr-compiled cola-dlr-columnwise-compiled
bench decode --recipe llama-1b-cola-dlr --layers 4 --vocabulary 5333 --sequence-length 64 --methods "${folded[@]}" --rounds 10 --profile
bench prefill --recipe llama-350m-cola-dlr --layers 6 --vocabulary 8000 --sequence-length 512 --methods "${folded[@]}" --rounds 12

# Ways to train with less memory or time.
bench memory --methods dense "${dlr[@]:0:3}" cola-dlr-latents cola-dlr-checkpointed
bench memory "${m350[@]}" --batch-size 16 --methods dense "${dlr[@]:0:3}" cola-dlr-latents cola-dlr-checkpointed
bench memory --recipe llama-60m-cola-dlr --batch-size 8 --methods dense cola-dlr dense-chunked-loss cola-dlr-chunked-loss cola-dlr-latents-chunked-loss
bench step "${m350[@]}" --batch-size 4 --rounds 8 --methods \
  cola-dlr cola-dlr-compiled cola-dlr-bfloat16 cola-dlr-latents cola-dlr-checkpointed dense dense-compiled dense-bfloat16
bench step --recipe llama-60m-cola-dlr --batch-size 8 --rounds 6 --methods cola-dlr cola-dlr-chunked-loss
for model in "--recipe llama-350m-cola --layers 2 --vocabulary 2667 --batch-size 4" "--recipe llama-1b-cola --layers 2 --vocabulary 2667 --batch-size 2"; do
  # shellcheck disable=SC2086
  "$python" benchmarks/candidates.py $model --rounds 16 --out benchmarks/records >/dev/null
done

# What stands around the step.
bench trainer --recipe tiny-cola-dlr --rounds 10
bench trainer --rounds 6
bench loader --rounds 10
bench fold --recipe llama-1b-cola-dlr --rounds 5

# Freed memory given back, as glibc does it, in turns with the usual.
for _ in 1 2; do
  bench step --methods cola cola-dlr --rounds 10
  MALLOC_MMAP_MAX_=65536 bench step --methods cola cola-dlr --rounds 10
done
export MALLOC_MMAP_MAX_=65536
bench step "${m350[@]}" --batch-size 16 --methods dense "${dlr[@]:0:3}" --rounds 6
bench step "${m1b[@]}" --batch-size 16 --methods dense "${dlr[@]:0:3}" --rounds 4
"$python" -m foldrank.cli bench --report
