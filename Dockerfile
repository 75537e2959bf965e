# The server with the CPU kernels. Build from the repository's root:
#   docker build -t manyhats .
# It runs as user 10001, who must be able to read what is mounted: chown -R 10001 secrets, or --user with one who can.
# It listens on all of the container's addresses, so it starts only with a certificate and tokens, or with --insecure:
#   docker run --rm --read-only --tmpfs /tmp -p 50051:50051 -p 8000:8000 -v manyhats:/var/lib/manyhats \
#     -v ./secrets:/secrets:ro manyhats \
#     --tls-cert /secrets/server.pem --tls-key /secrets/server.key --token-file /secrets/tokens.yaml
#   docker run --rm --read-only --tmpfs /tmp -p 127.0.0.1:50051:50051 -p 127.0.0.1:8000:8000 \
#     -v manyhats:/var/lib/manyhats manyhats --insecure
# With --insecure, anyone who can reach the published ports or the container's network may do everything: 127.0.0.1 in
# -p limits that to this machine.
# Only /var/lib/manyhats and /tmp are written. Would it work, and be fast?
#   docker run --rm -v manyhats:/var/lib/manyhats --entrypoint manyhats manyhats doctor --insecure
#
# Arguments of a build:
#   TORCH_ARGS  for pip, while it installs torch: by default an index of CPU builds. Empty for those with CUDA, which are
#               ten times as large, and which this version's server does not use.
#   PIP_ARGS    for pip, always, such as --extra-index-url with an index of your own.

FROM python:3.11-slim-bookworm AS build
ARG TORCH_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
ARG PIP_ARGS=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
RUN python -m venv /opt/manyhats
COPY constraints.txt ./
# torch first, on its own: this layer then survives changes to the code.
RUN /opt/manyhats/bin/pip install ${PIP_ARGS} ${TORCH_ARGS} -c constraints.txt torch
COPY pyproject.toml README.md LICENSE ./
COPY proto proto
COPY adapters_store adapters_store
COPY server server
COPY trainer trainer
COPY clients clients
RUN /opt/manyhats/bin/pip install ${PIP_ARGS} -c constraints.txt '.[server,postgres,s3,otel]'

FROM python:3.11-slim-bookworm
# Numba's threads need the OpenMP runtime.
RUN apt-get update \
    && apt-get install --no-install-recommends --yes libgomp1 \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 manyhats \
    && useradd --uid 10001 --gid 10001 --home-dir /var/lib/manyhats --create-home manyhats \
    && mkdir -p /var/lib/manyhats/adapters \
    && chown -R manyhats:manyhats /var/lib/manyhats
COPY --from=build /opt/manyhats /opt/manyhats
COPY deploy/image/healthcheck.py /opt/manyhats/healthcheck.py
# The server's settings are variables, so that flags, and variables of a run, replace them.
ENV PATH=/opt/manyhats/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    MANYHATS_HOME=/var/lib/manyhats/cache \
    HF_HOME=/var/lib/manyhats/huggingface \
    MANYHATS_HOST=0.0.0.0 \
    MANYHATS_LOG_FORMAT=json \
    MANYHATS_STORE=/var/lib/manyhats/store \
    MANYHATS_ADAPTER_ROOTS=/var/lib/manyhats/adapters
# By number, so that Kubernetes can tell that it is not root.
USER 10001:10001
WORKDIR /var/lib/manyhats
# Models, compiled kernels, the adapter store, and the folder to register adapters from.
VOLUME /var/lib/manyhats
EXPOSE 50051 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=600s CMD ["python", "/opt/manyhats/healthcheck.py"]
ENTRYPOINT ["manyhats", "serve"]
