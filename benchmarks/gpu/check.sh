#!/usr/bin/env bash
# What is worth running in ten minutes on one GPU (written for an H100), most valuable first.
#
#   benchmarks/gpu/check.sh rehearse   the same on a CPU with small sizes, and what proves the candidates exact there;
#                                      `make gpu-rehearsal`, some minutes
#   benchmarks/gpu/check.sh            on the machine with the GPU: checks, then speed
#   benchmarks/gpu/check.sh checks     correctness alone: does a run start, is every path what it is on a CPU
#   benchmarks/gpu/check.sh speed      whole steps beside TRL's if it is installed, where their time and memory go, and
#                                      what each candidate gives
#   benchmarks/gpu/check.sh wheels     before, where that machine has no package index: puts into .whl what its image
#                                      lacks (Python 3.12, x86-64; 19 MB); a .whl at the root of the checkout is used
#
#   --minutes N        it ends a quarter of a minute before (10): what does not fit is skipped
#   --baseline FILE    the results.jsonl of another run: table.md has the ratio of each measurement to that
#   --shapes "S ..."   of whole steps, the most wanted first, such as 64x8:512/512: prompts x completions : tokens
#
# GPU_CHECK_ONLY has words between |: checks that have one in their name run alone. The interpreter is $PYTHON, or
# python3. Into $OUT, or a new folder, go log.txt, results.jsonl (a line per measurement), table.md (for RESULTS.md),
# errors.txt (tracebacks) and profile_*.txt. The exit status is 1 if a check failed, and 0 if all that had time passed.
#
# TRL samples by vLLM where that is installed. Its wheel alone has 279 MB, so `wheels` brings none, and TRL samples by
# transformers.
set -uo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
here=$root/benchmarks/gpu
python=${PYTHON:-python3}
usage() { sed -n '2,22p' "$0" >&2 && exit 2; }
part=all minutes="" baseline="" shapes=""
while [ $# -gt 0 ]; do
  case $1 in
    --*) [ $# -gt 1 ] || usage ;;&
    --minutes) [[ $2 =~ ^[0-9]+$ ]] && [ "$2" -gt 0 ] && minutes=$((10#$2)) || usage ;;
    --baseline) baseline=$(realpath -e "$2") || exit 2 ;;
    --shapes) shapes=$2 ;;
    all | rehearse | checks | speed | wheels) part=$1 && shift && continue ;;
    *) usage ;;
  esac
  shift 2
done
cd "$root" || exit 1

if [ "$part" = wheels ]; then
  "$python" -m pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
    --constraint constraints.txt --dest .whl \
    transformers annotated-types pydantic pydantic-core typing-inspection typing-extensions \
    jsonargparse docstring-parser typeshed-client trl datasets dill multiprocess
  exit
fi

export OUT=${OUT:-$(mktemp -d)} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 WANDB_MODE=offline TOKENIZERS_PARALLELISM=false \
  TRANSFORMERS_VERBOSITY=error TQDM_DISABLE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 \
  PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
export PYTHONPATH="$root:$root/benchmarks:$root/tests${PYTHONPATH:+:$PYTHONPATH}"
[ ! -f "$OUT/results.jsonl" ] || mv "$OUT/results.jsonl" "$OUT/results_before.jsonl"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
model=0.5B
if [ "$part" = rehearse ]; then
  model=toy minutes=${minutes:-60} shapes=${shapes:-2x4:16/12 2x4:32/12}
  export GPU_CHECK_DEVICE=cpu OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
fi
limit=$((60 * ${minutes:-10} - 15)) # seconds in all
read -ra shapes <<< "${shapes:-64x8:512/512 64x8:2048/512 16x8:512/512}"
if [ "$part" != rehearse ] && ls .whl/*.whl > /dev/null 2>&1; then
  "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$work/site" .whl/*.whl || exit 1
  export PYTHONPATH="$PYTHONPATH:$work/site"
fi

quiet() { # what libraries say; the exit status is that of the command before
  grep -v -e "Loading weights" -e "Writing model" -e "PU available" -e USDT -e Tip -e "Trainer.fit. stopped" \
    -e "is scored a row" -e "^{'train_runtime" -e '^$' || true
}

failed=0
run() { # run PERCENT PROGRAM ARGUMENTS...: it has this share of all time to begin in, what hangs is ended
  local left=$((limit - SECONDS)) most=$((limit * $1 / 100))
  local seconds=$((left < most ? left : most))
  [ $left -lt 15 ] && echo "== $2 ${*:3}: no time left" && return
  echo "== $2 ${*:3}, $SECONDS s after the start"
  GPU_CHECK_SECONDS=$seconds timeout $((left < seconds + 60 ? left : seconds + 60)) \
    "$python" "$here/$2.py" "${@:3}" 2>&1 | quiet || failed=1
}

speed() { # of each shape ours, then TRL's; what explains the first one's time comes before, all else at last
  local shape parts="ceilings train sample step"
  for shape in "${shapes[@]}"; do
    # shellcheck disable=SC2086
    run 40 speed --model $model --folder "$work/model" --shapes "$shape" --parts $parts
    run 40 peer_trl "$work/model" --shapes "$shape"
    parts="train step"
  done
  for parts in variants "candidates head optimizer profile"; do
    # shellcheck disable=SC2086
    run 100 speed --model $model --folder "$work/model" --shapes "${shapes[0]}" --parts $parts
  done
  [ "$part" = rehearse ] || run 100 peer_trl "$work/model" --shapes "${shapes[0]}" --sampler continuous
}

{
  if [ "$part" != rehearse ]; then
    nvidia-smi --query-gpu=name,memory.total,driver_version,clocks.sm --format=csv,noheader
  fi
  case $part in
    rehearse)
      for name in exactness stand_in checks; do run 100 $name; done
      speed
      ;;
    all)
      run 40 checks
      speed
      ;;
    checks) run 100 checks ;;
    speed) speed ;;
  esac
  [ ! -f "$OUT/results.jsonl" ] ||
    "$python" "$here/table.py" "$OUT/results.jsonl" ${baseline:+--baseline "$baseline"} | tee "$OUT/table.md" || failed=1
  echo "== end, $SECONDS s after the start; results in $OUT"
  exit $failed
} 2>&1 | tee "$OUT/log.txt"
