# syntax=docker/dockerfile:1
#
#   docker build -t cosy .                   for the CPU
#   docker build -t cosy-gpu --target gpu .  for NVIDIA GPUs
#
# docs/deploy.md has the commands that run them.
ARG PYTHON_IMAGE=python:3.11-slim-trixie


# What an image has besides Python packages and code; its settings are those of both targets.
FROM ${PYTHON_IMAGE} AS runtime
RUN useradd --uid 1000 --create-home user \
    && install --directory --owner=1000 --group=1000 /voices /cache
ENV PATH=/opt/venv/bin:$PATH \
    HOME=/home/user \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    GRADIO_ANALYTICS_ENABLED=False \
    HF_HUB_DISABLE_TELEMETRY=1 \
    ORT_DISABLE_TELEMETRY=1 \
    GRADIO_SERVER_NAME=0.0.0.0 \
    GRADIO_SERVER_PORT=7860 \
    COSY_VOICES_DIR=/voices \
    XDG_CACHE_HOME=/cache \
    HF_HOME=/cache/huggingface \
    MODELSCOPE_CACHE=/cache/modelscope
WORKDIR /app
EXPOSE 7860
HEALTHCHECK --interval=30s --timeout=5s --start-period=15m \
    CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen('http://127.0.0.1:' + os.environ['GRADIO_SERVER_PORT'] + '/healthz', timeout=4)"]
USER 1000
CMD ["python", "webui.py"]


FROM ${PYTHON_IMAGE} AS packages-cpu
COPY requirements.txt ./
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m venv /opt/venv \
    && /opt/venv/bin/pip install --index-url https://download.pytorch.org/whl/cpu "$(grep '^torch==' requirements.txt)" \
    && /opt/venv/bin/pip install -r requirements.txt


# torch from PyPI brings CUDA with it. vLLM is built for a certain torch; TensorRT fetches its libraries from NVIDIA.
FROM ${PYTHON_IMAGE} AS packages-gpu
COPY requirements.txt requirements-gpu.txt ./
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m venv /opt/venv \
    && /opt/venv/bin/pip install -r requirements.txt \
    && /opt/venv/bin/pip install torch==2.11.0 \
    && /opt/venv/bin/pip install --no-deps -r requirements-gpu.txt \
    && /opt/venv/bin/pip install "tensorrt>=10.10,<12"


FROM scratch AS code
COPY . /


# Kernels are compiled when they are first used, hence the compiler.
FROM runtime AS gpu
USER root
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
USER 1000
COPY --link --from=packages-gpu /opt/venv /opt/venv
COPY --link --from=code / /app


# Last, so that it is what `docker build` and a Docker Space make.
FROM runtime AS cpu
COPY --link --from=packages-cpu /opt/venv /opt/venv
COPY --link --from=code / /app
