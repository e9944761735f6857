#!/usr/bin/env bash
# The study configs/ablations/python_source_30m.yaml on one machine: text, tuning, runs, table and picture.
#
#   bash configs/ablations/python_source_30m.sh [DEVICES [SECONDS [OUT [JOBS_PER_DEVICE]]]]
#
# SECONDS: of the whole script; runs that would not end in time are not started, and the same command goes on from the
# records in OUT. A model of this size keeps neither a GPU nor a CPU core busy by itself: several runs share a GPU.
set -euo pipefail
cd "$(dirname "$0")/../.."
devices=${1:-0}
limit=${2:-36000}
out=${3:-outputs/ablations/python_source_30m}
jobs=${4:-3}
data=outputs/data/python_source
PYTHON=${PYTHON:-python3}
study=${STUDY:-configs/ablations/python_source_30m.yaml}

if [ ! -e $data/tokens.json ]; then
    # On another machine the tokenizer of the first, so that the ids are the same wherever the packages are.
    tokenizer=()
    [ ! -e "$out/text/tokenizer.json" ] || tokenizer=(--tokenizer "$out/text")
    $PYTHON -m flexrattn.data.prepare --out $data --site-packages --split-by package "${tokenizer[@]}"
fi
mkdir -p "$out/text"
cp $data/tokens.json $data/tokenizer.json $data/tokenizer_config.json "$out/text"/
status=0
$PYTHON -m flexrattn.ablate "$study" --devices "$devices" --jobs-per-device "$jobs" --out "$out" \
    --work outputs/work/python_source_30m --time-limit $((limit - SECONDS - 5)) || status=$?
exit $status
