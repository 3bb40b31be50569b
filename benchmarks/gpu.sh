#!/usr/bin/env bash
# What can this GPU do, and how much of it do we reach? Every measurement, in one call of at most nine minutes.
#
#   benchmarks/gpu.sh --out DIR [--device cuda|cpu] [--budget SECONDS] [--commit HASH] [PART...]
#
# For a machine that reaches no registry: nothing is fetched, and python3 (or $PYTHON) must find torch, torchvision, DALI and
# the few packages that are checked below; Ray is not needed. Each part writes one line to DIR/gpu.jsonl as soon as it ends:
# {"part", "status", "seconds", "commit", "result"}. What it says goes to DIR/gpu.log. A part that is in there with status 0
# is skipped, so a second call with the same DIR does what the first had no time for; delete a line to measure again.
# Parts are named: give some to measure only those. --device cpu tries the same at toy sizes; its figures mean nothing.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2

out="" device=cuda budget_s=540 commit="" wanted=()
while (($#)); do
  case $1 in
  --out) out=${2:-} && shift 2 ;;
  --device) device=${2:-} && shift 2 ;;
  --budget) budget_s=${2:-} && shift 2 ;;
  --commit) commit=${2:-} && shift 2 ;;
  -*) sed -n '2,12s/^# \{0,1\}//p' "$0" >&2 && exit 2 ;;
  *) wanted+=("$1") && shift ;;
  esac
done
if [[ -z $out || ($device != cuda && $device != cpu) || ! $budget_s =~ ^[0-9]+$ ]]; then
  echo "gpu.sh: give --out DIR, where results go; --device is cuda or cpu, --budget whole seconds" >&2
  exit 2
fi
python=${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}
mkdir -p "$out" || exit 2
results=$out/gpu.jsonl log=$out/gpu.log work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
commit=${commit:-$(git rev-parse HEAD 2>/dev/null || echo unknown)}
export PYTHONUNBUFFERED=1 PYTHONPATH=${PYTHONPATH:-}
missing=0 left=0

say() { echo "gpu.sh: $*" | tee -a "$log" >&2; }

needed=(torch torchvision nvidia.dali torchmetrics pyarrow numpy PIL matplotlib jinja2 xxhash psutil rich tyro sklearn pytest)
"$python" - "${needed[@]}" <<'PY' || exit 2
import importlib, sys
absent = []
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except ImportError as error:
        absent.append(f"{name} ({error})")
if absent:
    sys.exit(f"gpu.sh: not importable: {', '.join(absent)}: nothing was measured; carry the wheels here")
PY

# part NAME NEED_S COMMAND...: COMMAND writes one line of JSON to $result. It is begun while NEED_S are left of the budget,
# and ended after `slack` times as long, or with the budget.
part() {
  local name=$1 need_s=$2 began=$SECONDS status left_s=$((budget_s - SECONDS))
  shift 2
  [[ ${#wanted[@]} -eq 0 || " ${wanted[*]} " == *" $name "* ]] || return 0
  if grep -qs "^{\"part\": \"$name\", \"status\": 0," "$results"; then say "$name: measured already" && return; fi
  if ((left_s < need_s)); then
    say "$name: left for another call: it needs about $need_s s, and $left_s s of --budget are left"
    left=$((left + 1)) && return
  fi
  export result=$work/$name.json
  say "$name ..."
  timeout --kill-after=5 $((slack * need_s < left_s ? slack * need_s : left_s)) "$@" >>"$log" 2>&1
  status=$?
  [[ -s $result ]] || echo null >"$result"
  printf '{"part": "%s", "status": %d, "seconds": %d, "commit": "%s", "result": %s}\n' \
    "$name" $status $((SECONDS - began)) "$commit" "$(cat "$result")" >>"$results"
  ((status == 0)) || missing=$((missing + 1))
  say "$name: status $status after $((SECONDS - began)) s$( ((status == 124)) && echo ', which is all it was given')"
}

bench() { # NAME NEED_S BENCHMARK FLAGS...
  local name=$1 need_s=$2
  shift 2
  part "$name" "$need_s" "$python" -m benchmarks "$@" --device "$device" --out "$work/$name.json"
}

machine() {
  "$python" - "$result" <<'PY'
import json, subprocess, sys
from pathlib import Path
from thawline.cluster.machine import provenance

def said(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.splitlines()
    except OSError:
        return []

query = "name,driver_version,memory.total,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
found = {"hardware": provenance.hardware(), "versions": provenance.versions()}
found["nvidia_smi"] = said("nvidia-smi", f"--query-gpu={query}", "--format=csv")
Path(sys.argv[1]).write_text(json.dumps(found) + "\n")
PY
}

tests() { # pytest's status; what failed is in the result
  local status
  "$python" -m pytest tests/gpu -q -p no:cacheprovider --timeout 100 --junitxml "$result.xml"
  status=$?
  "$python" - "$result" <<'PY'
import json, sys
from pathlib import Path
from xml.etree import ElementTree
suite = ElementTree.parse(sys.argv[1] + ".xml").getroot()[0]
count = {name: int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped")}
failed = {
    f"{case.get('classname')}::{case.get('name')}": str(bad.get("message"))[:300]
    for case in suite
    for bad in case
    if bad.tag in ("failure", "error")
}
Path(sys.argv[1]).write_text(json.dumps({**count, "seconds": float(suite.get("time")), "failed": failed}) + "\n")
PY
  return "$status"
}
export -f machine tests
export python

bodies=(resnet50 resnet18 resnet34 convnext_tiny vit_small)
if [[ $device == cuda ]]; then
  step=(--steps 10) photos=(--data photos --photos 256) jpegs=(--images 512 --batch 256) slack=3
else
  step=(--batch 4 --size-px 32 --steps 1) photos=(--data photos --photos 8) jpegs=(--images 16 --batch 8) slack=10
fi

# What is wanted most comes first: a call may end at the budget. Of the compiled steps most is to compile.
part machine 10 bash -c machine
part tests 60 bash -c tests
for body in "${bodies[@]}"; do bench "step-$body" 20 step --model "$body" "${step[@]}"; done
bench decode 20 decode "${jpegs[@]}"
bench presize 20 presize --ways dali --quality-images 1 "${jpegs[@]}"
for body in resnet50 resnet18; do bench "train-$body" 35 train --model "$body" "${step[@]}" "${photos[@]}"; done
bench frozen 20 step --model resnet50 --frozen "${step[@]}"
bench profile 30 profile --model resnet50 "${step[@]}" "${photos[@]}"
for body in "${bodies[@]}"; do bench "compiled-$body" 40 step --model "$body" --compile default "${step[@]}"; done

say "$(grep -c '"status": 0,' "$results" 2>/dev/null) parts in $results; $missing failed now (see $log), $left left for another call; $SECONDS s"
((missing == 0))
