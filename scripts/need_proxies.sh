#!/bin/sh
# The tests of docs/replicas.md run nginx and HAProxy as it says. This sees that they are there.
set -eu
. "$(dirname "$0")/debian.sh"

is_there() {
    command -v nginx >/dev/null && command -v haproxy >/dev/null
}

PATH=$PATH:/usr/sbin
is_there && exit 0
if can_install; then
    echo "installing nginx and HAProxy for the tests"
    install_packages nginx haproxy
fi
is_there && exit 0
echo "The tests need nginx and HAProxy (Debian: apt-get install nginx haproxy). Without them:" >&2
echo "  .venv/bin/python -m pytest -m deploy tests/deploy --deselect tests/deploy/test_other_proxies.py" >&2
exit 1
