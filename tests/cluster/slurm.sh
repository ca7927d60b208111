#!/usr/bin/env bash
# A SLURM cluster of one node on this machine, for the tests: slurm.sh start|stop FOLDER. Needs root and Debian's
# packages slurm-wlm and munge. All that it writes is in FOLDER; its daemons are known by the process ids kept there.
set -euo pipefail
action=$1 folder=$(realpath -m "$2")
socket="$folder/munge/socket"
export SLURM_CONF="$folder/slurm.conf"

stop() {
    for name in slurmd slurmctld munged; do
        [ -f "$folder/$name.pid" ] || continue
        pid=$(cat "$folder/$name.pid")
        kill "$pid" 2>/dev/null || continue
        for _ in $(seq 100); do kill -0 "$pid" 2>/dev/null || break; sleep 0.1; done
        kill -9 "$pid" 2>/dev/null || true
    done
}

start() {
    mkdir -p "$folder"/{munge,state,spool,log}
    chmod 755 "$folder" "$folder/munge"
    node=$(hostname -s) user=$(id -un)
    head -c 1024 /dev/urandom >"$folder/munge/key"
    chmod 600 "$folder/munge/key"
    cat >"$SLURM_CONF" <<CONF
ClusterName=test
SlurmctldHost=$node(127.0.0.1)
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
AuthInfo=socket=$socket
CredType=cred/munge
SlurmctldPort=16817
SlurmdPort=16818
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd.log
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
MpiDefault=none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1
KillWait=5
ReturnToService=2
NodeName=$node NodeAddr=127.0.0.1 CPUs=$(nproc) RealMemory=8000 State=UNKNOWN
PartitionName=main Nodes=$node Default=YES MaxTime=INFINITE State=UP
CONF
    # --force: the folder's parents may be anybody's, as those of a temporary folder are
    munged --force --key-file="$folder/munge/key" --socket="$socket" --pid-file="$folder/munged.pid" \
        --log-file="$folder/log/munged.log" --seed-file="$folder/munge/seed"
    slurmctld
    slurmd
    for _ in $(seq 100); do
        sinfo --noheader --format=%T 2>/dev/null | grep -q idle && exit 0
        sleep 0.2
    done
    echo "the node is not idle: $(sinfo 2>&1)" >&2
    tail -n 20 "$folder"/log/*.log >&2
    stop
    exit 1
}

case $action in
    start) start ;;
    stop) stop ;;
    *) echo "usage: slurm.sh start|stop FOLDER" >&2; exit 2 ;;
esac
