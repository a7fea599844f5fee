#!/bin/bash
# debian.sh ARCH DEST PACKAGE...: unpacks packages of Debian 13 for any architecture into DEST, with
# an apt configuration of its own: nothing of this machine is asked or changed.
set -euo pipefail
ARCH=$1 DEST=$2
shift 2
KEYS=/usr/share/keyrings/debian-archive-keyring.gpg
[ -f $KEYS ] || { echo "no $KEYS: apt-get install debian-archive-keyring" >&2; exit 127; }
SOURCES=$(cat /etc/apt/sources.list.d/debian.sources /etc/apt/sources.list 2>/dev/null || true)
MIRROR=$(awk '/^URIs:/{print $2; exit} /^deb /{for(i=2;i<=NF;i++) if($i ~ /^http/){print $i; exit}}' <<<"$SOURCES")
case $MIRROR in *debian*) ;; *) MIRROR=http://deb.debian.org/debian ;; esac
mkdir -p "$DEST"
WORK=$(mktemp -d "$DEST/.apt-XXXXXX")
trap 'rm -rf "$WORK"' EXIT
mkdir -p "$WORK"/{state/lists/partial,cache/archives/partial,debs}
echo "deb [signed-by=$KEYS] $MIRROR trixie main" >"$WORK/sources.list"
cat >"$WORK/apt.conf" <<EOC
Dir::State "$WORK/state"; Dir::State::status "/dev/null"; Dir::Cache "$WORK/cache";
Dir::Etc::sourcelist "$WORK/sources.list"; Dir::Etc::sourceparts "-";
APT::Architecture "$ARCH"; APT::Architectures "$ARCH"; APT::Sandbox::User "root";
Acquire::Languages "none"; Acquire::Retries "3";
EOC
export APT_CONFIG=$WORK/apt.conf
apt-get update -qq
cd "$WORK/debs"
apt-get download -qq "$@"
for deb in *.deb; do dpkg-deb -x "$deb" "$DEST"; done
