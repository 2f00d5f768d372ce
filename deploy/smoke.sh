#!/bin/sh
# Tries an image the way compose.yaml runs it, a few minutes on two cores: help, doctor, the demo, a node of Ray that gets
# well and ends when it is told to. Without weights and without a network.
#   sh deploy/smoke.sh [IMAGE]                     ENGINE=podman for podman
set -eu
image=${1:-vlmflow:0.1.0-cpu}
engine=${ENGINE:-docker}
node=vlmflow-smoke-$$
trap '"$engine" rm --force "$node" > /dev/null 2>&1 || true' EXIT

# run OPTION... IMAGE COMMAND...: without rights, as the image's user.
run() {
    "$engine" run --network none --shm-size 1g --cap-drop ALL --security-opt no-new-privileges "$@"
}

fail() {
    echo "smoke: $1" >&2
    exit 1
}

[ "$(run --rm "$image" id -u)" = 10001 ] || fail "the image's user is not 10001"
run --rm "$image" cat /proc/1/cmdline | tr '\0' ' ' | grep -q '^tini ' || fail "tini is not the first process"
run --rm "$image" vlmflow --help > /dev/null
run --rm "$image" vlmflow doctor
run --rm "$image" vlmflow demo /tmp/demo | grep -E '^(run |20)' || fail "the demo shows no run"

run --detach --name "$node" "$image" ray start --head --block --num-cpus=1 > /dev/null
well='import os, urllib.request as r; r.urlopen(os.environ["HEALTH_URL"], timeout=5)'
tries=0
until "$engine" exec "$node" python -c "$well" 2> /dev/null; do
    tries=$((tries + 1))
    [ "$tries" -lt 60 ] || fail "a node of Ray does not get well"
    sleep 2
done
echo "a node of Ray is well"
"$engine" stop --time 75 "$node" > /dev/null
code=$("$engine" inspect --format '{{.State.ExitCode}}' "$node")
[ "$code" != 137 ] || fail "the node had to be killed"
echo "it ended with $code"
