# A Bazel workspace with Mbed TLS from Debian's sources. Sourced, after lib.sh.

package_here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

# mbedtls_workspace DIRECTORY: makes it, or skips the script. The source package comes from the mirror that apt already uses;
# this needs no root, and leaves apt's own lists alone.
mbedtls_workspace() {
  local sources=$cache/mbedtls tarball uri codename apt
  if [ ! -e "$sources/complete" ]; then
    echo "fetching the source package mbedtls"
    mkdir -p "$sources/lists/partial"
    read -r uri codename < <(apt-get indextargets --format '$(REPO_URI) $(CODENAME)' 'Created-By: Packages' | head -n 1) ||
      skip "apt knows no mirror"
    echo "deb-src [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $uri $codename main" >"$sources/sources.list"
    apt=(apt-get -qq -o "Dir::Etc::sourcelist=$sources/sources.list" -o Dir::Etc::sourceparts=/dev/null
      -o "Dir::State::lists=$sources/lists")
    (cd "$sources" && "${apt[@]}" update && "${apt[@]}" source --download-only mbedtls) >/dev/null 2>&1 ||
      skip "the source package mbedtls could not be fetched"
    touch "$sources/complete"
  fi
  tarball=$(find "$sources" -name 'mbedtls_2.28*.orig.tar.*' ! -name '*.asc' | head -n 1)
  [ -n "$tarball" ] || skip "the BUILD file is for Mbed TLS 2.28, and Debian has another"
  mkdir -p "$1"
  tar xf "$tarball" -C "$1" --strip-components=1
  cp -r "$package_here"/../bazel/workspace/{.bazelrc,WORKSPACE,MODULE.bazel,stubs} "$1"
  cp "$package_here/run_suite.sh" "$1"
  cp "$package_here/BUILD.mbedtls" "$1/BUILD"
}
