#!/usr/bin/env bash
# Runs a command in a clone of HEAD on a machine that has only Python, pip, make and a compiler: a chroot made by
# debootstrap, as a user of its own whose home directory is empty. Needs root and debootstrap.
# usage: tools/fresh_machine.sh DIRECTORY COMMAND…     e.g.  tools/fresh_machine.sh /var/tmp/fresh 'make check && make test'
#        DIRECTORY keeps the chroot for the next time; the clone and the home directory are new each time.
# environment: PIP_*    is passed on (a mirror, find-links)
#              SHARE=   paths of this machine that the chroot sees, read-only (a directory of wheels, certificates)
#              SUITE=   the Debian release (bookworm: Python 3.11)
set -euo pipefail

directory=$(realpath -m "${1:?"which directory shall hold the chroot?"}")
shift
command=${*:?"which command shall run there?"}
root=$directory/root
home=/home/newcomer
project=$(cd "$(dirname "$0")/.." && pwd)

if [[ $(id -u) != 0 ]]; then
    echo "tools/fresh_machine.sh makes a chroot, which only root can." >&2
    exit 1
fi
if [[ ! -e $directory/.made ]]; then
    mkdir -p "$directory"
    debootstrap --variant=minbase --include=python3,python3-venv,python3-pip,make,g++,ca-certificates,git,curl \
        "${SUITE:-bookworm}" "$root" >"$directory/debootstrap.log"
    chroot "$root" useradd --no-create-home newcomer
    touch "$directory/.made"
fi

rm -rf "${root:?}$home"
mkdir -p "$root$home"
git clone --quiet --no-hardlinks "$project" "$root$home/shuteye"
chroot "$root" chown -R newcomer: "$home"
cp /etc/resolv.conf "$root/etc/resolv.conf"

passed=(HOME="$home" PATH=/usr/local/bin:/usr/bin:/bin LANG=C.UTF-8)
while IFS= read -r line; do passed+=("$line"); done < <(env | grep '^PIP_' || true)

# In namespaces of its own: when the command has ended, so have all mounts and every process that it left.
export root home command SHARE=${SHARE-}
exec unshare --mount --pid --fork --kill-child bash -euo pipefail -c '
    mount --make-rprivate /
    mount -t proc proc "$root/proc"
    mount -t tmpfs tmpfs "$root/tmp" -o mode=1777
    for device in null zero full random urandom tty; do
        touch "$root/dev/$device"
        mount --bind "/dev/$device" "$root/dev/$device"
    done
    mkdir -p "$root/dev/shm"
    mount -t tmpfs tmpfs "$root/dev/shm" -o mode=1777
    for path in $SHARE; do
        if [[ -d $path ]]; then mkdir -p "$root$path"; else mkdir -p "$root$(dirname "$path")"; touch "$root$path"; fi
        mount --bind -o ro "$path" "$root$path"
    done
    exec chroot --userspec=newcomer:newcomer "$root" env -i "$@" bash -c "cd $home/shuteye && $command"
' bash "${passed[@]}"
