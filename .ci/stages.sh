# Sourced by .ci/run and tests/run. `stage NAME COMMAND...` runs a command; when the script ends, a table shows how many seconds
# each stage took, and which one failed.

stage_table=
stage_name=

stage() {
  stage_name=$1
  stage_begin=$SECONDS
  shift
  printf '\n== %s\n' "$stage_name"
  # No `||` here: the command may be a function that relies on `set -e`.
  "$@"
  stage_record
}

stage_record() {
  stage_table+=$(printf '%6d s  %s' "$((SECONDS - stage_begin))" "$stage_name${1:-}")$'\n'
  stage_name=
}

stage_summary() {
  local status=$?
  [ -z "$stage_name" ] || stage_record ' FAILED'
  printf '\n== %s: the seconds of each stage\n%s%6d s  in all\n' "$0" "$stage_table" "$SECONDS"
  exit "$status"
}

trap stage_summary EXIT
