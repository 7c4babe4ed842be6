"""Kernels, one family per file: CUDA C++ (`.cu`, compiled at run time through NVRTC) and Triton (`.py`)."""
