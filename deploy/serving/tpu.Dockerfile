# A server on the TPU chips of one host. From the root of a checkout:
#
#   docker build -f deploy/serving/tpu.Dockerfile -t REGION-docker.pkg.dev/PROJECT/llama-jax/serve-tpu:latest .
#
# The image holds no model: mount a registry at /models, or name a MODEL in the arguments.
FROM python:3.12-slim
COPY pyproject.toml README.md LICENSE /src/
COPY llama_jax /src/llama_jax
COPY train /src/train
COPY infer /src/infer
COPY configs /src/configs
RUN pip install --no-cache-dir '/src[tpu,serve]' && rm -r /src && install -d /cache
# Compiled programs, for a faster second start: mount a volume here to keep them.
ENV LLAMA_JAX_CACHE_DIR=/cache
EXPOSE 8000 8001
ENTRYPOINT ["llama-jax", "serve", "--host", "0.0.0.0"]
CMD ["--models-dir", "/models", "--port", "8000", "--grpc-port", "8001"]
