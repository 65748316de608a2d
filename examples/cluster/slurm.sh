#!/bin/bash
# An array of jobs makes the parts of a plan, and one job finishes it. Storage is shared by all nodes.
#
#   PLAN=$(qdeploy check ENGINE --reference MODEL --samples 50000 --device cuda --on plan --json | jq -r .plan)
#   PARTS=$(sbatch --parsable --array=1-64 examples/cluster/slurm.sh "$PLAN" 64)
#   sbatch --dependency=afterok:$PARTS --array=1 examples/cluster/slurm.sh "$PLAN" finish
#
#SBATCH --job-name=qdeploy
#SBATCH --gpus=1
#SBATCH --cpus-per-task=4
#SBATCH --time=04:00:00
#SBATCH --requeue
set -euo pipefail

PLAN=$1
SHARES=$2
export QDEPLOY_CACHE=${QDEPLOY_CACHE:-$HOME/qdeploy-cache} # on the shared storage, and the same for all jobs

if [ "$SHARES" = finish ]; then
    qdeploy work "$PLAN" --finish --json
else
    # A job that was stopped and queued again makes what is missing of its share.
    qdeploy work "$PLAN" --part "$SLURM_ARRAY_TASK_ID/$SHARES" --json
fi
