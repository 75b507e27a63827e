# syntax=docker/dockerfile:1
# Two images over one recipe:
#
#   docker build --target cpu  -t promptstitch:cpu .
#   docker build --target cuda -t promptstitch:cuda .
#
# They differ in the build of PyTorch alone; its CUDA build brings CUDA with it and needs only the host's driver.
# `--build-arg MODEL=smollm2-135m --build-arg LEVEL=w3g64` bakes a model in, and says at which level it is served; without,
# the first start pulls the embedded one into /data and serves it at that level.
# Runs as any UID, with a read-only root and no capabilities: everything that is written lies under /data.

ARG PYTHON=3.12-slim-bookworm
ARG BUILDER=3.12-bookworm

FROM python:${PYTHON} AS locked
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PATH=/opt/promptstitch/bin:$PATH
WORKDIR /src
RUN python -m venv /opt/promptstitch
COPY requirements.lock .
RUN pip install --no-deps --require-hashes --only-binary :all: -r requirements.lock

# What torch needs besides is locked above. An empty index is pip's own, which has the CUDA build.
FROM locked AS torch-cpu
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
RUN PIP_INDEX_URL="$TORCH_INDEX_URL" pip install torch==2.13.0

FROM locked AS torch-cuda
ARG TORCH_INDEX_URL=
RUN PIP_INDEX_URL="$TORCH_INDEX_URL" pip install torch==2.13.0

# The larger image has the C compiler that builds the CPU kernels.
FROM python:${BUILDER} AS wheel
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PATH=/opt/promptstitch/bin:$PATH
WORKDIR /src
COPY --from=locked /opt/promptstitch /opt/promptstitch
COPY pyproject.toml README.md LICENSE ./
COPY server server
COPY engine engine
COPY llama llama
COPY prompts_store prompts_store
COPY lab lab
COPY cli cli
COPY bench bench
RUN pip wheel --no-deps --no-build-isolation --wheel-dir /wheels .

FROM python:${PYTHON} AS runtime
ENV PATH=/opt/promptstitch/bin:$PATH \
    PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_DISABLE_PIP_VERSION_CHECK=1 \
    HOME=/data TMPDIR=/data XDG_DATA_HOME=/data XDG_CACHE_HOME=/data/cache \
    USER=promptstitch LOGNAME=promptstitch \
    PROMPTSTITCH_STORE=/data/store PROMPTSTITCH_HOST=0.0.0.0
# A platform that picks a UID of its own puts it into group 0.
RUN mkdir /data && chmod 2775 /data
WORKDIR /data
VOLUME /data
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=15m --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as http; http.urlopen('http://127.0.0.1:' + os.environ.get('PROMPTSTITCH_PORT', '8000') + '/readyz', timeout=4)"]
ENTRYPOINT ["promptstitch"]
CMD ["serve"]

FROM runtime AS cuda
# Triton builds its driver's module when it starts.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
COPY --from=torch-cuda /opt/promptstitch /opt/promptstitch
RUN --mount=from=wheel,source=/wheels,target=/wheels pip install --no-cache-dir --no-deps /wheels/*.whl
ARG MODEL=
RUN if [ -n "$MODEL" ]; then HOME=/tmp TMPDIR=/tmp promptstitch pull "$MODEL" --to "/models/$MODEL" && chmod -R a+rX /models; fi
ARG LEVEL=
ENV PROMPTSTITCH_MODEL=${MODEL:+/models/$MODEL} PROMPTSTITCH_LEVEL=$LEVEL NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:0

FROM runtime AS cpu
COPY --from=torch-cpu /opt/promptstitch /opt/promptstitch
RUN --mount=from=wheel,source=/wheels,target=/wheels pip install --no-cache-dir --no-deps /wheels/*.whl
ARG MODEL=
RUN if [ -n "$MODEL" ]; then HOME=/tmp TMPDIR=/tmp promptstitch pull "$MODEL" --to "/models/$MODEL" && chmod -R a+rX /models; fi
ARG LEVEL=
ENV PROMPTSTITCH_MODEL=${MODEL:+/models/$MODEL} PROMPTSTITCH_LEVEL=$LEVEL
USER 10001:0
