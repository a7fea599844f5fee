#!/bin/bash
# make_phone.sh DEST: the root of an arm64 phone: the real adbd (Debian 13's package) with Android's
# own shell and tools (mksh, toybox), /data/local/tmp and getprop. No Python, and none of Android's
# own C library: what runs there is static, or brings its own.
set -euo pipefail
DEST=$1 HERE=$(cd "$(dirname "$0")" && pwd)
NEW=$DEST.new

need="mmdebstrap qemu-user-static binfmt-support debian-archive-keyring iproute2"
miss=""; for p in $need; do dpkg -s "$p" >/dev/null 2>&1 || miss="$miss $p"; done
if [ -n "$miss" ]; then
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends -o DPkg::Lock::Timeout=300 $miss >/dev/null
fi
[ -e /proc/sys/fs/binfmt_misc/register ] || mount -t binfmt_misc binfmt_misc /proc/sys/fs/binfmt_misc
[ -e /proc/sys/fs/binfmt_misc/qemu-aarch64 ] || update-binfmts --enable qemu-aarch64

MIRROR=$(awk '/^URIs:/{print $2; exit} /^deb /{for(i=2;i<=NF;i++) if($i ~ /^http/){print $i; exit}}' /etc/apt/sources.list.d/debian.sources /etc/apt/sources.list 2>/dev/null || true)
case $MIRROR in *debian*) ;; *) MIRROR=http://deb.debian.org/debian ;; esac
rm -rf "$NEW"
mmdebstrap --quiet --mode=root --variant=extract --architectures=arm64 \
  --hook-dir=/usr/share/mmdebstrap/hooks/merged-usr \
  --include=base-files,base-passwd,mksh,toybox,libc-bin,adbd,dash,libgcc-s1 \
  trixie "$NEW" "deb $MIRROR trixie main" >"$DEST.log" 2>&1 || { tail -5 "$DEST.log" >&2; exit 1; }
mkdir -p "$NEW"/{data/local/tmp,system/bin,sdcard,proc,sys,dev,tmp,mnt}
chroot "$NEW" /sbin/ldconfig

# Debian's coreutils are out of reach: only what Android has
ln -sf /usr/bin/mksh "$NEW/system/bin/sh"
rm -f "$NEW/bin/sh"; ln -s mksh "$NEW/usr/bin/sh"
for tool in $(chroot "$NEW" /usr/bin/toybox); do
  ln -sf /usr/bin/toybox "$NEW/system/bin/$tool"
  [ -e "$NEW/usr/bin/$tool" ] || ln -sf toybox "$NEW/usr/bin/$tool"
done
cat >"$NEW/system/bin/getprop" <<'P'
#!/system/bin/sh
f=/system/build.prop
case "$1" in
"") while IFS='=' read -r k v; do echo "[$k]: [$v]"; done <$f ;;
*) while IFS='=' read -r k v; do [ "$k" = "$1" ] && echo "$v" && exit 0; done <$f; echo "$2" ;;
esac
P
cat >"$NEW/system/bin/dumpsys" <<'P'
#!/system/bin/sh
[ -r "/system/dumpsys/$1" ] && while read -r line; do echo "$line"; done <"/system/dumpsys/$1"
P
chmod 755 "$NEW/system/bin/getprop" "$NEW/system/bin/dumpsys"
ln -sf /system/bin/getprop "$NEW/usr/bin/getprop"
ln -sf /system/bin/dumpsys "$NEW/usr/bin/dumpsys"
mkdir "$NEW/system/dumpsys"
printf '%s\n' 'Current Battery Service state:' 'AC powered: false' 'USB powered: true' 'level: 81' \
  'scale: 100' 'temperature: 291' >"$NEW/system/dumpsys/battery"
printf '%s\n' 'IsStatusOverride: false' 'Thermal Status: 0' >"$NEW/system/dumpsys/thermalservice"
printf '%s\n' 'mWakefulness=Awake' >"$NEW/system/dumpsys/power"
cat >"$NEW/system/build.prop" <<'P'
ro.product.manufacturer=EdgeKit
ro.product.model=Emulated Phone
ro.product.device=edgephone
ro.product.cpu.abi=arm64-v8a
ro.product.cpu.abilist=arm64-v8a
ro.build.version.sdk=34
ro.build.version.release=14
ro.build.fingerprint=edgekit/edgephone/edgephone:14/TEST/1:user/test-keys
ro.serialno=EDGE0001
ro.hardware=edge
ro.soc.manufacturer=EdgeKit
ro.soc.model=EDGE
P
printf 'root:x:0:0:root:/:/system/bin/sh\nshell:x:2000:2000:shell:/:/system/bin/sh\n' >"$NEW/etc/passwd"
printf 'root:x:0:\nshell:x:2000:\n' >"$NEW/etc/group"
chown 2000:2000 "$NEW/data/local/tmp"; chmod 771 "$NEW/data/local/tmp"
rm -rf "$DEST" "$DEST.log"
mv "$NEW" "$DEST"
