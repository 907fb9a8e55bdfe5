# The page, or enginerun.py, with TensorRT on an NVIDIA GPU:
#
#   docker build -t lseg .
#   docker run --gpus all -p 127.0.0.1:7860:7860 -v lseg:/data lseg
#   docker run --gpus all -v lseg:/data -v "$PWD/photos":/photos lseg enginerun.py /photos --output /photos
#
# Engines belong to the GPU they run on: the first start builds them into /data, and later ones find them there.
FROM nvcr.io/nvidia/pytorch:24.06-py3

WORKDIR /lseg
# Packages first: a change of the code leaves them as they are.
COPY requirements.sh requirements.txt requirements-dev.txt ./
RUN ./requirements.sh
COPY . .

ENV PYTHONUNBUFFERED=1
VOLUME /data
EXPOSE 7860
ENTRYPOINT ["docker/start.sh"]
CMD ["app.py", "--host", "0.0.0.0"]
