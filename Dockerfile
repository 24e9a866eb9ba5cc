# The demo in a container, on the CPU:
#   docker build --tag class-tokens .
#   docker run --rm --volume "$PWD/img:/app/img" class-tokens
FROM python:3.12-slim
WORKDIR /app
COPY requirements.txt ./
# PyTorch's CPU build first: the default one brings 4 GB of CUDA
# hadolint ignore=DL3013
RUN pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu torch torchvision \
    && pip install --no-cache-dir --requirement requirements.txt
COPY . .
ENTRYPOINT ["python", "run.py"]
CMD ["--config", "configs/miniature.yml", "--class_index", "7,13,16", "--train", "True", "--evaluate", "True"]
