# Sourced by the batch scripts after their #SBATCH lines: the site's environment, and what the scripts share.
# "EDIT" marks what a site may have to change, here or by a variable of the submitting shell.
set -euo pipefail

# EDIT: what puts python, deepspeed and softcot-ds on the PATH of a node. As it stands: the environment of the submitting
# shell, which sbatch hands on, or .venv in the directory of submission. For example:
#   module load cuda/12.8 openmpi
if [ -f .venv/bin/activate ]; then source .venv/bin/activate; fi

# EDIT: a container, as the command that runs another one in it. It must see the working directory. For example:
#   SOFTCOT_CONTAINER="apptainer exec --nv --bind $PWD softcot.sif"
CONTAINER=${SOFTCOT_CONTAINER:-}

# EDIT: the network between the nodes, where NCCL or gloo picks the wrong one.
#   export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

# EDIT: what srun connects MPI's processes with; `srun --mpi=list` names the choices.
export SLURM_MPI_TYPE=${SLURM_MPI_TYPE:-pmix}

SCRIPTS=$SOFTCOT_HOME/slurm
export SLURM_WAIT=${SLURM_WAIT:-30}  # when a rank has ended, seconds that the others get to end by themselves
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}  # srun does not inherit it since Slurm 22.05
# One rank per GPU; without GPUs one per node, or as many as SOFTCOT_RANKS_PER_NODE says.
RANKS_PER_NODE=${SOFTCOT_RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
export MASTER_ADDR MASTER_PORT
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# From the job and its restart, so that neither another job nor a process that is slow to die has the port. Below 32768,
# where Linux takes the ports of outgoing connections from.
MASTER_PORT=$((20000 + (SLURM_JOB_ID * 7 + ${SLURM_RESTART_COUNT:-0}) % 12000))

# begin COMMAND RECIPE [key=value ...]: check recipe and restarts, make the run's logs/. Ends the job after a mistake.
begin() {
    local run_dir
    run_dir=$($CONTAINER python -m softcot_ds.slurm begin "$@") || exit
    export SOFTCOT_LOGS=$run_dir/logs
    mkdir -p "$SOFTCOT_LOGS"
    echo "job $SLURM_JOB_ID (restart ${SLURM_RESTART_COUNT:-0}) on $SLURM_JOB_NODELIST; every rank's lines: $SOFTCOT_LOGS"
    HOSTFILE=$SOFTCOT_LOGS/hosts-$SLURM_JOB_ID
    scontrol show hostnames "$SLURM_JOB_NODELIST" | sed "s/\$/ slots=$RANKS_PER_NODE/" >"$HOSTFILE"
}

# check_nodes COMMAND RECIPE|ADAPTER_DIR [key=value ...]: softcot-ds doctor on every rank. What ends it (a mistake, a time
# limit, a preemption, a dead node) ends the job, or puts it back into the queue, as it would during COMMAND itself.
# SOFTCOT_DOCTOR=0 leaves it out.
check_nodes() {
    local recipe=$2 code=0
    if [ "${SOFTCOT_DOCTOR:-1}" = 0 ]; then return; fi
    if [ -d "$recipe" ]; then recipe=$recipe/recipe.yaml; fi
    run_ranks softcot_ds.doctor "$recipe" "${@:3}" || code=$?
    [ "$code" = 0 ] || finish "$1" "$code" "${@:2}"
}

# run_ranks MODULE ARGUMENT...: on each node one task, a deepspeed launcher for the ranks of its node, without ssh. The
# launcher counts GPUs from 0; the ranks get those that SLURM gave to the job.
run_ranks() {
    srun --mpi=none --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
        --kill-on-bad-exit=0 \
        $CONTAINER bash -c '
            trap "" USR1 TERM INT  # SLURM signals every process; the ranks answer, their launchers must not die of it
            export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((SRUN_CPUS_PER_TASK > $3 ? SRUN_CPUS_PER_TASK / $3 : 1))}
            deepspeed --log_level critical --hostfile "$2" --no_ssh --node_rank "$SLURM_NODEID" \
                --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" \
                --no_python --no_local_rank bash "$1/rank.sh" \
                ${CUDA_VISIBLE_DEVICES+env "CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES"} python -u -m "${@:4}"
        ' _ "$SCRIPTS" "$HOSTFILE" "$RANKS_PER_NODE" "$@"
}

# finish COMMAND CODE RECIPE [key=value ...]: end the job, or put it back into the queue, by what its ranks ended with.
finish() {
    local verdict=0 preempted=
    # Not grep -q: it ends at the first match, scontrol may die of the closed pipe, and pipefail would call that no match.
    if scontrol show job "$SLURM_JOB_ID" | grep 'PreemptTime=[0-9]' >/dev/null; then preempted=--preempted; fi
    $CONTAINER python -m softcot_ds.slurm end $preempted "$@" || verdict=$?
    if [ "$verdict" = 75 ] && scontrol requeue "$SLURM_JOB_ID"; then
        sleep 600  # SLURM ends this script now
    fi
    exit "$verdict"
}
