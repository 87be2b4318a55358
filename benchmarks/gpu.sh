#!/usr/bin/env bash
# The records of a GPU: benchmarks/gpu.sh PEAK_FLOPS [foldrank's python]
# PEAK_FLOPS: of dense bfloat16 products, without sparsity, from the vendor's data sheet (989e12 for an H100 SXM).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
peak=${1:?"give the GPU's peak FLOP/s in bfloat16, without sparsity"}
python=${2:-.venv/bin/python}

bench() { "$python" -m foldrank.cli bench "$@" --device cuda --out benchmarks/records >/dev/null; }
methods=(dense cola cola-dlr cola-dlr-folded)

for size in 60m 130m 350m 1b; do
  recipe=(--recipe "llama-$size-cola-dlr")
  # 1B keeps fewer sequences, so that dense fits beside the others into 80 GB.
  batch=(--batch-size "$([[ $size == 1b ]] && echo 8 || echo 32)")
  bench step "${recipe[@]}" "${batch[@]}" --methods "${methods[@]}" --rounds 20 --peak-flops "$peak" --profile
  bench step "${recipe[@]}" "${batch[@]}" --methods "${methods[@]/%/-compiled}" --rounds 20 --peak-flops "$peak"
  bench memory "${recipe[@]}" "${batch[@]}" --methods "${methods[@]}" cola-dlr-latents cola-dlr-checkpointed cola-dlr-chunked-loss
  bench prefill "${recipe[@]}" --batch-size 8 --sequence-length 1024 --rounds 20
  bench decode "${recipe[@]}" --sequence-length 128 --new-tokens 64 --rounds 10
  bench decode "${recipe[@]}" --sequence-length 128 --new-tokens 64 --rounds 10 --methods dense-compiled lowrank-compiled cola-dlr-compiled
done
bench layer --recipe llama-350m-cola-dlr --batch-size 32 --rounds 20
bench layer --recipe llama-1b-cola-dlr --batch-size 32 --rounds 20
"$python" -m foldrank.cli bench --report
