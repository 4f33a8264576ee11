# A chroot with another release of Debian, for clients that this one does not have. Sourced after lib.sh; expects $gorego.
#
# goREgo runs in it too: the actions need the same compiler as the client. Its /proc, /sys and /dev are mounted in a mount
# namespace of each command's own, so nothing of the machine is left in the directory.

# testing_chroot DIRECTORY PROGRAM=PACKAGE...: one with Debian testing.
testing_chroot() { debian_chroot forky "$@"; }

# debian_chroot SUITE DIRECTORY PROGRAM=PACKAGE...: makes it when it is not there (1 GB and more, a minute or two), installs the
# packages of the programs that are missing (a program may also be a path), and copies this directory and goREgo into it:
# $inside/clients and $inside/gorego, until the script ends. Skips the script when that cannot be done: a moving suite may
# lack a package on any day.
debian_chroot() {
  local suite=$1
  root=$2
  shift 2
  local each missing=()
  [ "$(id -u)" = 0 ] || skip "a chroot needs root"
  have apt-get || skip "the chroot is made from Debian's packages, and this is no Debian"
  unshare --mount true 2>/dev/null || skip "mount namespaces are not allowed here"
  if [ ! -e "$root/etc/gorego-complete" ]; then
    needs_debian debootstrap
    local mirror
    mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | head -n 1)
    [ -n "$mirror" ] || skip "apt knows no mirror"
    echo "making a Debian $suite chroot in $root"
    # What a run left that was cut off cannot be continued.
    rm -rf --one-file-system "$root"
    mkdir -p "$root"
    timeout 400 debootstrap --variant=minbase --keyring=/usr/share/keyrings/debian-archive-keyring.gpg \
      "$suite" "$root" "$mirror" /usr/share/debootstrap/scripts/sid >/dev/null 2>&1 || skip "debootstrap failed"
    echo 'Acquire::Check-Valid-Until "false";' >"$root/etc/apt/apt.conf.d/99gorego"
    cp /etc/apt/apt.conf.d/*proxy* "$root/etc/apt/apt.conf.d/" 2>/dev/null || true
    cp /etc/resolv.conf "$root/etc/"
    touch "$root/etc/gorego-complete"
  fi
  for each in "$@"; do in_chroot sh -c 'command -v "$1" || test -e "$1"' sh "${each%%=*}" >/dev/null || missing+=("${each#*=}"); done
  if [ ${#missing[@]} -gt 0 ]; then
    echo "installing ${missing[*]} there"
    in_chroot sh -c 'apt-get update -qq && DEBIAN_FRONTEND=noninteractive timeout 500 apt-get install -y -qq --no-install-recommends "$@"' \
      sh "${missing[@]}" >/dev/null 2>&1 || skip "the packages ${missing[*]} of Debian $suite could not be installed"
  fi
  local copy
  copy=$(mktemp -d "$root/tmp/gorego-clients.XXXXXX")
  # shellcheck disable=SC2064
  trap "rm -rf '$copy'" EXIT
  inside=${copy#"$root"}
  cp -r "$(dirname "${BASH_SOURCE[0]}")" "$copy/clients"
  cp "$gorego" "$copy/gorego"
}

# in_chroot COMMAND...: runs it there, with an environment of its own.
in_chroot() {
  unshare --mount sh -c 'root=$1
    shift
    for each in proc sys dev; do mount --rbind "/$each" "$root/$each" || exit 1; done
    exec chroot "$root" env -i HOME=/root PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin "$@"' sh "$root" "$@"
}
