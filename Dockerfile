# cogtune on NVIDIA GPUs; docs/installation.md says how to build and run it.
# The CUDA toolkit is that of PyTorch's wheels: DeepSpeed compiles its CPU optimizer with it.
ARG CUDA=13.0.1
FROM nvidia/cuda:${CUDA}-devel-ubuntu24.04

# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ ninja-build python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/cogtune \
    && install --directory --owner=ubuntu --group=ubuntu /cache /work

ENV PATH=/opt/cogtune/bin:$PATH \
    COGTUNE_HOME=/cache/cogtune \
    HF_HOME=/cache/huggingface \
    TORCH_EXTENSIONS_DIR=/cache/torch_extensions

WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY .ci/constraints.txt .ci/
COPY cogtune cogtune

# torch goes in first and alone, so that its CUDA build is settled.
ARG PYTORCH_INDEX=https://download.pytorch.org/whl/cu130
RUN pip install --no-cache-dir --constraint .ci/constraints.txt --extra-index-url "$PYTORCH_INDEX" torch \
    && pip install --no-cache-dir --constraint .ci/constraints.txt '.[optimizers,parquet]'

USER ubuntu
WORKDIR /work
ENTRYPOINT ["cogtune"]
CMD ["--help"]
