#!/usr/bin/env bash
# system-packages.sh [hosts]: install the shared libraries that Mooncake's wheel needs and no Python package has;
# with `hosts`, install the commands with which tests/hosts makes network namespaces instead.
# Without root or apt-get it only names what is missing, and `make` goes on: everything else works without them.
set -euo pipefail

if [ "${1:-}" = hosts ]; then
    user="make test-hosts"
    wanted=(ip:iproute2 iptables:iptables nsenter:util-linux)
    has() { PATH="$PATH:/usr/sbin:/sbin" command -v "$1" >/dev/null; }
else
    user="the transport mooncake"
    wanted=(libibverbs.so.1:libibverbs1 librdmacm.so.1:librdmacm1 libnuma.so.1:libnuma1)
    # No pipe to `grep -q`: it exits at its first match, SIGPIPE then ends ldconfig, and pipefail reports a failure.
    libraries=$(ldconfig -p 2>/dev/null || true)
    has() { [[ $libraries == *"$1"* ]]; }
fi
packages=()
for pair in "${wanted[@]}"; do
    if ! has "${pair%%:*}"; then
        packages+=("${pair##*:}")
    fi
done
if [ ${#packages[@]} = 0 ]; then
    exit 0
fi
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "make: $user needs ${packages[*]} (Debian, Ubuntu: apt-get install ${packages[*]});" \
        "its tests are skipped until then" >&2
    exit 0
fi
echo "installing ${packages[*]}"
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null
