# shellcheck shell=bash
# What the scripts of this folder share; sourced by them.

dry_run=""

# The comment at the top of the script.
usage() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; }

# A mistake of the user's: one sentence, and code 2.
fail() {
    printf '%s: error: %s\n' "${0##*/}" "$1" >&2
    exit 2
}

# Ends with a sentence unless every variable named is set.
need() {
    local name
    for name in "$@"; do
        [[ ${!name:-} ]] || fail "$name is not set; export $name=..., see \`$0 --help\`"
    done
}

# Runs what changes something, or prints it if this is a dry run. What only asks is run as it is.
run() {
    if [[ $dry_run ]]; then
        printf '%q ' "$@"
        echo
    else
        "$@"
    fi
}

# interrupted CODE RUN_FOLDER: whether a training that ended with CODE has steps left and should go on.
# After SIGTERM distillax exits with 0 too, once its checkpoint is written, so the code alone does not tell;
# before it has read its data, or several processes have made their first step, SIGTERM just ends it, with 143.
interrupted() {
    local steps
    (($1 == 143)) && return 0
    (($1 == 0)) || return 1
    steps=$(sed -n 's/^steps: //p' "$2/config.yml") || return 1
    [[ $steps && ! -d $2/checkpoints/$steps ]]
}

# until_ready PID URL ...: waits until all servers answer; code 1 if PID, which brings up one, has ended.
until_ready() {
    local pid=$1 url
    for url in "${@:2}"; do
        until curl --fail --silent --max-time 10 --output /dev/null "$url/health"; do
            kill -0 "$pid" 2>/dev/null || return 1
            sleep 5
        done
    done
}
