# Sourced by need_*.sh: Debian's packages for the tests.

can_install() {
    command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]
}

# Installs packages. The programs alone: no server of Debian's is started.
install_packages() {
    policy=/usr/sbin/policy-rc.d
    if [ ! -e "$policy" ]; then
        trap 'rm -f "$policy"' EXIT
        printf '#!/bin/sh\nexit 101\n' >"$policy"
        chmod +x "$policy"
    fi
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -qq --yes --no-install-recommends "$@"
}
