#!/bin/sh
# The test of the image makes a clean Debian. This sees that debootstrap is there; what cannot be had, the test says.
set -eu

[ "$(id -u)" = 0 ] || exit 0
command -v debootstrap >/dev/null && exit 0
if command -v apt-get >/dev/null; then
    echo "installing debootstrap for the test of the image"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -qq --yes --no-install-recommends debootstrap
fi
