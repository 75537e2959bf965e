#!/bin/sh
# The tests of dashboards and alerts start a Prometheus of their own. This sees that its programs are there.
set -eu

is_there() {
    command -v prometheus >/dev/null && command -v promtool >/dev/null
}

is_there && exit 0
if command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
    echo "installing Prometheus for the tests of dashboards and alerts"
    # The programs alone: no server of Debian's is started.
    policy=/usr/sbin/policy-rc.d
    if [ ! -e "$policy" ]; then
        trap 'rm -f "$policy"' EXIT
        printf '#!/bin/sh\nexit 101\n' >"$policy"
        chmod +x "$policy"
    fi
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -qq --yes --no-install-recommends prometheus
fi
is_there && exit 0
echo "make test-deploy needs Prometheus (Debian: apt-get install prometheus). Without it:" >&2
echo "  .venv/bin/python -m pytest -m deploy --deselect tests/deploy/test_prometheus.py tests/deploy" >&2
exit 1
