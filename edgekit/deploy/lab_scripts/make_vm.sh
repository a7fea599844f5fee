#!/bin/bash
# make_vm.sh ROOT DEST: kernel, initrd and disk of a virtual arm64 board, made of a board's root
set -euo pipefail
ROOT=$1 DEST=$2
need="qemu-system-arm qemu-utils cpio e2fsprogs mmdebstrap"
miss=""; for p in $need; do dpkg -s $p >/dev/null 2>&1 || miss="$miss $p"; done
if [ -n "$miss" ]; then
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends -o DPkg::Lock::Timeout=300 $miss >/dev/null
fi
rm -rf "$DEST.new"; mkdir -p "$DEST.new"; cd "$DEST.new"
mmdebstrap --quiet --mode=root --variant=extract --architectures=arm64 \
  --include=linux-image-cloud-arm64,busybox-static bookworm kroot >log 2>&1 || { tail -5 log >&2; exit 1; }
K=$(ls kroot/lib/modules); M=kroot/lib/modules/$K
mkdir -p ird/{bin,dev,proc,sys,mod,newroot}; cp kroot/bin/busybox ird/bin/; ln -s busybox ird/bin/sh
MODS="virtio_ring virtio virtio_pci_modern_dev virtio_pci_legacy_dev virtio_pci virtio_blk failover net_failover virtio_net"   # in dependency order: virtio needs virtio_ring
for m in $MODS; do cp "$(find $M -name "$m.ko" | head -1)" ird/mod/; done
cat > ird/init <<I
#!/bin/sh
B=/bin/busybox
\$B mount -t devtmpfs dev /dev
for m in $MODS; do \$B insmod /mod/\$m.ko; done
i=0; while [ ! -b /dev/vda ] && [ \$i -lt 50 ]; do \$B sleep 0.1; i=\$((i+1)); done
\$B mount -t ext4 /dev/vda /newroot || exec \$B sh
\$B mount --move /dev /newroot/dev
exec \$B switch_root /newroot /sbin/edge-init
I
chmod +x ird/init; (cd ird && find . | cpio -o -H newc 2>/dev/null | gzip -1 > ../initrd.gz); cp kroot/boot/vmlinuz-* vmlinuz
mke2fs -q -t ext4 -d "$ROOT" board.img 1400M
rm -rf kroot ird log "$DEST"
mv "$DEST.new" "$DEST"
