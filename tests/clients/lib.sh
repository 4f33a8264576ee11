# What the client scripts share: a server of their own on a free port, and checks that are sentences.
# Sourced; expects $gorego (the binary).
#
# A script ends with 0 when every check held, with 1 when one did not, and with 77 when its client cannot be installed
# here.

# Where clients are installed, once; they stay for the next run.
cache=${CLIENTS_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/gorego-clients}

passed=0
failed=0
starts=0

# start_server STORE [HOST:PORT]: starts a server; sets $endpoint to host:port and $server to its pid.
start_server() {
  local store=$1
  mkdir -p "$store"
  # A log of its own for each: that of an earlier server would answer for this one until it is truncated.
  starts=$((starts + 1))
  server_log=$store.$starts.log
  "$gorego" serve --listen-addr "${2:-127.0.0.1:0}" --local-cache-dir "$store" 2>"$server_log" &
  server=$!
  eventually grep -q '"event":"server_started"' "$server_log" || {
    echo "the server did not start:" >&2
    cat "$server_log" >&2
    exit 1
  }
  endpoint=$(grep -m1 '"event":"server_started"' "$server_log" | grep -o '127\.0\.0\.1:[0-9]*' | head -n 1)
}

# http_endpoint: host:port of the HTTP cache of the server that was started, if it has one.
http_endpoint() {
  grep -m1 '"event":"http_started"' "$server_log" | grep -o '127\.0\.0\.1:[0-9]*' | head -n 1
}

# Stops the server with SIGTERM and waits for its end.
stop_server() {
  [ -n "${server:-}" ] || return 0
  kill -TERM "$server" 2>/dev/null || true
  wait "$server" 2>/dev/null || true
  server=
}

# completed COUNT: at least so many operations were completed since the server started.
completed() { [ "$(grep -c '"event":"operation_completed"' "$server_log")" -ge "$1" ]; }

# eventually COMMAND...: succeeds as soon as the command does, fails after 15 seconds.
eventually() {
  local end=$((SECONDS + 15))
  until "$@" >/dev/null 2>&1; do
    [ "$SECONDS" -lt "$end" ] || return 1
    read -rt 0.05 <> <(:) || true
  done
}

# fails COMMAND...: succeeds when the command does not.
fails() { ! "$@"; }

# matches REGEX TEXT
matches() { grep -qE "$1" <<<"$2"; }

# no_exec_directories STORE: nothing is left in the store's build root but staged inputs, which are kept for later actions.
no_exec_directories() {
  [ -z "$(find "$1/build" -mindepth 1 -maxdepth 1 ! -name 't-[0-9]*' ! -name images 2>/dev/null | head -n 1)" ]
}

# check SENTENCE COMMAND...: runs the command and reports whether the sentence holds.
check() {
  local sentence=$1
  shift
  if "$@" >/dev/null 2>&1; then
    passed=$((passed + 1))
    echo "ok      $sentence"
  else
    failed=$((failed + 1))
    echo "FAILED  $sentence"
    if [ -f "${work:-}/out" ]; then tail -n 30 "$work/out" | cut -c1-400 | sed 's/^/        | /'; fi
  fi
}

# skip REASON: ends the script, because its client cannot be installed on this machine. Earlier failures still fail the
# script.
skip() {
  echo "SKIP: $1"
  [ "$failed" = 0 ] || exit 1
  exit 77
}

# not_by_default REASON: skips the script when it runs with all others, because it or its installation takes many minutes.
# It goes on when it was named (`all GOREGO NAME`, or run by itself).
not_by_default() { [ -z "${CLIENTS_ALL:-}" ] || skip "$1; it runs when the script is named"; }

# left_out WHAT REASON: a check that cannot be made here; said plainly, and no failure.
left_out() { echo "SKIP    $1: $2"; }

# have PROGRAM...: all of them are installed.
have() {
  local program
  for program in "$@"; do command -v "$program" >/dev/null 2>&1 || return 1; done
}

# needs_debian PROGRAM[=PACKAGE]...: installs the packages of the programs that are missing, or skips the script.
needs_debian() {
  local each missing=()
  for each in "$@"; do have "${each%%=*}" || missing+=("${each##*=}"); done
  [ ${#missing[@]} = 0 ] && return
  { have apt-get && [ "$(id -u)" = 0 ]; } || skip "needs ${missing[*]}; only root on Debian can install packages here"
  echo "installing ${missing[*]}"
  { apt-get update -qq &&
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"; } >/dev/null 2>&1 ||
    skip "Debian's packages ${missing[*]} could not be installed"
  for each in "$@"; do have "${each%%=*}" || skip "${each##*=} is installed but has no ${each%%=*}"; done
}

# needs_npm DIRECTORY PACKAGE...: installs npm packages there, or skips the script.
needs_npm() {
  local directory=$1
  shift
  [ -e "$directory/complete" ] && return
  have npm || skip "npm is not installed"
  echo "installing $* with npm"
  mkdir -p "$directory"
  (cd "$directory" && timeout 300 npm install --prefix . --no-audit --no-fund --silent "$@") >/dev/null 2>&1 ||
    skip "$* could not be installed with npm"
  touch "$directory/complete"
}

# needs_pypi DIRECTORY PACKAGE...: installs Python packages into a virtual environment there, or skips the script.
needs_pypi() {
  local directory=$1
  shift
  [ -e "$directory/complete" ] && return
  have python3 || skip "python3 is not installed"
  echo "installing $* with pip"
  { python3 -m venv "$directory" && timeout 300 "$directory/bin/pip" install -q "$@"; } >/dev/null 2>&1 ||
    skip "$* could not be installed with pip"
  touch "$directory/complete"
}

# needs_go DIRECTORY PACKAGE...: builds the newest version of Go programs into it, or skips the script.
needs_go() {
  local directory=$1 package
  shift
  for package in "$@"; do
    [ -x "$directory/${package##*/}" ] && continue
    have go || skip "Go is not installed"
    echo "building ${package##*/} with Go"
    GOBIN=$directory timeout 400 go install "$package@latest" >/dev/null 2>&1 ||
      skip "the Go package $package could not be installed"
  done
}

# summary NAME: the closing line; fails when a check did.
summary() {
  echo "$1: $passed passed, $failed failed"
  [ "$failed" = 0 ]
}
