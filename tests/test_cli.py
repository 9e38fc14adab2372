"""The command line: what it writes and prints, its exit codes, and what it says when something is wrong."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("PIL")
from PIL import Image
from torch import nn

from pyvit_accel import TokenSchedule, cli, commands, cuda, demo, measure
from pyvit_accel.cli import main
from pyvit_accel.models import create_vit, digits_data, save_weights
from pyvit_accel.output import Bar, table, write_chart, write_whole
from pyvit_accel.serialize import load

TINY = {"image_size": 32, "patch_size": 8, "num_classes": 5, "dim": 64, "depth": 2, "num_heads": 1}
COUNT = 40


@pytest.fixture(autouse=True)
def one_thread():
    """Threads that wait for each other are slow where tests share the cores with other work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A folder of digit images as PNG files, with labels.json beside it."""
    root = tmp_path_factory.mktemp("digits")
    (root / "images").mkdir()
    images, labels = (x[:COUNT] for x in digits_data("test"))
    for i, image in enumerate(images):
        Image.fromarray(image[0].numpy()).save(root / "images" / f"{i:02}.png")
    (root / "labels.json").write_text(json.dumps({f"{i:02}.png": int(label) for i, label in enumerate(labels)}))
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_weights(create_vit("vit_tiny_patch16_224", **TINY), path)
    return path


def run(*args) -> int:
    return main([str(arg) for arg in args])


def is_png(path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_accelerate_digits(digits, tmp_path, capsys):
    output, chart, result = tmp_path / "out.safetensors", tmp_path / "out.png", tmp_path / "out.json"
    (digits / "images" / "notes.txt").write_text("not pixels")
    args = ("--images", digits / "images", "--labels", digits / "labels.json", "--calibration-images", 8, "--rounds", 2)
    code = run("accelerate", "--arch", "digits", *args, "--output", output, "--chart", chart, "--json", result)
    (digits / "images" / "notes.txt").unlink()
    out, err = capsys.readouterr()
    assert code == 0, err
    assert "skipped notes.txt: not an image" in err and "1 files of" in err
    assert "QuantBlock" in out and "same prediction" in out and "speed-up" in out
    found = json.loads(result.read_text())
    assert found["fidelity"]["fp32"]["images"] == COUNT - 8  # those that calibrated are held out
    assert found["fidelity"]["W8A8"]["top1"] > 0.9 and found["fidelity"]["W8A8"]["agreement"] > 0.9
    assert [(row["batch"], row["variant"]) for row in found["latency"]] == [
        (1, "fp32"), (1, "W8A8"), (8, "fp32"), (8, "W8A8"),
    ]
    assert is_png(chart)
    images, labels = digits_data("test")
    with torch.inference_mode():
        assert (load(output)(images).argmax(1) == labels).double().mean() > 0.95
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "out.png", "out.safetensors"]


def test_accelerate_without_images(weights, tmp_path, capsys):
    """The architecture and its sizes come from the weights file."""
    args = ("accelerate", "--weights", weights, "--recipe", "W8A8_DYNAMIC+W8A16", "--batch", 1, "--rounds", 1)
    assert run(*args, "--output", tmp_path / "out.safetensors") == 0
    out, _ = capsys.readouterr()
    assert "W8A8_DYNAMIC + W8A16: " in out and "top-1" not in out
    assert load(tmp_path / "out.safetensors").config.num_classes == 5


def test_accelerate_infers_the_architecture(tmp_path, capsys):
    """A state dict alone says nothing of heads and pixels: what is assumed is told."""
    torch.save(create_vit("vit_tiny_patch16_224", **TINY).state_dict(), tmp_path / "w.pth")
    args = ("accelerate", "--weights", tmp_path / "w.pth", "--recipe", "W8A16", "--batch", 1, "--rounds", 1)
    assert run(*args, "--override", "mean=[0.1,0.2,0.3]", "--output", tmp_path / "o.safetensors") == 0
    assert "1 heads, pixel mean (0.1, 0.2, 0.3)" in capsys.readouterr().err
    assert load(tmp_path / "o.safetensors").config.mean == (0.1, 0.2, 0.3)


def test_accelerate_within_a_budget(digits, tmp_path, capsys):
    args = ("accelerate", "--arch", "digits", "--images", digits / "images", "--batch", 1, "--rounds", 1)
    assert run(*args, "--max-mib", 0.25, "--output", tmp_path / "o.safetensors", "--json", tmp_path / "o.json") == 0
    assert " of 0.25 MiB" in capsys.readouterr().out
    layers = json.loads((tmp_path / "o.json").read_text())["layers"]
    assert sum(layer["bytes"] for layer in layers if layer["name"].startswith("blocks")) <= 0.25 * 2**20
    message = failing(capsys, *args, "--max-mib", 0.001, "--output", tmp_path / "p.safetensors")
    assert "max_mib=0.001 is below 0.1" in message


def test_accelerate_without_data(weights, tmp_path, capsys):
    """Calibrated on images that the model itself gave."""
    args = ("accelerate", "--weights", weights, "--recipe", "W4A8", "--synthesize", "--calibration-images", 4)
    assert run(*args, "--batch", 2, "--rounds", 1, "--output", tmp_path / "o.safetensors") == 0
    assert "W4A8: " in capsys.readouterr().out


def test_accelerate_learns_and_goes_on(digits, tmp_path, capsys):
    args = ("accelerate", "--arch", "digits", "--images", digits / "images", "--batch", 1, "--rounds", 1, "--learn")
    args += ("--recipe", "W4A4", "--calibration-images", 8, "--checkpoint", tmp_path / "c")
    assert run(*args, "--output", tmp_path / "o.safetensors") == 0
    learned = (tmp_path / "c").read_bytes()
    assert run(*args, "--output", tmp_path / "p.safetensors") == 0
    assert (tmp_path / "c").read_bytes() == learned
    assert (tmp_path / "o.safetensors").read_bytes() == (tmp_path / "p.safetensors").read_bytes()
    assert "checkpoint" in failing(capsys, *args, "--calibration-images", 9, "--output", tmp_path / "q.safetensors")


def test_calibrates_on_all_images_when_there_are_few(digits, tmp_path, capsys):
    args = ("accelerate", "--arch", "digits", "--images", digits / "images", "--calibration-images", 99, "--batch", 1)
    assert run(*args, "--rounds", 1, "--output", tmp_path / "o.safetensors") == 0
    assert f"all {COUNT} images are needed for calibration" in capsys.readouterr().err


@pytest.mark.parametrize("text, method, arguments", [
    ("TOME(r=13)", "tome", {"r": 13}),
    (" evit( rate = 0.7, fuse=True , layers=(1, 2))", "evit", {"rate": 0.7, "fuse": True, "layers": [1, 2]}),
    ("DIFFRATE(model=deit-s, budget=2.9G)", "diffrate", {"model": "deit-s", "budget": "2.9G"}),
    ("diffrate(prune=[9, 7],merge=[8,5])", "diffrate", {"prune": [9, 7], "merge": [8, 5]}),
    ("zero_tprune", "zero_tprune", {}),
])  # fmt: skip
def test_schedules_are_read(text, method, arguments):
    assert cli._schedule(text) == TokenSchedule(method, arguments)


def test_accelerate_with_tokens_and_show_them(digits, tmp_path, capsys):
    """The schedule comes from a file, is saved with the model, and shown from there."""
    TokenSchedule("evit", {"rate": 0.5, "layers": [1, 2]}).save(tmp_path / "s.json")
    output, picture = tmp_path / "o.safetensors", tmp_path / "p.png"
    args = ("--recipe", "W8A8_DYNAMIC", "--tokens", tmp_path / "s.json", "--batch", 1, "--rounds", 1)
    assert run("accelerate", "--arch", "digits", *args, "--output", output) == 0
    out, _ = capsys.readouterr()
    assert "EVIT(rate=0.5, layers=[1, 2]): 65 to 65, 33, 17, 17" in out and "W8A8_DYNAMIC + EVIT" in out
    images = (digits / "images" / "00.png", digits / "images" / "01.png")
    assert run("show-tokens", "--model", output, "--images", *images, "--output", picture) == 0
    out, _ = capsys.readouterr()
    rows = [line.split() for line in out.splitlines() if line.startswith(("all", "block"))]
    assert rows == 2 * [["all", "65", "0", "0"], ["block", "1", "33", "32", "0"], ["block", "2", "17", "48", "0"]]
    assert is_png(picture)


def test_show_tokens_of_float_weights(digits, weights, tmp_path, capsys):
    image = digits / "images" / "00.png"
    args = ("--images", image, "--output", tmp_path / "p.png")
    assert run("show-tokens", "--model", weights, "--tokens", "tome(r=3)", *args) == 0
    assert "block 1      11" in capsys.readouterr().out and is_png(tmp_path / "p.png")
    assert "keeps all its tokens; say with --tokens" in failing(capsys, "show-tokens", "--model", weights, *args)
    deep = ("--model", weights, "--tokens", "DIFFRATE(model=deit-s, budget=2.9G)")
    assert "the schedule has 12 blocks, the model 2" in failing(capsys, "show-tokens", *deep, *args)
    trained = ("--model", weights, "--tokens", "sit(dim=64, layers=[1], patches=16)")
    assert "has weights that are trained with the model" in failing(capsys, "show-tokens", *trained, *args)


def test_bench_with_tokens(tmp_path):
    args = ("--models", "digits", "--batches", "1", "--recipes", "W8A16", "--tokens", "tome(r=2)", "--rounds", 1)
    assert run("bench", *args, "--no-memory", "--json", tmp_path / "b.json") == 0
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    assert [row["variant"] for row in rows] == ["fp32", "W8A16", "W8A16 + TOME(r=2)"]


@pytest.mark.parametrize("args, message", [
    ((), "the following arguments are required"),
    (("faster",), "invalid choice"),
    (("bench", "--models", "vit_tyni_patch16_224"), "did you mean vit_tiny_patch16_224?"),
    (("bench", "--recipes", "W8A8,W9"), "unknown recipe 'W9'"),
    (("bench", "--recipes", "W8A8 + w8a16"), "unknown recipe 'w8a16'; did you mean"),
    (("bench", "--recipes", "SPARSE24+W4A8"), "SPARSE24 + W4A8: sparse units multiply 16-bit floats, or int8 by int8"),
    (("bench", "--tokens", "TOM(r=2)"), "unknown method 'tom'; did you mean tome?"),
    (("bench", "--tokens", "absent.json"), "'absent.json' is neither a file nor METHOD(name=value); methods: "),
    (("bench", "--tokens", "TOME(13)"), "'13' is not name=value"),
    (("bench", "--tokens", "TOME(k=13)"), "unexpected keyword argument 'k'"),
    (("bench", "--tokens", "evit(rate=7)"), "EViT: rate=7; use a part"),
    (("bench", "--tokens", "tome(r=2)", "--breakdown"), "leave --tokens out"),
    (("bench", "--batches", "1,0"), "'0' is not a positive whole number"),
    (("bench", "--batches", ""), "'' is not a positive whole number"),
    (("accelerate", "--arch", "digits"), "--output"),
    (("accelerate", "--arch", "vit_tiny_patch16_224", "--output", "o"), "--weights is needed"),
    (("accelerate", "--arch", "digits", "--weights", "w", "--output", "o"), "digits has weights of its own"),
    (("accelerate", "--weights", "w", "--output", "w"), "the float weights would be lost"),
    (("accelerate", "--weights", "w", "--output", "o", "--recipe", "W8A8", "--max-mib", "3"), "leave --recipe out"),
    (("accelerate", "--weights", "w", "--output", "o", "--max-ms", "3", "--max-mib", "3"), "not allowed with"),
    (("accelerate", "--weights", "w", "--output", "o", "--synthesize", "--calibration", "c"), "leave --calibration"),
    (("accelerate", "--weights", "w", "--output", "o", "--checkpoint", "c"), "keeps what --learn has learned"),
    (("accelerate", "--weights", "w", "--output", "o", "--learn", "--recipe", "W8A16"), "not W8A16"),
    (("accelerate", "--weights", "w", "--output", "o", "--max-mib", "-1"), "'-1' is not a positive number"),
    (("accelerate", "--weights", "w", "--output", "o", "--labels", "l"), "--labels came without --images"),
    (("accelerate", "--weights", "w", "--output", "o", "--override", "depht=3"), "'depht=3' is not FIELD=VALUE"),
])  # fmt: skip
def test_wrong_usage(args, message, capsys):
    with pytest.raises(SystemExit) as exit:
        run(*args)
    assert exit.value.code == 2
    out, err = capsys.readouterr()
    assert message in err and out == ""


def failing(capsys, *args) -> str:
    """The one line that a command which fails prints."""
    assert run(*args) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("pyvit-accel: error: ") and "Traceback" not in "".join(lines)
    return lines[-1]


@pytest.mark.parametrize("option", ["--output", "--json", "--chart"])
@pytest.mark.parametrize("place, message", [("absent/o", "absent does not exist; create it"), (".", "is a directory")])
def test_unwritable_output_is_found_before_the_work(tmp_path, capsys, monkeypatch, option, place, message):
    monkeypatch.setattr(commands, "float_model", lambda *_: pytest.fail("the work began"))
    args = ["accelerate", "--arch", "digits"]
    args += [] if option == "--output" else ["--output", tmp_path / "o.safetensors"]
    assert message in failing(capsys, *args, option, tmp_path / place)
    assert not list(tmp_path.iterdir())


def test_bad_weights(weights, tmp_path, capsys):
    def accelerate(path):
        args = ("--weights", path, "--recipe", "W8A16", "--output", tmp_path / "o.safetensors")
        return failing(capsys, "accelerate", *args)

    assert "is not a file" in accelerate(tmp_path / "absent.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(weights.read_bytes()[:-1000])
    assert "truncated" in accelerate(tmp_path / "cut.safetensors")
    (tmp_path / "text.safetensors").write_text("a page that says the file was not found")
    assert "not a safetensors file" in accelerate(tmp_path / "text.safetensors")
    model = create_vit("vit_tiny_patch16_224", **TINY)
    nn.init.constant_(model.head.bias, math.nan)
    save_weights(model, tmp_path / "nan.safetensors")
    assert "NaN or infinite weights" in accelerate(tmp_path / "nan.safetensors")
    assert run("accelerate", "--weights", weights, "--recipe", "W8A16", "--rounds", 1, "--batch", 1,
               "--output", tmp_path / "done.safetensors") == 0
    assert "holds an accelerated model already" in accelerate(tmp_path / "done.safetensors")
    assert not (tmp_path / "o.safetensors").exists()


def test_bad_images(digits, weights, tmp_path, capsys):
    def accelerate(*args):
        return failing(capsys, "accelerate", *args, "--output", tmp_path / "o.safetensors")

    assert "takes its scales from images" in accelerate("--arch", "digits")
    assert "is not a folder of images" in accelerate("--arch", "digits", "--images", tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    assert "holds no image" in accelerate("--arch", "digits", "--calibration", tmp_path / "empty")
    labelled = ("--images", digits / "images", "--labels", digits / "labels.json")
    assert "has label 6, but the model has 5 classes" in accelerate("--weights", weights, *labelled)
    (tmp_path / "other.csv").write_text("one.png,1")
    mismatch = ("--images", digits / "images", "--labels", tmp_path / "other.csv")
    assert f"has no label for {COUNT} images" in accelerate("--arch", "digits", *mismatch)
    four = create_vit("vit_tiny_patch16_224", **TINY, in_channels=4, mean=(0.5,) * 4, std=(0.5,) * 4)
    save_weights(four, tmp_path / "four.safetensors")
    assert "takes 4 channels" in accelerate("--weights", tmp_path / "four.safetensors", "--images", digits / "images")
    assert not (tmp_path / "o.safetensors").exists()


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        run("bench", "--debug", "--json", tmp_path / "absent" / "b.json")


def test_interrupt(monkeypatch, capsys):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "machine", lambda: interrupted(None))
    assert run("info") == 1
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize("module, name", [("tqdm", "tqdm"), ("matplotlib", "matplotlib"), ("PIL", "pillow")])
def test_missing_extra(digits, tmp_path, monkeypatch, capsys, module, name):
    for imported in [key for key in sys.modules if key.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, imported)
    monkeypatch.setitem(sys.modules, module, None)
    args = ("--images", digits / "images", "--chart", tmp_path / "c.png", "--output", tmp_path / "o.safetensors")
    message = failing(capsys, "accelerate", "--arch", "digits", *args)
    assert f'this needs {name}; run pip install "pyvit_accel[cli]"' in message


def test_as_a_process(tmp_path):
    """Outside this process: exit codes, and nothing but results on stdout."""
    def process(*args):
        code = "import sys; from pyvit_accel.cli import main; sys.exit(main())"
        return subprocess.run([sys.executable, "-c", code, *args], cwd=tmp_path, capture_output=True, text=True)

    done = process("info")
    assert (done.returncode, done.stderr) == (0, "") or "not built" in done.stderr
    assert "lowbit_linear" in done.stdout and "W8A8" in done.stdout
    assert f"cuda library: {cuda.status()}\n" in done.stdout
    failed = process("accelerate", "--weights", "absent.pth", "--output", "o.safetensors")
    assert (failed.returncode, failed.stdout) == (1, "") and len(failed.stderr.splitlines()) == 1
    assert process("accelerate").returncode == 2


def test_bench(tmp_path, capsys):
    result, chart = tmp_path / "b.json", tmp_path / "b.png"
    assert run("bench", "--models", "digits", "--batches", "1,2", "--recipes", "W8A8", "--rounds", 3,
               "--json", result, "--chart", chart) == 0
    found = json.loads(result.read_text())
    assert [(row["batch"], row["variant"]) for row in found["rows"]] == [
        (batch, variant) for batch in (1, 2) for variant in ("fp32", "W8A8")
    ]
    assert all(0 < row["min_ms_per_image"] <= row["ms_per_image"] for row in found["rows"])
    assert all(0 < row["model_mib"] < row["peak_mib"] for row in found["rows"])
    assert {"cpu", "threads", "isa", "torch", "date"} <= set(found["machine"])
    assert is_png(chart) and "random weights" in capsys.readouterr().out


def test_demo(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "RANDOM", "digits")
    monkeypatch.setenv(demo.DATA, str(tmp_path))
    chart = tmp_path / "new" / "folder" / "demo.png"
    assert run("demo", "--quick", "--chart", chart) == 0
    out, err = capsys.readouterr()
    assert "W8A8_DYNAMIC" in out and "labels are" in out
    assert "lacks labels.json" in err and is_png(chart)


def test_compare_latency_takes_turns():
    calls = []
    found = measure.compare_latency({name: (lambda name=name: calls.append(name)) for name in "ab"}, rounds=3, warmup=1)
    assert "".join(calls) == "baabbaab"
    assert all(0 <= of.min <= of.median for of in found.values())


def test_compare_outputs():
    """Two models on four images, counted by hand."""
    logits = torch.tensor([[2.0, 1.0], [1.0, 2.0], [2.0, 1.0], [2.0, 1.0]])
    models = {"a": nn.Identity(), "b": nn.Hardtanh(0.0, 1.0)}  # b clips to 1: always class 0
    batches = [(logits[:3], torch.tensor([0, 1, 1])), (logits[3:], torch.tensor([0]))]
    found = measure.compare_outputs(models, batches)
    assert (found["a"].images, found["a"].top1, found["a"].agreement, found["a"].logit_error) == (4, 0.75, 1.0, 0.0)
    assert (found["b"].top1, found["b"].agreement) == (0.5, 0.75)
    assert found["b"].logit_error == pytest.approx((4 / 20) ** 0.5)
    assert measure.compare_outputs(models, [(logits, None)])["b"].top1 is None
    with pytest.raises(ValueError, match="the a model gave NaN"):
        measure.compare_outputs(models, [(logits * math.nan, None)])


def test_peak_memory_is_of_the_child_alone():
    ballast = torch.ones(2**28)  # 1 GiB here
    peak = measure.peak_memory("digits", 1)
    assert 0 < peak.imports < peak.total < ballast.nbytes / 2**20


def test_whole_files_only(tmp_path):
    def fails(temporary):
        Path(temporary).write_text("half")
        raise OSError("No space left on device")

    (tmp_path / "kept").write_text("before")
    with pytest.raises(OSError, match="No space left"):
        write_whole(tmp_path / "kept", fails)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("kept", "before")]


def test_table_and_chart(tmp_path):
    assert table(("name", "ms"), [("a", "1.0"), ("long", "10.0")]).splitlines() == [
        "name    ms", "----------", "a      1.0", "long  10.0",
    ]
    write_chart(tmp_path / "c.png", "title", {"one": [Bar("fp32", 2.0), Bar("int8", 1.0)]})
    assert is_png(tmp_path / "c.png")


