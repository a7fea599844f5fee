#!/bin/bash
# make_board.sh DEST KEYS PYTHON: the root of an arm64 board, Debian 12 with sshd and Python 3.11
# under qemu-user, engines in /opt/edge. Packages are unpacked and not configured, and wheels are
# resolved on the host: nothing slow runs under emulation.
set -euo pipefail
DEST=$1 KEYS=$2 PYTHON=$3 HERE=$(cd "$(dirname "$0")" && pwd)
NEW=$DEST.new

need="mmdebstrap qemu-user-static binfmt-support debian-archive-keyring openssh-client"
miss=""; for p in $need; do dpkg -s "$p" >/dev/null 2>&1 || miss="$miss $p"; done
if [ -n "$miss" ]; then
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends -o DPkg::Lock::Timeout=300 $miss >/dev/null
fi
# no init system may be here to do so; flags PF: the root needs no qemu of its own
[ -e /proc/sys/fs/binfmt_misc/register ] || mount -t binfmt_misc binfmt_misc /proc/sys/fs/binfmt_misc
[ -e /proc/sys/fs/binfmt_misc/qemu-aarch64 ] || update-binfmts --enable qemu-aarch64

PKGS=base-files,base-passwd,bash,dash,coreutils,grep,sed,mawk,findutils,tar,gzip,procps,util-linux,mount,hostname,libc-bin,libpam-runtime,login
PKGS=$PKGS,python3,python3-venv,openssh-server,openssh-sftp-server,libstdc++6,libgomp1,libatomic1,strace
MIRROR=$(awk '/^URIs:/{print $2; exit} /^deb /{for(i=2;i<=NF;i++) if($i ~ /^http/){print $i; exit}}' /etc/apt/sources.list.d/debian.sources /etc/apt/sources.list 2>/dev/null || true)
unpack() {
  rm -rf "$NEW"
  mmdebstrap --quiet --mode=root --variant=extract --architectures=arm64 \
    --hook-dir=/usr/share/mmdebstrap/hooks/merged-usr --include="$PKGS" bookworm "$NEW" "$@" >"$DEST.log" 2>&1
}
# the host's own sources; should one index be out of step, its main suite alone
unpack || unpack "deb $MIRROR bookworm main" || { tail -5 "$DEST.log" >&2; exit 1; }

# what the maintainer scripts would have done
cp "$NEW/usr/share/base-passwd/passwd.master" "$NEW/etc/passwd"
cp "$NEW/usr/share/base-passwd/group.master" "$NEW/etc/group"
sed -i 's#^root:[^:]*:\(.*\):[^:]*$#root:x:\1:/bin/bash#' "$NEW/etc/passwd"
echo 'sshd:x:100:65534::/run/sshd:/usr/sbin/nologin' >>"$NEW/etc/passwd"
echo 'pi:x:1000:1000:board user:/home/pi:/bin/bash' >>"$NEW/etc/passwd"
echo 'pi:x:1000:' >>"$NEW/etc/group"
printf 'root:*:19000:0:99999:7:::\nsshd:*:19000:0:99999:7:::\npi:*:19000:0:99999:7:::\n' >"$NEW/etc/shadow"
chmod 640 "$NEW/etc/shadow"
ln -sf mawk "$NEW/usr/bin/awk"
echo edge-lab >"$NEW/etc/hostname"
echo '127.0.0.1 localhost edge-lab' >"$NEW/etc/hosts"
mkdir -p "$NEW"/{run/sshd,home/pi/.ssh,root/.ssh,proc,sys,dev/pts,tmp,opt,mnt}
chmod 1777 "$NEW/tmp"; chmod 755 "$NEW/run/sshd"
chroot "$NEW" /sbin/ldconfig

# the host's pip resolves and unpacks the board's wheels
PLATFORMS=$(for n in 17 24 26 27 28 31 34 35 36; do echo --platform manylinux_2_${n}_aarch64; done; echo --platform manylinux2014_aarch64)
chroot "$NEW" /usr/bin/python3 -m venv --without-pip /opt/edge
"$PYTHON" -m pip install -q --no-warn-script-location --disable-pip-version-check \
  --target "$NEW/opt/edge/lib/python3.11/site-packages" --python-version 3.11 --implementation cp \
  --only-binary=:all: $PLATFORMS onnxruntime ai-edge-litert numpy
# byte code of the library, of the same version: a first import under emulation is 5 times faster
if "$PYTHON" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; then
  "$PYTHON" -m compileall -q -s "$NEW" -p / "$NEW/usr/lib/python3.11" >/dev/null || true
fi

mkdir -p "$KEYS"; chmod 700 "$KEYS"
[ -f "$KEYS/id_ed25519" ] || ssh-keygen -q -t ed25519 -N '' -C edgekit-lab -f "$KEYS/id_ed25519"
rm -f "$NEW"/etc/ssh/ssh_host_*
[ -f "$KEYS/host_ed25519" ] || ssh-keygen -q -t ed25519 -N '' -C edgekit-lab-board -f "$KEYS/host_ed25519"
cp "$KEYS/host_ed25519" "$NEW/etc/ssh/ssh_host_ed25519_key"; chmod 600 "$NEW/etc/ssh/ssh_host_ed25519_key"
for home in root home/pi; do cp "$KEYS/id_ed25519.pub" "$NEW/$home/.ssh/authorized_keys"; done
chmod 700 "$NEW"/{root,home/pi}/.ssh; chmod 600 "$NEW"/{root,home/pi}/.ssh/authorized_keys
chown -R 1000:1000 "$NEW/home/pi"
cat >"$NEW/etc/ssh/sshd_config" <<'EOS'
HostKey /etc/ssh/ssh_host_ed25519_key
PidFile /run/sshd.pid
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
UsePAM no
UseDNS no
PrintMotd no
Subsystem sftp /usr/lib/openssh/sftp-server
EOS
install -m755 "$HERE/edge-init" "$NEW/usr/sbin/edge-init"
rm -rf "$DEST" "$DEST.log"
mv "$NEW" "$DEST"
