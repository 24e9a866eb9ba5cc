# The demo in a container:  docker build -t class-tokens . && docker run --rm -v "$PWD/img:/app/img" class-tokens
FROM python:3.12-slim
RUN apt-get update && apt-get install --yes --no-install-recommends make && rm -rf /var/lib/apt/lists/*
WORKDIR /app
COPY Makefile requirements.txt ./
RUN make .venv/ready
COPY . .
CMD ["make", "demo"]
