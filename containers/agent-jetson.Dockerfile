# The agent on a Jetson Orin with JetPack 6 (L4T 36.4, CUDA 12.6, Python 3.10). Build on the Jetson, from the repository's root:
#   docker build -f containers/agent-jetson.Dockerfile -t kseed-edge-jetson .
# The steps are those of docs/jetson.md, which says what of them was verified. Checked by a linter and by
# tests/test_containers.py; NOT YET BUILT on hardware.
ARG BASE=nvcr.io/nvidia/l4t-jetpack:r36.4.0

FROM ${BASE} AS build
ARG TORCH=https://developer.download.nvidia.com/compute/redist/jp/v61/pytorch/torch-2.5.0a0+872d972e41.nv24.08.17622132-cp310-cp310-linux_aarch64.whl
ARG BITSANDBYTES=0.46.1
ARG CAPABILITY=87
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
    build-essential ca-certificates cmake git python3-dev python3-venv && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/kseed
ENV PATH=/opt/kseed/bin:$PATH
WORKDIR /src
COPY constraints-jetson.txt ./
# hadolint ignore=DL3013
RUN pip install --no-cache-dir "numpy==1.26.4" "${TORCH}" && pip install --no-cache-dir -r constraints-jetson.txt
RUN git clone --depth 1 --branch "${BITSANDBYTES}" https://github.com/bitsandbytes-foundation/bitsandbytes.git \
    && cmake -DCOMPUTE_BACKEND=cuda -DCOMPUTE_CAPABILITY="${CAPABILITY}" -S bitsandbytes -B bitsandbytes \
    && cmake --build bitsandbytes --parallel 4 \
    && pip install --no-cache-dir --no-deps ./bitsandbytes
COPY pyproject.toml README.md ./
COPY shared shared
COPY edge_client edge_client
COPY aggregator aggregator
COPY tools tools
# --no-deps: everything is there, and nothing may replace NVIDIA's torch.
RUN pip install --no-cache-dir --no-deps .

FROM ${BASE}
ARG CUSPARSELT=0.7.1
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# torch 2.5 loads libcusparseLt, which JetPack does not bring. gcc: Triton and CUDA compile on first use.
# hadolint ignore=DL3008
RUN apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
    ca-certificates curl gcc libc6-dev libopenblas0 python3 \
    && repository="cusparselt-local-tegra-repo-ubuntu2204-${CUSPARSELT}" \
    && curl -fsSLo /tmp/repository.deb \
    "https://developer.download.nvidia.com/compute/cusparselt/${CUSPARSELT}/local_installers/${repository}_1.0-1_arm64.deb" \
    && dpkg -i /tmp/repository.deb && cp "/var/${repository}"/cusparselt-*-keyring.gpg /usr/share/keyrings/ \
    && apt-get update && apt-get install -y --no-install-recommends libcusparselt0 \
    && rm -rf /tmp/repository.deb /var/lib/apt/lists/* \
    && groupadd --gid 10001 kseed && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /var/lib/kseed \
    --groups video kseed \
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
HEALTHCHECK --interval=120s --timeout=30s --start-period=600s --retries=3 \
    CMD ["sh", "-c", "kseed-edge status >/dev/null; [ $? -lt 5 ]"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["kseed-edge"]
CMD ["up"]
