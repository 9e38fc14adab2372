"""The shapes of the benchmarks. Run with `make bench`; one row is one implementation of one op at one shape."""

import pytest
import torch

WIDTHS = {"Ti": 192, "S": 384, "B": 768}
TOKENS = 197


def pytest_generate_tests(metafunc):
    if "width" in metafunc.fixturenames:
        metafunc.parametrize("width", WIDTHS.values(), ids=WIDTHS)
    if "batch" in metafunc.fixturenames:
        metafunc.parametrize("batch", (1, 8), ids=lambda b: f"batch{b}")


@pytest.fixture(autouse=True)
def inference():
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


@pytest.fixture
def measure(benchmark):
    """measure(fn, macs): time fn; GMAC/s, where macs are given, goes beside the times."""

    def run(fn, macs=0):
        benchmark.pedantic(fn, rounds=30, warmup_rounds=5)
        if macs:
            benchmark.extra_info["GMAC/s"] = round(macs / benchmark.stats.stats.median / 1e9, 1)

    return run
