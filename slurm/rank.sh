#!/usr/bin/env bash
# rank.sh COMMAND...: run one rank of a job. Each line that it prints goes to its node's log, with the rank in front; the
# lines of rank 0 also to the job's own log, and so do softcot-ds's messages from any rank.
trap '' USR1 TERM INT  # SLURM signals every process: the rank answers, its log must outlive it
rank=${RANK:-$SLURM_PROCID}
log=$SOFTCOT_LOGS/$SLURM_JOB_NAME-$SLURM_JOB_ID-$SLURMD_NODENAME.log
logged=$(wc -c 2>/dev/null <"$log" || echo 0)  # bytes of earlier attempts

to_logs() { sed -u "s/^/[rank $rank] /" | tee -a "$log" | for_job; }
for_job() { if [ "$rank" = 0 ]; then sed -u 's/^\[rank 0\] //'; else grep --line-buffered softcot-ds; fi; }

# watchdog_ended_it: whether NCCL's watchdog, which notices that another rank is gone or late, aborted this one.
watchdog_ended_it() {
    [ "$code" = 134 ] && tail -c "+$((logged + 1))" "$log" | grep -F "[rank $rank] " |
        grep -E 'Watchdog caught collective operation timeout|ncclRemoteError' >/dev/null
}

"$@" 2>&1 | to_logs
code=${PIPESTATUS[0]}
if watchdog_ended_it; then
    code=3  # as where the rank itself notices
    echo "softcot-ds: rank $rank on $SLURMD_NODENAME: another rank has died, or has not answered in time (NCCL)" | to_logs
fi
case $code in 134 | 135 | 136 | 137 | 139)  # ABRT BUS FPE KILL SEGV: it had no time to say so itself
    echo "softcot-ds: rank $rank on $SLURMD_NODENAME was killed by SIG$(kill -l $((code - 128)))" | to_logs ;;
esac
exit "$code"
