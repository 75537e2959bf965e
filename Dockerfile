# The server with the CPU kernels. Build from the repository's root:
#   docker build -t manyhats .
# It listens on all of the container's addresses, so it starts only with a certificate and tokens, or with --insecure:
#   docker run --rm -p 50051:50051 -p 8000:8000 -v manyhats:/var/lib/manyhats -v ./secrets:/secrets:ro manyhats \
#     --tls-cert /secrets/server.pem --tls-key /secrets/server.key --token-file /secrets/tokens.yaml
#   docker run --rm -p 127.0.0.1:50051:50051 -p 127.0.0.1:8000:8000 -v manyhats:/var/lib/manyhats manyhats --insecure
# With --insecure, anyone who can reach the published ports or the container's network may do everything: 127.0.0.1 in
# -p limits that to this machine.
# PIP_ARGS passes further arguments to pip, such as --extra-index-url with an index of CPU builds of torch.

FROM python:3.11-slim-bookworm AS build
ARG PIP_ARGS=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
RUN python -m venv /opt/manyhats
COPY constraints.txt ./
# torch first, on its own: this layer then survives changes to the code.
RUN /opt/manyhats/bin/pip install ${PIP_ARGS} -c constraints.txt torch
COPY pyproject.toml README.md LICENSE ./
COPY proto proto
COPY adapters_store adapters_store
COPY server server
COPY trainer trainer
COPY clients clients
RUN /opt/manyhats/bin/pip install ${PIP_ARGS} -c constraints.txt '.[server,postgres,s3]'

FROM python:3.11-slim-bookworm
# Numba's threads need the OpenMP runtime.
RUN apt-get update \
    && apt-get install --no-install-recommends --yes libgomp1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --system --uid 10001 --home-dir /var/lib/manyhats --create-home manyhats \
    && mkdir -p /var/lib/manyhats/adapters \
    && chown -R manyhats:manyhats /var/lib/manyhats
COPY --from=build /opt/manyhats /opt/manyhats
ENV PATH=/opt/manyhats/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    MANYHATS_HOME=/var/lib/manyhats/cache \
    HF_HOME=/var/lib/manyhats/huggingface
USER manyhats
WORKDIR /var/lib/manyhats
# Models, compiled kernels, the adapter store, and the folder to register adapters from.
VOLUME /var/lib/manyhats
EXPOSE 50051 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=180s \
    CMD python -c "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/readyz', timeout=1)" 2>/dev/null \
    || python -c "import ssl, urllib.request as r; r.urlopen('https://127.0.0.1:8000/readyz', timeout=1, \
context=ssl._create_unverified_context())"
ENTRYPOINT ["manyhats", "serve", "--host", "0.0.0.0", "--log-format", "json", \
    "--store", "/var/lib/manyhats/store", "--adapter-root", "/var/lib/manyhats/adapters"]
CMD ["--model", "smollm2-135m-instruct"]
