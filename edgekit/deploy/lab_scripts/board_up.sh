#!/bin/bash
# board_up.sh ROOT FACTS PORT CPU NAME DISK_MB LOG: starts a board, prints its pid. sshd is the first
# process of its own namespaces: kill -9 of the pid is the power switch. It writes to a memory disk
# of DISK_MB over ROOT, clean at each start.
set -euo pipefail
ROOT=$1 FACTS=$2 PORT=$3 CPU=$4 NAME=$5 DISK_MB=$6 LOG=$7
export ROOT FACTS PORT CPU NAME DISK_MB
setsid unshare --mount --pid --uts --ipc --fork --kill-child bash -c '
  set -e
  mount --make-rprivate /
  mount -t tmpfs -o size=${DISK_MB}m,mode=755 tmpfs /mnt; mkdir /mnt/up /mnt/wk /mnt/root
  mount -t overlay overlay -o lowerdir=$ROOT,upperdir=/mnt/up,workdir=/mnt/wk /mnt/root; R=/mnt/root
  hostname "$NAME"
  cp -r "$FACTS/sys/." "$R/sys/"
  mount -t proc proc "$R/proc"
  mount --bind "$FACTS/cpuinfo" "$R/proc/cpuinfo"
  mount -t tmpfs -o mode=755 tmpfs "$R/dev"
  while read -r n a b; do mknod -m 666 "$R/dev/$n" c $a $b; done <<< $'"'"'null 1 3\nzero 1 5\nfull 1 7\nrandom 1 8\nurandom 1 9\ntty 5 0'"'"'
  mkdir "$R/dev/pts" "$R/dev/shm"; mount -t devpts -o newinstance,ptmxmode=0666,mode=620,gid=5 devpts "$R/dev/pts"
  ln -s pts/ptmx "$R/dev/ptmx"; ln -s /proc/self/fd "$R/dev/fd"; mount -t tmpfs tmpfs "$R/dev/shm"
  mkdir -p "$R/run/sshd"
  exec env -i QEMU_CPU=$CPU PATH=/usr/sbin:/usr/bin:/sbin:/bin /usr/sbin/chroot "$R" /usr/sbin/sshd -D -e -p "$PORT" -o ListenAddress=127.0.0.1 -o "SetEnv=QEMU_CPU=$CPU"
' >"$LOG" 2>&1 </dev/null &
PID=$!
for _ in $(seq 150); do
  grep -q 'Server listening' "$LOG" 2>/dev/null && { echo $PID; exit 0; }
  kill -0 $PID 2>/dev/null || { tail -1 "$LOG" >&2; exit 1; }
  sleep .1
done
kill -9 $PID; echo "sshd does not listen after 15 s" >&2; exit 1
