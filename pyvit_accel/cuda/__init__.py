"""The CUDA C++ kernels: one shared library with a plain C interface, csrc/cuda, found and loaded here.

It is built without torch and without a GPU (setup.py build_cuda), and loading it touches none.
"""

from .library import device_error, library, status

__all__ = ["device_error", "library", "status"]
