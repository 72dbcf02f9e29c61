# A server on CPUs. From the root of a checkout:
#
#   docker build -f deploy/serving/cpu.Dockerfile -t REGION-docker.pkg.dev/PROJECT/llama-jax/serve-cpu:latest .
#
# The image holds no model: mount a registry at /models, or name a MODEL in the arguments.
FROM python:3.12-slim
COPY pyproject.toml README.md LICENSE /src/
COPY llama_jax /src/llama_jax
COPY train /src/train
COPY infer /src/infer
COPY configs /src/configs
RUN pip install --no-cache-dir '/src[serve]' && rm -r /src \
    && useradd --uid 10001 --create-home llama && install -d -o llama /cache
USER 10001
# Compiled programs, for a faster second start: mount a volume here to keep them.
ENV LLAMA_JAX_CACHE_DIR=/cache JAX_PLATFORMS=cpu
EXPOSE 8000 8001
ENTRYPOINT ["llama-jax", "serve", "--host", "0.0.0.0"]
CMD ["--models-dir", "/models", "--port", "8000", "--grpc-port", "8001"]
