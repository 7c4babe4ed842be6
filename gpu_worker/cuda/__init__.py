"""The worker on an NVIDIA card: device state, kernels, CUDA graphs. Imports torch and triton; nothing else of the package does."""
