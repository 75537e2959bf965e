#!/bin/sh
# The tests of the shared catalogue start a PostgreSQL server of their own. This sees that its programs are there.
set -eu
. "$(dirname "$0")/debian.sh"

is_there() {
    ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || command -v initdb >/dev/null
}

is_there && exit 0
if can_install; then
    echo "installing PostgreSQL's server programs for the tests"
    mkdir -p /etc/postgresql-common
    # The programs alone: no server of Debian's is started.
    echo "create_main_cluster = false" >/etc/postgresql-common/createcluster.conf
    install_packages postgresql
fi
is_there && exit 0
echo "The tests need PostgreSQL's server programs (Debian: apt-get install postgresql). Without them:" >&2
echo "  .venv/bin/python -m pytest -m 'not postgres'" >&2
exit 1
