# The aggregator: no torch. Build from the repository's root:
#   docker build -f containers/aggregator.Dockerfile -t kseed-aggregator .
# Checked by a linter and by tests/test_containers.py; NOT YET BUILT anywhere. docs/installing.md says how to run it.
FROM python:3.12-slim-bookworm AS build
WORKDIR /src
COPY pyproject.toml README.md constraints.txt ./
COPY shared shared
COPY edge_client edge_client
COPY aggregator aggregator
COPY tools tools
RUN python -m venv /opt/kseed && /opt/kseed/bin/pip install --no-cache-dir -c constraints.txt .

FROM python:3.12-slim-bookworm
# Numbers, because a host knows no names of ours: the volume belongs to 10001.
RUN groupadd --gid 10001 kseed && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /var/lib/kseed kseed \
    && install --directory --owner=10001 --group=10001 --mode=0700 /var/lib/kseed
COPY --from=build /opt/kseed /opt/kseed
ENV PATH=/opt/kseed/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    XDG_DATA_HOME=/var/lib
USER 10001:10001
VOLUME /var/lib/kseed
WORKDIR /var/lib/kseed
# That the store can be read; whether the process lives, the container's own state says.
HEALTHCHECK --interval=60s --timeout=20s --start-period=60s --retries=3 CMD ["kseed-aggregator", "list"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["kseed-aggregator"]
CMD ["--help"]
