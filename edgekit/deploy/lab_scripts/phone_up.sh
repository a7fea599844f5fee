#!/bin/bash
# phone_up.sh ROOT FACTS NUMBER CPU DISK_MB LOG: starts a phone, prints its pid. adbd listens on every
# address it sees, so it has a network of its own: edgekit-phone-NUMBER, with this machine at
# 10.213.NUMBER.1 and the phone at 10.213.NUMBER.2. kill -9 of the pid is the power switch.
set -euo pipefail
ROOT=$1 FACTS=$2 NUMBER=$3 CPU=$4 DISK_MB=$5 LOG=$6
NET=edgekit-phone-$NUMBER LINK=ekphone$NUMBER
export ROOT FACTS CPU DISK_MB
ip netns del "$NET" 2>/dev/null || true
ip link del "$LINK" 2>/dev/null || true
ip netns add "$NET"
ip link add "$LINK" type veth peer name eth0 netns "$NET"
ip addr add "10.213.$NUMBER.1/30" dev "$LINK"
ip link set "$LINK" up
ip -n "$NET" addr add "10.213.$NUMBER.2/30" dev eth0
ip -n "$NET" link set eth0 up
ip -n "$NET" link set lo up
ip netns exec "$NET" setsid unshare --mount --pid --uts --ipc --fork --kill-child bash -c '
  set -e
  mount --make-rprivate /
  mount -t tmpfs -o size=${DISK_MB}m,mode=755 tmpfs /mnt; mkdir /mnt/up /mnt/wk /mnt/root
  mount -t overlay overlay -o lowerdir=$ROOT,upperdir=/mnt/up,workdir=/mnt/wk /mnt/root; R=/mnt/root
  hostname phone
  cp -r "$FACTS/sys/." "$R/sys/"
  mount -t proc proc "$R/proc"
  mount --bind "$FACTS/cpuinfo" "$R/proc/cpuinfo"
  mount -t tmpfs -o mode=755 tmpfs "$R/dev"
  while read -r n a b; do mknod -m 666 "$R/dev/$n" c $a $b; done <<< $'"'"'null 1 3\nzero 1 5\nfull 1 7\nrandom 1 8\nurandom 1 9\ntty 5 0'"'"'
  mkdir "$R/dev/pts" "$R/dev/shm"; mount -t devpts -o newinstance,ptmxmode=0666,mode=620,gid=5 devpts "$R/dev/pts"
  ln -s pts/ptmx "$R/dev/ptmx"; mount -t tmpfs tmpfs "$R/dev/shm"
  # adbd is started again when it ends, as init of Android does; USR1 is a reboot
  trap "kill -9 -1" USR1
  while true; do
    env -i QEMU_CPU=$CPU ADBD_PORT=5555 PATH=/system/bin:/usr/bin ANDROID_ROOT=/system ANDROID_DATA=/data TMPDIR=/data/local/tmp HOME=/ /usr/sbin/chroot "$R" /usr/sbin/adbd &
    wait $! || true
    sleep .5
  done
' >"$LOG" 2>&1 </dev/null &
PID=$!
for _ in $(seq 200); do
  ip netns exec "$NET" ss -ltn 2>/dev/null | grep -q ':5555 ' && { echo $PID; exit 0; }
  kill -0 $PID 2>/dev/null || { tail -1 "$LOG" >&2; exit 1; }
  sleep .1
done
kill -9 $PID; echo "adbd does not listen after 20 s" >&2; exit 1
