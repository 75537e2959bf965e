#!/bin/sh
# The tests of the page drive a browser. This sees that it is there.
set -eu
. "$(dirname "$0")/debian.sh"

is_there() {
    command -v chromium >/dev/null
}

is_there && exit 0
if can_install; then
    echo "installing Chromium for the tests of the page"
    install_packages chromium
fi
is_there && exit 0
echo "The tests of the page need a browser (Debian: apt-get install chromium). Without it:" >&2
echo "  .venv/bin/python -m pytest -m 'not chromium'" >&2
exit 1
