# The image of `mm serve`, for pods as the Java mesh has them.
#
#   docker build -t mm .
#
# `make test-image` carries out these steps without a container runtime and starts what comes out,
# so they use only what it knows (tests/pod/dockerfile.py).
#
# For a build that can be repeated to the byte, name the base by its digest:
# --build-arg BASE=docker.io/library/debian:bookworm-slim@sha256:... Python packages are pinned by
# hash in requirements.lock; Debian's are those of the stable release, with its security updates.
ARG BASE=docker.io/library/debian:bookworm-slim

# --- build: compiles the extension, and fills /opt/mm ---------------------------------------------
FROM ${BASE} AS build
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        binutils ca-certificates gcc libc6-dev libnghttp2-dev libssl-dev pkg-config \
        python3-dev python3-venv
WORKDIR /src
COPY pyproject.toml requirements.lock config/image/pins.py ./
RUN python3 pins.py >pins.txt \
    && python3 pins.py cython setuptools >build-pins.txt \
    && python3 -m venv /build \
    && /build/bin/pip install --no-cache-dir --no-compile --no-deps --require-hashes \
        -r build-pins.txt \
    && python3 -m venv --without-pip /opt/mm \
    && /build/bin/pip --python /opt/mm/bin/python install --no-cache-dir --no-compile --no-deps \
        --require-hashes -r pins.txt
COPY setup.py README.md CHANGELOG.md LICENSE MANIFEST.in ./
COPY mm mm
# What is compiled here holds whatever the times of the files are, and nobody need write it later.
RUN SOURCE_DATE_EPOCH=1704067200 \
        /build/bin/pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir dist . \
    && /build/bin/pip --python /opt/mm/bin/python install --no-cache-dir --no-compile --no-deps \
        dist/*.whl \
    && find /opt/mm -name '*.so' -exec strip --strip-unneeded '{}' + \
    && find /opt/mm -name tests -type d -prune -exec rm -r '{}' + \
    && /opt/mm/bin/python -m compileall -q --invalidation-mode unchecked-hash /opt/mm/lib

# --- the image ------------------------------------------------------------------------------------
FROM ${BASE}
LABEL org.opencontainers.image.title="mm" \
      org.opencontainers.image.description="A distributed LRU cache for serving ML models" \
      org.opencontainers.image.licenses="Apache-2.0"
# The link is where older deployments of the Java mesh look for stop.sh.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates libnghttp2-14 libssl3 python3 \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/cache/debconf/*-old /var/log/* \
    && mkdir -p /opt/kserve/mmesh \
    && ln -s mmesh /opt/kserve/tas
COPY --from=build /opt/mm /opt/mm
COPY config/image/stop.sh /opt/kserve/mmesh/stop.sh
COPY config/image/health.py /opt/kserve/mmesh/health.py
ENV PATH=/opt/mm/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
WORKDIR /opt/kserve/mmesh
# Clients, peers, probes, the pre-stop hook of the runtime's containers, Prometheus.
EXPOSE 8033 8080 8089 8090 2112
# As in the Java image. Any other user will do too: nothing here is owned or written by it.
USER 2000:0
# For Docker and Podman; Kubernetes has probes of its own.
HEALTHCHECK --interval=30s --timeout=5s --start-period=90s --retries=2 \
    CMD ["/opt/mm/bin/python", "-IS", "/opt/kserve/mmesh/health.py"]
ENTRYPOINT ["/opt/mm/bin/mm", "serve"]
