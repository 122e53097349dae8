#!/bin/bash
# One training run on the nodes of a Slurm job, for example on two nodes with eight GPUs each:
#
#   sbatch --nodes=2 deploy/slurm/train.sh CONFIG.yaml [section.field=value ...]
#
# `quatro-ray` and `ray` must be on the PATH of every node, and run.dir on storage that all nodes share. Before the time
# limit the driver gets SIGTERM, writes a checkpoint and ends; then the job is queued again and continues the run.
# docs/deployment.md has the details.
#
#SBATCH --job-name=quatro-ray
#SBATCH --nodes=1
#SBATCH --exclusive
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=48
#SBATCH --gpus-per-node=8
#SBATCH --mem=0
#SBATCH --time=24:00:00
# B: to this script alone, which passes it on to the driver alone; SIGTERM to all processes of the job would end Ray.
# USR1: queue the job again. SIGTERM, which `scancel` sends, ends it for good.
#SBATCH --signal=B:USR1@420
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -euo pipefail

if (( $# == 0 )); then
  echo "usage: sbatch deploy/slurm/train.sh CONFIG.yaml [section.field=value ...]" >&2
  exit 2
fi

start_deadline_s=300
status_deadline_s=30
end_deadline_s=60
address=${HEAD_ADDRESS:-$(hostname -I | cut -d' ' -f1)}
port=${HEAD_PORT:-6379}
num_cpus=$((SLURM_JOB_NUM_NODES * SLURM_CPUS_PER_TASK))

export RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n') # a new one for each start; srun passes it on
export RAY_AUTH_TOKEN

driver=
nodes=()
num_signals=0
requeue=false

# shellcheck disable=SC2329 # the traps call it
tell_driver() {
  num_signals=$((num_signals + 1))
  if [[ -n $driver ]]; then kill -TERM "$driver" || true; fi
}
trap 'tell_driver' TERM
trap 'requeue=true; tell_driver' USR1

end_ray() {
  if (( ${#nodes[@]} )); then
    kill -TERM "${nodes[@]}" 2>/dev/null || true
    local give_up=$((SECONDS + end_deadline_s))
    while [[ -n $(jobs -rp) ]] && (( SECONDS < give_up )); do sleep 0.2; done
    if [[ -n $(jobs -rp) ]]; then
      echo "Ray did not end within $end_deadline_s s; it is killed" >&2
      kill -KILL "${nodes[@]}" 2>/dev/null || true
    fi
  fi
  nodes=()
}
trap end_ray EXIT

options=(--block --disable-usage-stats "--num-cpus=$SLURM_CPUS_PER_TASK" "--num-gpus=${SLURM_GPUS_ON_NODE:-0}")

# the driver needs neither the dashboard nor the job API, so they do not listen
ray start --head "--node-ip-address=$address" "--port=$port" --include-dashboard=false "${options[@]}" &
nodes+=($!)
if (( SLURM_JOB_NUM_NODES > 1 )); then
  others=$((SLURM_JOB_NUM_NODES - 1))
  srun --nodes=$others --ntasks=$others --ntasks-per-node=1 "--exclude=$SLURMD_NODENAME" \
    "--cpus-per-task=$SLURM_CPUS_PER_TASK" ray start "--address=$address:$port" "${options[@]}" </dev/null &
  nodes+=($!)
fi

# all nodes join before the driver starts, so that a missing one is reported here
export RAY_ADDRESS=$address:$port
until (( num_signals )) ||
  timeout --kill-after=5 "$status_deadline_s" ray status 2>/dev/null | grep -q "/$num_cpus.0 CPU"; do
  if (( SECONDS > start_deadline_s || $(jobs -rp | wc -l) < ${#nodes[@]} )); then
    echo "Ray did not start on $SLURM_JOB_NUM_NODES nodes with $num_cpus CPUs (in $SECONDS s); the reason is above" >&2
    exit 1
  fi
  sleep 1
done

status=143
if (( num_signals == 0 )); then
  quatro-ray train "$1" checkpoint.grace_s=300 run.resume=auto "${@:2}" &
  driver=$!
  if (( num_signals )); then kill -TERM "$driver"; fi # it came in between
  while :; do
    seen=$num_signals
    wait "$driver" && status=0 || status=$?
    (( num_signals > seen )) || break # a signal interrupts the wait
  done
fi

end_ray
if $requeue && (( status )); then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
