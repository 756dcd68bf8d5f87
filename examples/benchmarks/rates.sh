#!/usr/bin/env bash
# The rates of this folder's pages, each beside a matrix product on the same device: JSON lines in OUT, default rates.jsonl.
#
#   bash examples/benchmarks/rates.sh train-16 sample-16 sample-30     some groups, in this order
#   bash examples/benchmarks/rates.sh                                  names the groups
#
# Each measurement is a process of its own that ends after LIMIT seconds, default 300: one that fails or takes long costs
# the others nothing. Written for one H100 80GB, compiling included.
set -uo pipefail
OUT=${OUT:-rates.jsonl} LIMIT=${LIMIT:-300} PYTHON=${PYTHON:-python3}

bench() {
  echo "varcli bench $*" >&2
  timeout -k 10 "$LIMIT" "$PYTHON" -m varcli bench "$@" >> "$OUT" || echo "  ended with $?" >&2
}

train() {  # depth, batch
  bench train --depth "$1" --batch-size "$2" --compile --json
  bench train --depth "$1" --batch-size "$2" --compile --fp8 --json
}

sample() {  # depth, further options
  bench sample --depth "$1" --batch-size 1 --batch-size 64 --compile "${@:2}" --json
  bench sample --depth "$1" --batch-size 8 --batch-size 256 --compile "${@:2}" --json
}

scaling() {  # processes
  echo "varcli bench train, $1 processes" >&2
  timeout -k 10 "$LIMIT" "$PYTHON" -m torch.distributed.run --nproc-per-node "$1" -m varcli bench train --depth 16 --batch-size 96 \
    --compile --parallel ddp --parallel fsdp --profile --json >> "$OUT" || echo "  ended with $?" >&2
}

[ $# -gt 0 ] || set -- help
for group in "$@"; do
  case "$group" in
    train-16) train 16 96; train 16 160 ;;
    train-20) train 20 64 ;;
    train-24) train 24 32 ;;
    train-30) train 30 24 ;;
    sample-16) sample 16 ;;
    sample-30) sample 30 ;;
    sample-16-fp8) sample 16 --fp8 ;;
    sample-30-fp8) sample 30 --fp8 ;;
    scaling-2) scaling 2 ;;
    scaling-8) scaling 8 ;;
    tokenize)
      bench tokenize --precision fp16 --batch-size 128 --compile --json
      bench tokenize --precision fp32 --batch-size 64 --json
      bench tokenize-files --precision fp16 --batch-size 128 --compile --json
      ;;
    profile)  # text: the kernels that the time goes to
      bench train --depth 16 --batch-size 96 --compile --kernels torch --profile
      bench train --depth 16 --batch-size 96 --compile --kernels triton --profile
      bench sample --depth 16 --batch-size 1 --compile --profile
      bench sample --depth 16 --batch-size 64 --compile --profile
      ;;
    *)
      sed -n 's/^    \([a-z0-9-]*\)).*/\1/p' "$0" | paste -sd " " | sed "s/^/groups: /" >&2
      exit 2
      ;;
  esac
done
