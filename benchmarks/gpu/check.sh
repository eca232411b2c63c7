#!/usr/bin/env bash
# What is worth running in ten minutes on one GPU (written for an H100), most valuable first.
#
#   benchmarks/gpu/check.sh rehearse   the same on a CPU with small sizes, and what proves the candidates exact there;
#                                      `make gpu-rehearsal`, some minutes
#   benchmarks/gpu/check.sh            on the machine with the GPU: checks, then speed; 590 s at most
#   benchmarks/gpu/check.sh checks     correctness alone: does a run start, is every path what it is on a CPU
#   benchmarks/gpu/check.sh speed      where time and memory go, what each candidate gives; TRL beside it if installed
#   benchmarks/gpu/check.sh wheels     before, where that machine has no package index: puts into .whl what its image
#                                      lacks (Python 3.12, x86-64; 19 MB); a .whl at the root of the checkout is used
#
# The interpreter is $PYTHON, or python3. Into $OUT, or a new folder, go log.txt, results.jsonl (a line per measurement),
# errors.txt (tracebacks) and profile_*.txt. The exit status is 1 if a check failed, and 0 if all that had time passed.
set -uo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
here=$root/benchmarks/gpu
part=${1:-all}
python=${PYTHON:-python3}
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
  TRANSFORMERS_VERBOSITY=error TQDM_DISABLE=1 HF_HUB_DISABLE_PROGRESS_BARS=1
export PYTHONPATH="$root:$root/benchmarks:$root/tests${PYTHONPATH:+:$PYTHONPATH}"
limit=585 # seconds in all
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
case $part in
  rehearse)
    parts="exactness stand_in checks speed" seconds="600 600 600 600" model=toy limit=3600
    export GPU_CHECK_DEVICE=cpu OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    ;;
  all) parts="checks speed" seconds="230 200" model=0.5B ;;
  checks) parts=checks seconds=540 ;;
  speed) parts=speed seconds=400 model=0.5B ;;
  *) sed -n '2,13p' "$0" >&2 && exit 2 ;;
esac
if [ "$part" != rehearse ] && ls .whl/*.whl > /dev/null 2>&1; then
  "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$work/site" .whl/*.whl || exit 1
  export PYTHONPATH="$PYTHONPATH:$work/site"
fi

quiet() { # what libraries say; the exit status is that of the command before
  grep -v -e "Loading weights" -e "Writing model" -e "PU available" -e USDT -e Tip -e "Trainer.fit. stopped" \
    -e "is scored a row" -e "^{'train_runtime" -e '^$' || true
}

failed=0
run() { # run SECONDS PROGRAM ARGUMENTS...: what has not begun by then is skipped, what hangs is ended a little later
  echo "== $2, $SECONDS s after the start"
  local left=$((limit - SECONDS))
  GPU_CHECK_SECONDS=$1 timeout $((left < $1 + 60 ? left : $1 + 60)) "$python" "$here/$2.py" "${@:3}" 2>&1 | quiet || failed=1
}

{
  if [ "$part" != rehearse ]; then
    nvidia-smi --query-gpu=name,memory.total,driver_version,clocks.sm --format=csv,noheader
  fi
  read -ra budget <<< "$seconds"
  for name in $parts; do
    if [ "$name" = speed ]; then
      run "${budget[0]}" speed --model "$model" --folder "$work/model"
      run 100 peer_trl "$work/model"
      [ "$part" = rehearse ] || [ $SECONDS -gt 500 ] || run 20 peer_trl "$work/model" --continuous
    else
      run "${budget[0]}" "$name"
    fi
    budget=("${budget[@]:1}")
  done
  echo "== end, $SECONDS s after the start; results in $OUT"
  exit $failed
} 2>&1 | tee "$OUT/log.txt"
