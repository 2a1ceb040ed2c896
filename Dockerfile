# One image for the coordinator and for clients: docker build -t fedex-lora .
FROM python:3.11-slim AS build
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY src src
COPY recipes recipes
RUN pip wheel --no-cache-dir --no-deps -w /wheels .

FROM python:3.11-slim
COPY constraints.txt /tmp/constraints.txt
COPY --from=build /wheels /wheels
# hadolint ignore=DL3013
RUN pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu \
      -c /tmp/constraints.txt torch \
 && wheel=$(ls /wheels/*.whl) \
 && pip install --no-cache-dir -c /tmp/constraints.txt "${wheel}[train,report,demo,flower]" \
 && useradd --create-home --uid 1000 user
USER 1000
WORKDIR /home/user
CMD ["fedex-lora", "--help"]
