#!/bin/sh
# The tests of docs/replicas.md run nginx and HAProxy as it says. This sees that they are there.
set -eu

is_there() {
    command -v nginx >/dev/null && command -v haproxy >/dev/null
}

PATH=$PATH:/usr/sbin
is_there && exit 0
if command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
    echo "installing nginx and HAProxy for the tests"
    # The programs alone: no server of Debian's is started.
    policy=/usr/sbin/policy-rc.d
    if [ ! -e "$policy" ]; then
        trap 'rm -f "$policy"' EXIT
        printf '#!/bin/sh\nexit 101\n' >"$policy"
        chmod +x "$policy"
    fi
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -qq --yes --no-install-recommends nginx haproxy
fi
is_there && exit 0
echo "The tests need nginx and HAProxy (Debian: apt-get install nginx haproxy). Without them:" >&2
echo "  .venv/bin/python -m pytest -m deploy tests/deploy --deselect tests/deploy/test_other_proxies.py" >&2
exit 1
