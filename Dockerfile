# The steps are the Makefile's.
#   docker build -t rdlm .                              (CPU image)
#   docker build --build-arg DEVICE=cuda -t rdlm .      (GPU image)
#   docker run -p 8000:8000 -v "$PWD/runs/demo/model:/checkpoint:ro" rdlm      (GPU image: add --gpus all)
FROM python:3.11-slim-bookworm

# make and gcc: the installation itself and DeepSpeed's operators, which are compiled at first use.
# curl: the health check.
RUN apt-get update && apt-get install -y --no-install-recommends make gcc g++ curl && rm -rf /var/lib/apt/lists/*

WORKDIR /app
ARG DEVICE=cpu
ENV PYTHONPATH=/app PATH=/app/.venv/bin:$PATH PYTHONUNBUFFERED=1

# The dependencies first: they change less often than the code, and this layer is large.
COPY Makefile pyproject.toml requirements.txt README.md LICENSE ./
COPY rdlm rdlm
COPY train train
COPY serve serve
COPY eval eval
RUN make install DEVICE=${DEVICE}
COPY configs configs

RUN useradd --create-home --uid 1000 rdlm
USER rdlm
WORKDIR /home/rdlm
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
  CMD curl --fail --silent http://127.0.0.1:8000/health || exit 1
CMD ["rdlm", "serve", "--checkpoint", "/checkpoint", "--host", "0.0.0.0", "--port", "8000"]
