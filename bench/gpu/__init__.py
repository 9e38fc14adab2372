"""The GPU suite, one command: builds, correctness, sanitizers, pipe rates, microbenchmarks and whole models on a GPU.

    python -m bench.gpu [--only linear,probes] [--minutes 9] [--quick] [--output FOLDER]

Every part runs in a process of its own with a time limit, and every row is on disk as soon as it is known: what
crashes, hangs or breaks the GPU is a row that says so, and the next item or part runs.
"""
