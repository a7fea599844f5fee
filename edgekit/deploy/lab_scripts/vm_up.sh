#!/bin/bash
# vm_up.sh VM PORT CPU MEMORY_MB VIRTUAL DISK LOG: boots a virtual board, prints its pid; killing it
# is the power switch. VIRTUAL=1: its clock counts instructions, one nanosecond each, so latency
# measured on it repeats whatever the host does. DISK: a file that keeps what it writes; - drops it.
set -euo pipefail
VM=$1 PORT=$2 CPU=$3 MEMORY=$4 VIRTUAL=$5 DISK=$6 LOG=$7
if [ "$VIRTUAL" = 1 ]; then run=(-accel tcg,thread=single -icount shift=0,sleep=on -smp 1)
else run=(-accel tcg,thread=multi -smp 2); fi
if [ "$DISK" = - ]; then drive="file=$VM/board.img,format=raw,if=none,id=d,snapshot=on"
else
  [ -e "$DISK" ] || qemu-img create -q -f qcow2 -b "$VM/board.img" -F raw "$DISK"
  drive="file=$DISK,format=qcow2,if=none,id=d,cache=writeback"
fi
: >"$LOG"
setsid qemu-system-aarch64 -machine virt -cpu "$CPU" "${run[@]}" -m "$MEMORY" -display none -monitor none \
  -serial "file:$LOG" -kernel "$VM/vmlinuz" -initrd "$VM/initrd.gz" \
  -append "console=ttyAMA0 quiet rdinit=/init net.ifnames=0 panic=-1" \
  -drive "$drive" -device virtio-blk-pci,drive=d \
  -netdev "user,id=n,restrict=on,hostfwd=tcp:127.0.0.1:$PORT-:22" -device virtio-net-pci,netdev=n,romfile= \
  -no-reboot >"$LOG.out" 2>&1 </dev/null &
PID=$!
for _ in $(seq 600); do
  grep -q 'Server listening' "$LOG" 2>/dev/null && { echo $PID; exit 0; }
  kill -0 $PID 2>/dev/null || { tail -1 "$LOG.out" >&2; exit 1; }
  sleep .2
done
kill -9 $PID; echo "it did not boot within 120 s" >&2; exit 1
