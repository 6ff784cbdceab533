# A BIDS App: docker build -t deformmamba . ; docker run --rm -v DATA:/data:ro -v OUT:/out deformmamba /data /out participant
FROM python:3.12-slim

# PyTorch for the CPU from PyTorch's own index: about 200 MB. For a GPU leave --index-url out, and run with --gpus all.
ARG TORCH="torch torchvision --index-url https://download.pytorch.org/whl/cpu"
RUN pip install --no-cache-dir ${TORCH}

COPY . /src
RUN pip install --no-cache-dir /src && rm -rf /src

# compiled kernels go where any user may write; made now, so that a processor of this kind need not compile them again
ENV NUMBA_CACHE_DIR=/opt/numba MPLCONFIGDIR=/tmp
RUN deformmamba demo -o /tmp/demo && rm -rf /tmp/demo && chmod -R a+rwX /opt/numba

ENTRYPOINT ["deformmamba", "bids"]
CMD ["--help"]
