# The agent on x86 with an NVIDIA card, or without one. Build from the repository's root:
#   docker build -f containers/agent-cuda.Dockerfile -t kseed-edge .
# torch's wheels bring CUDA; the driver comes from the host through the NVIDIA container toolkit. Checked by a linter and
# by tests/test_containers.py; NOT YET BUILT anywhere. docs/installing.md says how to run it.
FROM python:3.12-slim-bookworm AS build
WORKDIR /src
COPY pyproject.toml README.md constraints.txt ./
COPY shared shared
COPY edge_client edge_client
COPY aggregator aggregator
COPY tools tools
RUN python -m venv /opt/kseed && /opt/kseed/bin/pip install --no-cache-dir -c constraints.txt '.[edge,nvidia]'

FROM python:3.12-slim-bookworm
# gcc: Triton compiles its launcher when a kernel is first used; without it kseed takes the torch kernel.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 kseed && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /var/lib/kseed kseed \
    && install --directory --owner=10001 --group=10001 --mode=0700 /var/lib/kseed /var/cache/kseed
COPY --from=build /opt/kseed /opt/kseed
ENV PATH=/opt/kseed/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/var/lib/kseed \
    XDG_STATE_HOME=/var/lib \
    HF_HOME=/var/cache/kseed/huggingface \
    KSEED_CACHE=/var/cache/kseed/models \
    NUMBA_CACHE_DIR=/var/cache/kseed/numba \
    TRITON_CACHE_DIR=/var/cache/kseed/triton \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001
VOLUME ["/var/lib/kseed", "/var/cache/kseed"]
WORKDIR /var/lib/kseed
# 0 at work, 1 paused, 4 no broker: nothing that a restart would mend. 5 not running, 6 silent for ten minutes.
HEALTHCHECK --interval=120s --timeout=30s --start-period=600s --retries=3 \
    CMD ["sh", "-c", "kseed-edge status >/dev/null; [ $? -lt 5 ]"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["kseed-edge"]
CMD ["up"]
