#!/bin/sh
# The tests of dashboards and alerts start a Prometheus of their own. This sees that its programs are there.
set -eu
. "$(dirname "$0")/debian.sh"

is_there() {
    command -v prometheus >/dev/null && command -v promtool >/dev/null
}

is_there && exit 0
if can_install; then
    echo "installing Prometheus for the tests of dashboards and alerts"
    install_packages prometheus
fi
is_there && exit 0
echo "make test-deploy needs Prometheus (Debian: apt-get install prometheus). Without it:" >&2
echo "  .venv/bin/python -m pytest -m deploy --deselect tests/deploy/test_prometheus.py tests/deploy" >&2
exit 1
