#!/usr/bin/env bash
# Installs into an environment that has uv: with uv, which takes seconds where pip takes a minute; or, if it
# can't, with pip, which reads settings that uv doesn't (pip.conf's mirror, say) and tells what is wrong. To have
# uv use a mirror where it can reach PyPI, too, set UV_DEFAULT_INDEX.
#
#     tools/install.sh ENVIRONMENT [what `pip install` takes]
set -euo pipefail

python=$1/bin/python
shift
if ! "$python" -m uv pip install --quiet --python "$python" "$@" 2> /dev/null; then
    "$python" -m pip --disable-pip-version-check --no-input install --quiet --quiet "$@"
fi
