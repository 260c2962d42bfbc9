# guardsmith in a container.
#   docker build --tag guardsmith .                                  for CPUs
#   docker build --tag guardsmith:cuda --build-arg DEVICE=cuda .     for NVIDIA GPUs (run with --gpus all)
#   docker run --rm --volume "$PWD/out:/data/out" guardsmith         runs the demo; its files are in ./out
ARG PYTHON=3.11
FROM python:${PYTHON}-slim-bookworm

# cpu: torch without CUDA libraries. cuda: torch's usual wheel, which brings its CUDA libraries along.
ARG DEVICE=cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
WORKDIR /source
# Dependencies first, so that a change of the code does not install torch again.
COPY constraints.txt ./
RUN case "$DEVICE" in \
      cpu) index=https://download.pytorch.org/whl/cpu ;; \
      cuda) index=https://pypi.org/simple ;; \
      *) echo "DEVICE is $DEVICE, but must be cpu or cuda" >&2; exit 1 ;; \
    esac \
 && python -m pip install --constraint constraints.txt --index-url "$index" --extra-index-url https://pypi.org/simple torch
COPY pyproject.toml README.md LICENSE ./
COPY guardsmith ./guardsmith
COPY recipes ./recipes
COPY registries ./registries
RUN python -m pip install --constraint constraints.txt .

# Not root, and a folder of its own for what it writes.
RUN useradd --create-home --uid 1000 guardsmith && install -d -o guardsmith -g guardsmith /data /data/out
USER 1000
WORKDIR /data
ENTRYPOINT ["guardsmith"]
CMD ["run", "demo", "--output", "out/demo"]
