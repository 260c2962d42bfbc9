# guardsmith in a container. Needs BuildKit (Docker 23 or later).
#   docker build --tag guardsmith .                                  for CPUs
#   docker build --tag guardsmith:cuda --build-arg DEVICE=cuda .     for NVIDIA GPUs (run with --gpus all)
#   docker run --rm --user "$(id -u):$(id -g)" --volume "$PWD:/data" guardsmith      runs the demo; its files are in ./out/demo
# Mount a folder that exists and belongs to you: one that Docker has to make is root's, and guardsmith cannot write into it.
# The base by its digest makes builds repeatable: --build-arg BASE=python@sha256:...
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE}
LABEL org.opencontainers.image.title="guardsmith" \
      org.opencontainers.image.description="Harden Stable Diffusion checkpoints against personalization on protected subjects" \
      org.opencontainers.image.licenses="Apache-2.0"

# Like /tmp, these folders are everybody's, for `--user` takes any number; a volume made for one of them inherits that.
RUN useradd --create-home --uid 1000 guardsmith && install -d -m 1777 /data /data/out /cache

# cpu: torch without CUDA libraries, the only package from PyTorch's own index. cuda: torch's usual wheel, which brings them along.
# Dependencies first, so that a change of the code does not install them again.
ARG DEVICE=cpu
RUN --mount=type=bind,source=constraints.txt,target=/source/constraints.txt \
    --mount=type=cache,target=/root/.cache/pip \
    case "$DEVICE" in \
      cpu) index=https://download.pytorch.org/whl/cpu ;; \
      cuda) index=https://pypi.org/simple ;; \
      *) echo "DEVICE is $DEVICE, but must be cpu or cuda" >&2; exit 1 ;; \
    esac \
 && export PIP_ROOT_USER_ACTION=ignore PIP_DISABLE_PIP_VERSION_CHECK=1 \
 && python -m pip install --no-deps --constraint /source/constraints.txt --index-url "$index" torch
RUN --mount=type=bind,source=constraints.txt,target=/source/constraints.txt \
    --mount=type=bind,source=pyproject.toml,target=/source/pyproject.toml \
    --mount=type=cache,target=/root/.cache/pip \
    export PIP_ROOT_USER_ACTION=ignore PIP_DISABLE_PIP_VERSION_CHECK=1 \
 && python -c 'import tomllib; print(*tomllib.load(open("/source/pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' \
      >/tmp/dependencies \
 && python -m pip install --constraint /source/constraints.txt --requirement /tmp/dependencies \
 && rm /tmp/dependencies

# The code is mounted and not copied: the image holds it once, as the installed package.
RUN --mount=type=bind,target=/source \
    --mount=type=cache,target=/root/.cache/pip \
    export PIP_ROOT_USER_ACTION=ignore PIP_DISABLE_PIP_VERSION_CHECK=1 \
 && export PIP_CONSTRAINT=/source/constraints.txt PIP_BUILD_CONSTRAINT=/source/constraints.txt \
 && python -m pip install --no-deps /source \
 && python -m pip check

# What is downloaded and cached goes to /cache: a user that --user names by a number has no home.
ENV XDG_CACHE_HOME=/cache PYTHONUNBUFFERED=1
USER 1000
WORKDIR /data
ENTRYPOINT ["guardsmith"]
CMD ["run", "demo", "--output", "out/demo"]
