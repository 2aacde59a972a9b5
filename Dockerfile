# The project for CUDA devices.
#
#   docker build -t mindspeed-lora:cuda .
#   docker run --gpus all --read-only --tmpfs /scratch:exec,mode=1777 -v "$PWD/data:/data" mindspeed-lora:cuda posttrain_gpt.py --help
#
# exec: Triton loads from /scratch what it has compiled, which Docker's own default forbids.
# Not root; nothing is written outside of /scratch (HOME, caches, temporary files) and the folders that flags name.
# Data come without worker processes, so that 64 MB of /dev/shm are enough: it is NCCL's alone, which takes about 10 MB for
# each pair of ranks of a node that reach each other by no faster way; where that is too much, NCCL_SHM_DISABLE=1.
# torch's wheels bring CUDA's libraries; the host brings its driver, through NVIDIA's container toolkit.
FROM python:3.12-slim AS build
ARG CUDA=cu128
WORKDIR /app
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /venv
COPY pyproject.toml README.md LICENSE ./
COPY mindspeed_lora ./mindspeed_lora
RUN /venv/bin/pip install "torch>=2.11,<2.14" --index-url https://download.pytorch.org/whl/${CUDA} \
    && /venv/bin/pip install . \
    && /venv/bin/python -m compileall -q /venv/lib

FROM python:3.12-slim
# Triton compiles its launchers with a C compiler.
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 1000 trainer && useradd --uid 1000 --gid 1000 --no-create-home --home-dir /scratch trainer \
    && install -d -o 1000 -g 1000 -m 1777 /scratch /data
COPY --from=build /venv /venv
COPY *.py /app/
COPY examples /app/examples
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PATH=/venv/bin:$PATH HOME=/scratch TMPDIR=/scratch HF_HOME=/scratch/huggingface XDG_CACHE_HOME=/scratch/cache \
    MPLCONFIGDIR=/scratch/matplotlib TORCHINDUCTOR_CACHE_DIR=/scratch/inductor TRITON_CACHE_DIR=/scratch/triton \
    PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
WORKDIR /app
USER 1000:1000
ENTRYPOINT ["python"]
