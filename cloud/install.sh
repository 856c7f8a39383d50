#!/usr/bin/env bash
# Installs distillax from this checkout into its .venv, with the tested versions and a Python of its own, as
# the image's may be too old:
#
#     cloud/install.sh tpu        # or cuda
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
source cloud/common.sh
[[ ${1:-} == tpu || ${1:-} == cuda ]] || fail "say for what: cloud/install.sh tpu, or cuda"

export PATH="$HOME/.local/bin:$PATH"
# Images whose Python is managed by apt refuse even --user without this variable.
command -v uv >/dev/null || PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv
uv venv --quiet --allow-existing --python 3.12 .venv
uv pip install --quiet --python .venv --constraint requirements/runtime.txt --editable ".[$1]"
