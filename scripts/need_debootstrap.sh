#!/bin/sh
# The test of the image makes a clean Debian. This sees that debootstrap is there; what cannot be had, the test says.
set -eu
. "$(dirname "$0")/debian.sh"

[ "$(id -u)" = 0 ] || exit 0
command -v debootstrap >/dev/null && exit 0
if can_install; then
    echo "installing debootstrap for the test of the image"
    install_packages debootstrap
fi
