#!/usr/bin/env bash
# Everything that needs a GPU, in steps of at most ten minutes each; a step that has ended is skipped next time.
#
#     benchmarks/gpu_suite.sh                    # all steps
#     benchmarks/gpu_suite.sh tests speed        # some: tests speed fused memory scaling sweep large seeds
#     SMALL=1 benchmarks/gpu_suite.sh            # rehearsal with tiny sizes, on any machine, in a copy that is then deleted
#
# Output goes to results/gpu/STEP.md, JSON to results/speed, results/compare and experiments; results/gpu_suite.md is all of it together
# (results/gpu.md: that of one H200). results/summary.md, rate_distortion.png and scaling.md are made anew.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
interpret=
if [ -n "${SMALL:-}" ]; then  # figures of a rehearsal must not pass for measurements, nor its marks for finished steps
  copy=$(mktemp -d)
  trap 'rm -rf "$copy"' EXIT
  tar --exclude=./.git --exclude=./.venv --exclude=./data --exclude=./experiments --exclude=./results/gpu -cf - . | tar -xf - -C "$copy"
  python=$(command -v "$python")  # absolute, where it was given as a path into this folder
  case $python in /*) ;; *) python=$PWD/$python ;; esac
  cd "$copy"
  "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || interpret="env TRITON_INTERPRET=1"
fi
all="tests speed fused memory scaling sweep large seeds"
steps=("$@")
[ ${#steps[@]} -gt 0 ] || steps=($all)
for step in "${steps[@]}"; do
  case " $all " in *" $step "*) ;; *) echo "no step $step: $all" >&2; exit 2 ;; esac
done
out=results/gpu
mkdir -p "$out"

if [ -n "${SMALL:-}" ]; then
  sizes="--codebook_sizes 64,256 --latent_dims 8 --vectors 1024"
  network="--hidden_dim 8 --latent_dim 8 --batch_size 16 --steps 2"
  sweep="--dataset dead_leaves --train_subset 256 --test_subset 64 --val_size 64 --hidden_dim 8 --latent_dim 8 --epochs 1"
  large="--dataset dead_leaves --train_subset 256 --test_subset 64 --val_size 64 --hidden_dim 8 --epochs 1"
  large_sizes=512; jobs=2; seeds=0; scaling="--tiny"
else
  sizes="--codebook_sizes 512,1024,4096,16384,65536,262144"
  network="--steps 60"
  sweep=""
  large="--epochs 50 --hidden_dim 128 --batch_size 256"
  large_sizes=16384; jobs=4; seeds=0,1,2; scaling="--max_processes 1 --methods vq_ema,ba_vq_chunked,ba_vq_fused"
fi

run_step() {
  local methods=ba_vq_lambda10_predictive_trellis,ba_vq_lambdainf_predictive_trellis,vq_ema_predictive_trellis
  methods=$methods,ba_vq_lambda10_predictive,vq_ema,ba_vq_lambdainf_predictive,vq_ema_predictive,ba_vq_lambda10,vq_ema_classical
  local compare="$python benchmarks/compare.py --methods $methods --latent_dims 16 --jobs $jobs $large"
  case $1 in
    tests)  $python -m pytest -q tests/test_cuda.py tests/test_kernels.py tests/test_quantizers.py ;;
    speed)  $python benchmarks/throughput.py $network --compile && $python benchmarks/throughput.py $network --codebook_size 1024 &&
              $python benchmarks/throughput.py $network --latent_dim 16 &&
              $python benchmarks/throughput.py $network --latent_dim 16 --prediction scaled &&
              $python benchmarks/quantizer_step.py $sizes ;;
    # kernels by themselves, since a fault in one takes its whole process down
    fused)  $interpret $python benchmarks/quantizer_step.py --fused $sizes ;;
    memory) $python benchmarks/quantizer_step.py --memory $sizes && $interpret $python benchmarks/quantizer_step.py --memory --fused $sizes ;;
    scaling) $python benchmarks/scaling.py $scaling ;;
    sweep)  $python run_gpu_experiments.py --jobs $jobs --out_dir experiments/gpu_suite $sweep ;;
    large)  $compare --codebook_sizes $large_sizes --seeds 0 ;;
    seeds)  $compare --codebook_sizes 512 --seeds $seeds && ${compare/$methods/ba_vq_lambda100_scaled_trellis16,vq_ema_scaled_trellis16} \
              --codebook_sizes 512 --seeds $seeds ;;
  esac
}

# A step runs in the background and in a group of its own (timeout's), so that a signal ends it with all that it has started.
group_has_ended() { while kill -0 -- "-$running" 2>/dev/null; do sleep 0.1; done; }  # what it runs may be saving still
stop() {
  kill -TERM "$running" 2>/dev/null
  wait "$running"
  group_has_ended
  echo "stopped; the same command continues" >&2
  exit 130
}
running=
trap stop INT TERM
failed=0
for step in "${steps[@]}"; do
  if [ -f "$out/$step.md" ]; then echo "== $step: done before"; continue; fi
  echo "== $step"
  began=$SECONDS
  settings=$(declare -f run_step; declare -p python interpret sizes network sweep large large_sizes jobs seeds scaling out)
  timeout 600 bash -c "$settings; set -o pipefail; run_step $step | (trap '' TERM; tee $out/$step.log)" &  # progress is on standard error
  running=$!
  if wait $running; then
    { echo "## $step, $((SECONDS - began)) s"; echo; cat "$out/$step.log"; echo; } > "$out/$step.md"
  else
    group_has_ended
    echo "== $step failed or ran past ten minutes; the same command continues it" >&2
    failed=1
  fi
done
machine='import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU", "torch", torch.__version__)'
{ echo "# Measured by benchmarks/gpu_suite.sh"; echo; "$python" -c "$machine"; echo; cat "$out"/*.md; } > results/gpu_suite.md
[ -z "${SMALL:-}" ] || cat results/gpu_suite.md
exit $failed
