#!/usr/bin/env bash
# Sketchy photos and sketches, from raw folders to a report with three seeds, floors and the peak over checkpoints.
#   benchmarks/sketchy.sh INPUT SPLIT OUTPUT [extra flags of jobs.train]
# INPUT holds photo/CLASS and sketch/CLASS; SPLIT is a JSON file or the name of a published split.
set -euo pipefail
input=$1 split=$2 out=$3
shift 3
python=${PYTHON:-.venv/bin/python}

"$python" -m jobs.prepare --source sketchy --input "$input" --output "$out/data" --rows-per-shard 500
"$python" -m jobs.semantics --data "$out/data" --output "$out/semantics"
"$python" -m jobs.features --data "$out/data" --output "$out/features"
inputs=(--data "$out/data" --features "$out/features" --semantics "$out/semantics")
for seed in 0 1 2; do
  "$python" -m jobs.train "${inputs[@]}" --split "$split" --seed "$seed" --output "$out/checkpoint-$seed" \
    --epochs 6 --steps-per-epoch 20 --patience 4 --keep-checkpoints all "$@"
done
for modality in photo sketch; do
  "$python" -m jobs.embed --data "$out/data" --features "$out/features" --checkpoint "$out/checkpoint-0" \
    --modality "$modality" --classes unseen --output "$out/$modality"
done
"$python" -m jobs.index build --embeddings "$out/photo" --queries "$out/sketch" --index-dir "$out/index"
"$python" -m jobs.evaluate "${inputs[@]}" --checkpoint "$out"/checkpoint-{0,1,2} --index-dir "$out/index" \
  --output "$out/report"
