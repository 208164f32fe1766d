# Tests on a GPU:     docker run --rm --gpus all tribn
# Tests without one:  docker run --rm tribn
ARG BASE_IMAGE=ubuntu:24.04
FROM ${BASE_IMAGE}

# Triton compiles its launcher with gcc against Python's headers when a kernel first runs on a GPU,
# torch.compile with g++ what runs on a CPU. Results name their git revision.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        ca-certificates g++ git make python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home tribn \
    && install -d -o tribn -g tribn /tribn

USER tribn
WORKDIR /tribn
ENV PIP_NO_CACHE_DIR=1

# Stubs stand in for the package, so that the dependencies stay cached until pyproject.toml changes.
COPY --chown=tribn:tribn pyproject.toml ./
RUN mkdir tribn && touch README.md LICENSE && echo '__version__ = "0"' > tribn/__init__.py \
    && python3 -m venv .venv && .venv/bin/pip install -e '.[dev]'

COPY --chown=tribn:tribn . .
RUN make setup

CMD ["make", "test"]
