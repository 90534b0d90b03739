"""The Grafana dashboards as Python; `make dashboards` writes their JSON, `make check` compares it."""
