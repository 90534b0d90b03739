#!/bin/sh
# nginx in front of all healthy replicas of all services.
#
# A name of the network resolves to every running replica, ready or not. Those that answer /health become the
# servers of its upstream; when they change, nginx reads its files again, and streams that run go on.
set -eu
DIR=${FRONT_DIR:-/tmp/front}
PORT=${BACKEND_PORT:-8000}
mkdir -p "$DIR/upstreams"

upstream() { # NAME
    servers=""
    # A name that is not there may be asked for outside as well, where nobody answers.
    for address in $(timeout 2 getent ahostsv4 "$1" | awk '{ print $1 }' | sort -u); do
        if curl --fail --silent --max-time 1 --output /dev/null "http://$address:$PORT/health"; then
            servers="$servers    server $address:$PORT max_fails=1 fail_timeout=1s;
"
        fi
    done
    # Nobody there: an address that refuses, so that nginx answers 502 instead of not starting.
    # Without a zone each worker of nginx would count its own connections alone.
    printf 'upstream %s {\n    zone %s 256k;\n    least_conn;\n%s    keepalive 256;\n}\n' "$1" "$1" \
        "${servers:-    server 127.0.0.1:1;
}"
}

write() { # true where something changed
    changed=1
    for name in $BACKENDS; do
        upstream "$name" > "$DIR/new"
        if ! cmp -s "$DIR/new" "$DIR/upstreams/$name.conf"; then
            mv "$DIR/new" "$DIR/upstreams/$name.conf"
            changed=0
        fi
    done
    return $changed
}

# SERVICE=all names no service.
arm() { case " $BACKENDS " in *" $1 "*) echo "$1" ;; *) echo continuous ;; esac }

sed -e "s/@ARM_A@/$(arm "$ARM_A")/g" -e "s/@ARM_B@/$(arm "$ARM_B")/g" -e "s/@SHARE_A@/$SHARE_A/g" -e "s#@DIR@#$DIR#g" \
    -e "s/@BACKENDS@/$(echo "$BACKENDS" | tr ' ' '|')/g" -e "s/@LISTEN@/${LISTEN:-8000}/g" \
    "$(dirname "$0")/nginx.conf.in" > "$DIR/nginx.conf"
write || true
nginx -c "$DIR/nginx.conf" -g 'daemon off;' &
nginx=$!
trap 'kill -QUIT $nginx; wait $nginx; exit 0' TERM QUIT INT
while kill -0 $nginx 2>/dev/null; do
    sleep "${INTERVAL_S:-1}" &
    wait $! || true
    if write; then nginx -c "$DIR/nginx.conf" -s reload || true; fi
done
wait $nginx
