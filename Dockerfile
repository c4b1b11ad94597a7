# One image for all roles: beat, worker, API, Flower, command line. The role is the command. See docs/deploying-compose.md.
FROM python:3.11-slim AS build

# what lies beside the platform itself: otel for traces
ARG EXTRAS=otel
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

RUN python -m venv --without-pip /opt/taskplatform
WORKDIR /src
# What the platform needs changes seldom, and is a layer of its own: it is installed with a package that is still empty. It is compiled
# here, because nothing can be written where it runs. Tests, and what is for compilers, are not needed there.
COPY pyproject.toml constraints.txt README.md ./
RUN mkdir taskplatform \
    && touch taskplatform/__init__.py \
    && python -m pip --python /opt/taskplatform/bin/python install --quiet --no-compile --constraint constraints.txt ".[$EXTRAS]" \
    && find /opt/taskplatform \( -type d \( -name tests -o -name test \) -o -type f \( -name '*.pyi' -o -name '*.pyx' -o -name '*.c' -o -name '*.h' \) \) -prune -exec rm -rf {} + \
    && /opt/taskplatform/bin/python -m compileall -q -j 0 /opt/taskplatform/lib
COPY taskplatform taskplatform
RUN python -m pip --python /opt/taskplatform/bin/python install --quiet --compile --no-deps --force-reinstall .


FROM python:3.11-slim

RUN python -m pip uninstall --quiet --yes --root-user-action=ignore pip setuptools wheel 2>/dev/null; \
    groupadd --gid 10001 taskplatform \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /app --shell /usr/sbin/nologin taskplatform \
    && mkdir -m 700 /pki /tls \
    && mkdir -m 755 /acl /app \
    && chown taskplatform:taskplatform /pki /tls /acl

COPY --from=build /opt/taskplatform /opt/taskplatform
WORKDIR /app
COPY celeryconfig.py beat_schedule.py ./
COPY tasks tasks

ENV PATH=/opt/taskplatform/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    TASKPLATFORM_OPS_HOST=0.0.0.0 \
    TASKPLATFORM_OPS_PORT=8090
USER 10001:10001
EXPOSE 8090

# /ready of the process that runs here: a beat ticks, a worker heartbeats, releases and takes messages.
HEALTHCHECK --interval=5s --timeout=10s --start-period=60s --retries=5 CMD ["python", "-m", "taskplatform.probe"]
CMD ["celery", "--quiet", "-A", "taskplatform.app", "worker"]
