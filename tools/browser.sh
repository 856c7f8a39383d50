#!/usr/bin/env bash
# A Chromium for the tests of the report: installed where that takes no question, else asked for.
set -euo pipefail
for name in chromium chromium-browser google-chrome; do
  command -v "$name" >/dev/null && exit 0
done
if command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
  echo "installing chromium"
  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null
else
  echo "the tests of the report need Chromium: install it (Debian, Ubuntu: sudo apt-get install chromium)" >&2
  exit 1
fi
