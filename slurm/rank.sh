#!/usr/bin/env bash
# rank.sh COMMAND...: run one rank of a job. Each line that it prints goes to its node's log, with the rank in front; the
# lines of rank 0 also to the job's own log, and so do softcot-ds's messages from any rank.
trap '' USR1 TERM INT  # SLURM signals every process: the rank answers, its log must outlive it
rank=${RANK:-$SLURM_PROCID}
log=$SOFTCOT_LOGS/$SLURM_JOB_NAME-$SLURM_JOB_ID-$SLURMD_NODENAME.log

for_job() { if [ "$rank" = 0 ]; then sed -u 's/^\[rank 0\] //'; else grep --line-buffered softcot-ds; fi; }
run() {
    local code=0
    "$@" || code=$?
    case $code in 134 | 135 | 136 | 137 | 139)  # ABRT BUS FPE KILL SEGV: it had no time to say so itself
        echo "softcot-ds: rank $rank on $SLURMD_NODENAME was killed by SIG$(kill -l $((code - 128)))" >&2 ;;
    esac
    return $code
}
run "$@" 2>&1 | sed -u "s/^/[rank $rank] /" | tee -a "$log" | for_job
exit "${PIPESTATUS[0]}"
