#!/usr/bin/env bash
# The rates of this folder's pages, each group beside a matrix product on the same device: one JSON line a measurement.
#
#   bash examples/benchmarks/rates.sh train    > train.jsonl      d16 with torch's and with our kernels; d20, d24, d30
#   bash examples/benchmarks/rates.sh sample   > sample.jsonl     d16 and d30, batches from 1 on, whole and by part
#   bash examples/benchmarks/rates.sh tokenize > tokenize.jsonl   pixels to codes, JPEG files to codes on disk
#   bash examples/benchmarks/rates.sh profile  > profile.txt      which kernels the time goes to
#
# Written for one H100 80GB, where each group is meant to take less than ten minutes, compiling included (not yet timed).
set -euo pipefail

bench() { varcli bench "$@" --compile; }

case "${1:-}" in
  train)
    bench train --depth 16 --batch-size 96 --batch-size 128 --kernels torch --kernels triton --json
    for depth in 20:96 24:48 30:16; do
      bench train --depth "${depth%:*}" --batch-size "${depth#*:}" --kernels torch --kernels triton --json
    done
    ;;
  sample)
    bench sample --depth 16 --batch-size 1 --batch-size 8 --batch-size 64 --batch-size 256 --json
    bench sample --depth 30 --batch-size 1 --batch-size 8 --batch-size 64 --batch-size 256 --json
    ;;
  tokenize)
    bench tokenize --precision bf16 --batch-size 64 --batch-size 128 --json
    varcli bench tokenize --precision fp32 --batch-size 64 --json
    bench tokenize-files --precision bf16 --json
    ;;
  profile)
    bench train --depth 16 --batch-size 96 --kernels torch --kernels triton --profile
    bench sample --depth 16 --batch-size 1 --batch-size 64 --profile
    bench tokenize --precision bf16 --batch-size 64 --profile
    ;;
  *)
    sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
