# The service alone: no embedded servers, no development packages. `docker build -t tallystick .`
FROM python:3.12-slim AS build

ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /build

# The packages first: they change less often than the code, so this layer is kept.
COPY requirements/runtime.txt requirements/build.txt requirements/
RUN python -m venv /opt/tallystick \
    && /opt/tallystick/bin/pip install --require-hashes --only-binary :all: -r requirements/runtime.txt \
    && python -m venv /opt/build \
    && /opt/build/bin/pip install --require-hashes --only-binary :all: -r requirements/build.txt

COPY pyproject.toml README.md LICENSE ./
COPY src src
COPY migrations migrations
RUN /opt/build/bin/hatchling build -t wheel -d dist \
    && /opt/tallystick/bin/pip install --no-deps --no-index dist/*.whl


FROM python:3.12-slim

ENV PATH=/opt/tallystick/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    TALLYSTICK_HOST=0.0.0.0 \
    TALLYSTICK_PORT=8080

RUN useradd --system --no-create-home --uid 10001 tallystick
COPY --from=build /opt/tallystick /opt/tallystick

USER 10001
EXPOSE 8080
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=10s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen(f\"http://127.0.0.1:{os.environ['TALLYSTICK_PORT']}/healthz\", timeout=2)"]
CMD ["tallystick", "serve"]
