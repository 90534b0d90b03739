# The part of test.sh that runs against the stack.

# A run from the harness's container, through the front; its parquet comes to $WORK/out/NAME.parquet.
bench() { # NAME PATH [lab bench options]
    name=$1 path=$2
    shift 2
    $COMPOSE --profile harness run --rm --no-deps -T -e URL="http://front:8000$path" -e FLOOR=0 -e OUT="results/$name" \
        harness bench "$@" >"$WORK/out/$name.log" 2>&1
    code=$?
    docker run --rm --network none -v "${PROJECT}_results:/lab/results:ro" --entrypoint sh batching-lab:harness \
        -c "cat results/$name/*/*[0-9]Z.parquet" >"$WORK/out/$name.parquet"
    return $code
}
rows() { # PYTHON over the rows of files, as tables a, b, ...
    expression=$1
    shift
    .venv/bin/python - "$expression" "$@" <<'END'
import sys
import pandas as pd
tables = [pd.read_parquet(path) for path in sys.argv[2:]]
print(eval(sys.argv[1], {"pd": pd, **dict(zip("abc", tables))}))
END
}
address() { docker inspect --format '{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}' "$1"; }
KEY="Authorization: Bearer $API_KEY"
served() { curl --silent --max-time 2 --header "$KEY" "http://$(address "$1"):8000/metrics" | awk '/^lab_sequences_total/ { n += $2 } END { print n + 0 }'; }
when_busy() { # CONTAINER COMMAND...: in the middle of a run, when it has answered more than the warm-up
    container=$1 before=$(served "$1")
    shift
    for _ in $(seq 600); do
        [ "$(served "$container")" -ge $((before + 25)) ] && break
        sleep 0.1
    done
    "$@" >/dev/null
}
ask() { curl --fail --silent --max-time 10 --header "$KEY" "$@"; }
up() { $COMPOSE --profile all --profile llama up --detach --wait --no-build --quiet-pull "$@" >"$WORK/up.log" 2>&1 || { tail -20 "$WORK/up.log"; fail "up $*"; }; }

# A model with real weights, which `stage` takes from its image's package.
real_model() { # SERVICE WORD-OF-THE-ANSWER
    MODEL=smollm2-135m up "$1" front
    sleep 3
    answer=$(ask --max-time 60 --header 'Content-Type: application/json' "$FRONT/$1/v1/chat/completions" --data \
        '{"max_tokens": 12, "temperature": 0, "messages": [{"role": "user", "content": "What is the capital of France?"}]}') ||
        fail "$1 does not answer with smollm2-135m"
    case $answer in *"$2"*) say "$1 with smollm2-135m answers: $2" ;; *) fail "$1 with smollm2-135m: $answer" ;; esac
}

# The staging container is killed in its middle, and the next one does its work.
$COMPOSE up --detach --no-build stage >/dev/null 2>&1
sleep 2
$COMPOSE kill stage >/dev/null 2>&1 || true
export BACKEND=null ARM_A=continuous ARM_B=dynamic SHARE_A=80
up baseline static dynamic continuous $STACK
say "the stack is up: $($COMPOSE ps --format '{{.Service}}' | sort | tr '\n' ' ')"

for variant in baseline static dynamic continuous; do
    bench "null-$variant" "/$variant" --requests 24 --concurrency 4 || fail "$variant: $(tail -5 "$WORK/out/null-$variant.log")"
    served=$(ask "$FRONT/$variant/model" | python3 -c 'import json, sys; print(json.load(sys.stdin)["variant"])')
    [ "$served" = "$variant" ] || fail "/$variant is answered by $served"
done
equal=$(rows 'a.set_index("prompt_id").output_sha256.equals(b.set_index("prompt_id").output_sha256.reindex(a.prompt_id))' \
    "$WORK/out/null-baseline.parquet" "$WORK/out/null-continuous.parquet")
[ "$equal" = True ] || fail "baseline and continuous gave other tokens"
say "bench against each variant through the front; equal tokens"

arms() { for id in $(seq 100); do curl --silent --output /dev/null --dump-header - --header "X-Request-Id: $id" "$FRONT/health" |
    tr -d '\r' | sed -n 's/^X-Lab-Arm: //p'; done; }
arms >"$WORK/arms" && arms >"$WORK/arms-again"
cmp -s "$WORK/arms" "$WORK/arms-again" || fail "the same request went to another arm"
in_a=$(grep -c '^continuous$' "$WORK/arms")
[ "$(sort "$WORK/arms" | uniq -c | wc -l)" = 2 ] && [ "$in_a" -ge 65 ] && [ "$in_a" -le 92 ] || fail "$in_a of 100 ids went to arm A"
say "two arms by the hash of the request's id: $in_a of 100 in A, the same ones twice"

prometheus=http://127.0.0.1:$PROMETHEUS_PORT/api/v1
found=""
for _ in $(seq 30); do
    found=$(ask "$prometheus/query" --data-urlencode 'query=count(up{job="batching-lab"} == 1)' |
        python3 -c 'import json, sys; r = json.load(sys.stdin)["data"]["result"]; print(r[0]["value"][1] if r else 0)')
    [ "$found" = 4 ] && break
    sleep 1
done
[ "$(curl --silent --output /dev/null --write-out '%{http_code}' "$FRONT/metrics")" = 401 ] || fail "no key is asked for"
[ "$found" = 4 ] || fail "Prometheus found $found of 4 services"
ask "$prometheus/alertmanagers" | grep -q alertmanager || fail "Prometheus knows no Alertmanager"
ask "http://127.0.0.1:$ALERTMANAGER_PORT/-/ready" >/dev/null || fail "Alertmanager is not ready"
echo 'lab_docker_test 1' | ask --data-binary @- "http://127.0.0.1:$PUSHGATEWAY_PORT/metrics/job/test" || fail "Pushgateway"
say "Prometheus scrapes 4 services by discovery, with the key; Alertmanager and Pushgateway answer"

up --scale continuous=3 continuous front
for _ in $(seq 30); do
    [ "$($COMPOSE exec -T front grep -c ':8000' /tmp/front/upstreams/continuous.conf)" = 3 ] && break
    sleep 1
done
replicas=$($COMPOSE ps --quiet continuous)
victim=$(echo "$replicas" | tail -1)

# SIGTERM: the replica finishes what it accepted, and the others get the rest. Nothing is lost.
when_busy "$victim" docker stop --time 40 "$victim" &
bench drained /continuous --requests 300 --concurrency 24 || fail "draining lost requests: $(tail -5 "$WORK/out/drained.log")"
wait $!
[ "$(docker inspect --format '{{.State.ExitCode}}' "$victim")" = 0 ] || fail "the drained replica did not end with 0"
equal=$(rows 'len(a) == 300 and a.error.isna().all()' "$WORK/out/drained.parquet")
[ "$equal" = True ] || fail "draining lost requests"
say "a replica drained under load: 300 of 300 answered, exit code 0"

# SIGKILL: streams in its hands end in an error that says so; everything else is answered.
docker start "$victim" >/dev/null
up --scale continuous=3 --no-recreate continuous
when_busy "$victim" docker kill "$victim" &
bench killed /continuous --requests 300 --concurrency 24 || true
wait $!
lost=$(rows 'int(a.error.notna().sum())' "$WORK/out/killed.parquet")
total=$(rows 'len(a)' "$WORK/out/killed.parquet")
[ "$total" = 300 ] && [ "$lost" -ge 1 ] && [ "$lost" -le 24 ] || fail "a killed replica: $lost of $total failed"
say "a replica killed under load: $lost of $total cut off in mid-stream, each with an error; the rest answered"

# Unbuffered: the first token through the front against the same replica asked directly.
up --scale continuous=1 continuous front
direct=http://$(address "$($COMPOSE ps --quiet continuous)"):8000
sleep 3
bench front /continuous --requests 60 --concurrency 1
$COMPOSE --profile harness run --rm --no-deps -T -e URL="$direct" -e FLOOR=0 -e OUT=results/direct harness \
    bench --requests 60 --concurrency 1 >"$WORK/out/direct.log" 2>&1
docker run --rm --network none -v "${PROJECT}_results:/lab/results:ro" --entrypoint sh batching-lab:harness \
    -c 'cat results/direct/*/*[0-9]Z.parquet' >"$WORK/out/direct.parquet"
say "TTFT p50 through the front minus direct: $(rows 'round(a.ttft_ms.median() - b.ttft_ms.median(), 2)' \
    "$WORK/out/front.parquet" "$WORK/out/direct.parquet") ms; frames a request $(rows 'round(a.chunk_s.map(len).mean(), 1)' \
    "$WORK/out/front.parquet") and $(rows 'round(a.chunk_s.map(len).mean(), 1)' "$WORK/out/direct.parquet")"

case " $TARGETS " in *" cpu "*)
    export BACKEND=torch
    up continuous front
    ask "$FRONT/continuous/model" | grep -q '"cpu_kernels":true' || fail "the image runs without the CPU kernels"
    sleep 3
    bench torch /continuous --requests 8 --concurrency 4 || fail "torch: $(tail -5 "$WORK/out/torch.log")"
    say "torch in the container: $(grep 'output tok/s' "$WORK/out/torch.log")"
    $COMPOSE stop continuous >/dev/null 2>&1
    FLOOR=0 .venv/bin/python -m tools.cli bench --variant continuous --backend torch --model lab-26m --requests 8 \
        --concurrency 4 --out "$WORK/outside" >"$WORK/out/outside.log" 2>&1 || fail "$(tail -3 "$WORK/out/outside.log")"
    say "torch outside: $(grep 'output tok/s' "$WORK/out/outside.log")"
    equal=$(rows 'a.set_index("prompt_id").output_sha256.equals(b.set_index("prompt_id").output_sha256.reindex(a.prompt_id))' \
        "$WORK/out/torch.parquet" "$(ls "$WORK"/outside/continuous/*[0-9]Z.parquet)")
    [ "$equal" = True ] || fail "the container gave other tokens than the same commit outside"
    say "the same tokens inside and outside"
    real_model continuous Paris
    ;;
esac

case " $TARGETS " in *" llama "*)
    up llama front
    bench llama /llama --requests 8 --concurrency 4 || fail "llama: $(tail -5 "$WORK/out/llama.log")"
    say "llama.cpp in the container: $(grep 'output tok/s' "$WORK/out/llama.log")"
    # In Q4_1 llama.cpp computes "L'Étoile, ...", outside a container as well.
    real_model llama toile
    ;;
esac

$COMPOSE --profile all stop >/dev/null 2>&1
codes=$(docker inspect --format '{{.State.ExitCode}}' $($COMPOSE ps --all --quiet baseline static dynamic))
[ "$(echo "$codes" | sort -u)" = 0 ] || fail "docker compose stop: exit codes $codes"
say "docker compose stop: every service ended with 0"

# As a user does it: every service without a profile too, and `--wait` with containers that are to end. Grafana has
# no package, so a server that answers nobody stands for it. No key is asked for.
$COMPOSE --profile '*' down --volumes >/dev/null 2>&1
API_KEY="" GRAFANA_IMAGE=lab-test:pushgateway make --no-print-directory up SERVICE=continuous REPLICAS=2 BACKEND=null \
    >"$WORK/up.log" 2>&1 || fail "make up: $(tail -5 "$WORK/up.log")"
sleep 3
ask "$FRONT/model" | grep -q '"variant":"continuous"' || fail "make up: the front does not answer"
old=$($COMPOSE ps --quiet continuous | sort)
bench rolled /continuous --requests 400 --rate 20 &
when_busy "$(echo "$old" | head -1)" true
began=$SECONDS
BACKEND=null make --no-print-directory roll SERVICE=continuous >"$WORK/up.log" 2>&1 || fail "make roll: $(tail -5 "$WORK/up.log")"
took=$((SECONDS - began))
wait $! || fail "make roll lost requests: $(tail -5 "$WORK/out/rolled.log")"
equal=$(rows 'len(a) == 400 and a.error.isna().all()' "$WORK/out/rolled.parquet")
[ "$equal" = True ] || fail "make roll lost requests"
new=$($COMPOSE ps --quiet continuous | sort)
[ "$(echo "$new" | wc -w)" = 2 ] && [ -z "$(comm -12 <(echo "$old") <(echo "$new"))" ] || fail "make roll left $new of $old"
say "make roll: 2 new replicas for 2 old ones in $took s, 400 of 400 answered"
make --no-print-directory down >"$WORK/up.log" 2>&1 || fail "make down: $(tail -5 "$WORK/up.log")"
[ -z "$($COMPOSE --profile '*' ps --all --quiet)" ] || fail "make down left containers"
say "make up with 2 replicas, make down"
