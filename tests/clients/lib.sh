# What the client scripts share: a server of their own on a free port, and checks that are sentences.
# Sourced; expects $gorego (the binary).

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

# no_exec_directories STORE: nothing is left in the store's build root.
no_exec_directories() { [ -z "$(find "$1/build" -mindepth 1 -maxdepth 1 2>/dev/null | head -n 1)" ]; }

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
    if [ -f "${work:-}/out" ]; then tail -n 30 "$work/out" | sed 's/^/        | /'; fi
  fi
}

# summary NAME: the closing line; fails when a check did.
summary() {
  echo "$1: $passed passed, $failed failed"
  [ "$failed" = 0 ]
}
