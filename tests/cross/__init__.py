"""What is built for GPUs that are not there: `make test-cross`, with a CUDA build of torch."""
