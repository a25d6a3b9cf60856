#!/usr/bin/env bash
# The extended runs: VQ-EMA and BA-VQ at K = 256 and 512, 30 epochs each.
# Logs in logs/<run_name>.log; finished runs are skipped; further flags go to train.py:
#     ./run_experiments.sh --seed 1 --out_dir experiments_seed1
cd "$(dirname "$0")" || exit 2
for word in "$@"; do
  case $word in
    --quantizer | --quantizer=* | --codebook_size | --codebook_size=* | --name | --name=*)
      echo "error: ${word%%=*}: set by the runs; drop it, or use train.py" >&2
      exit 2 ;;
    --overwrite)  # stopped half-way, those after it would keep their old results unnoticed
      echo "error: --overwrite: not for several runs; give another --out_dir, or use train.py" >&2
      exit 2 ;;
  esac
done
python=${PYTHON:-python}
"$python" train.py --dry_run --name check "$@" > /dev/null || exit 2  # one error line, not one a run
mkdir -p logs || exit 2
failed=()
report() {
  if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]} (see logs/)" >&2
    exit "$1"
  fi
}
trap 'echo "stopped; run ./run_experiments.sh again to continue" >&2; report 130; exit 130' INT
for codebook_size in 256 512; do
  for quantizer in vq_ema ba_vq; do
    name=${quantizer}_k${codebook_size}
    echo "== $name (log: logs/$name.log)"
    "$python" train.py --quantizer "$quantizer" --codebook_size "$codebook_size" --epochs 30 --batch_size 256 \
      --name "$name" --no_wandb "$@" 2>&1 | tee -i -a "logs/$name.log"
    code=${PIPESTATUS[0]}
    if [ "$code" -ne 0 ]; then
      failed+=("$name")
    fi
  done
done
report 1
