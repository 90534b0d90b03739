# The third parties of compose.yml from a distribution's packages, where no registry of images can be reached.
ARG BASE=debian:bookworm-slim
FROM ${BASE} AS packages
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends curl nginx-light prometheus prometheus-alertmanager \
        prometheus-pushgateway \
    && apt-get clean && rm -rf /var/lib/apt/lists/* /var/cache/apt/*

FROM packages AS nginx
FROM packages AS prometheus
ENTRYPOINT ["/usr/bin/prometheus"]
FROM packages AS alertmanager
ENTRYPOINT ["/usr/bin/prometheus-alertmanager"]
FROM packages AS pushgateway
ENTRYPOINT ["/usr/bin/prometheus-pushgateway"]
