"""What the commands accelerate, bench, show-tokens and info do, given their parsed arguments."""

from __future__ import annotations

import argparse
import dataclasses
import math
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from pyvit_accel import backends, cuda
from pyvit_accel.calibrate import Reconstruction, synthesize
from pyvit_accel.convert import Recipe, accelerate
from pyvit_accel.files import check_writable
from pyvit_accel.images import ImageFolder, read_image
from pyvit_accel.measure import (
    DIGITS,
    Fidelity,
    Latency,
    build_model,
    compare_latency,
    compare_outputs,
    machine,
    peak_memory,
    random_images,
)
from pyvit_accel.mixed_precision import search
from pyvit_accel.models import (
    ARCHITECTURES,
    VisionTransformer,
    create_vit,
    infer_config,
    load_weights,
    read_config,
    read_weights,
)
from pyvit_accel.output import Bar, note, percent, progress, require, table, write_chart, write_json, write_layer_chart
from pyvit_accel.recipes import RECIPES, integer, named, tokens
from pyvit_accel.serialize import load, read_header, save
from pyvit_accel.show_tokens import draw, token_pictures
from pyvit_accel.timemap import map_time, measure_roofs, work_of
from pyvit_accel.timemap_chart import write_timemap_chart
from pyvit_accel.token_reduction import reduce_tokens
from pyvit_accel.tokens import TokenSchedule

FP32 = "fp32"
LATENCY_HEADER = ("batch", "variant", "ms/image", "fastest", "speed-up")
FIDELITY_HEADER = ("variant", "images", "top-1", "same prediction", "logit error")
NAMED_SKIPS = 10
BUSY = 1.5
RECIPE = "W8A8"  # of accelerate and of the breakdown, when none is named
TOLD_COST = 0.02


def prepare_outputs(args: argparse.Namespace) -> None:
    """Find out before the work whether its results can be shown and written, and set the number of threads."""
    require("tqdm")
    if getattr(args, "chart", None) is not None or getattr(args, "layer_chart", None) is not None:
        require("matplotlib.figure")
    for name in ("output", "json", "chart", "layer_chart"):
        if getattr(args, name, None) is not None:
            check_writable(getattr(args, name))
    if args.threads:
        torch.set_num_threads(args.threads)


def run_accelerate(args: argparse.Namespace) -> None:
    prepare_outputs(args)
    model = float_model(args.arch, args.weights, dict(args.override))
    config, recipe = model.config, _recipe(args)
    check_schedule(args.tokens, model)
    images = None
    if args.images:
        images = ImageFolder.open(args.images, args.labels, config.num_classes)
        _say_skipped(images)
    batches = None
    if recipe is None or recipe.needs_calibration:
        batches, images = _calibration(args, model, images)
    if recipe is None:
        found = search(model, batches, max_mib=args.max_mib, max_ms=args.max_ms, reconstruction=_reconstruction(args))
        recipe = found.recipe
        print(found, end="\n\n")
    recipe = with_tokens(recipe, args.tokens)
    fast, report = accelerate(model, recipe, batches)
    print(report, end="\n\n")
    models = {FP32: model, recipe.name: fast}
    fidelity: dict[str, Fidelity] = {}
    if images is not None:
        read = images.batches(config.image_size, config.in_channels, args.batch)
        fidelity = compare_outputs(models, read, num_batches(images, args.batch), classifies=config.num_classes > 0)
        _say_skipped(images)
    save(fast, args.output)
    latency = {batch: latencies(models, batch, args.rounds) for batch in sorted({1, args.batch})}
    print(latency_table(latency), end="\n\n")
    if fidelity:
        print(fidelity_table(fidelity), end="\n\n")
    size = Path(args.output).stat().st_size / 2**20
    print(f"{args.output}: {size:.1f} MiB; the float32 weights are {float_mib(model):.1f} MiB")
    title = f"{args.arch or Path(args.weights).name}, {recipe.name}"
    if args.json:
        rows = [row for batch, of in latency.items() for row in latency_rows(of, batch)]
        kept = {e.name: e.reason for e in report.kept}
        found = {name: f.to_dict() for name, f in fidelity.items()}
        write_json(args.json, {
            "title": title, "machine": machine(), "latency": rows, "fidelity": found,
            "replaced": {e.name: e.became for e in report.replaced}, "kept": kept,
            "layers": [dataclasses.asdict(layer) for layer in report.layers],
        })
    if args.layer_chart:
        write_layer_chart(args.layer_chart, title, report.layers)
    if args.chart:
        groups = {f"batch {batch}": bars(of, batch, fidelity) for batch, of in latency.items()}
        write_chart(args.chart, f"{title}\n{machine_line()}", groups)


def check_schedule(schedule: TokenSchedule | None, model: VisionTransformer) -> None:
    """Before the work: whether the model has as many blocks and tokens. Raises ValueError."""
    if schedule is None:
        return
    config = model.config
    schedule.rows(config.depth, config.num_patches + config.num_prefix_tokens, config.num_prefix_tokens)
    if any(step is not None and next(step.parameters(), None) is not None for step in schedule.steps(config.depth)):
        raise ValueError(f"{schedule.name} has weights that are trained with the model; give it to reduce_tokens")


def with_tokens(recipe: Recipe, schedule: TokenSchedule | None) -> Recipe:
    return recipe if schedule is None else recipe + tokens(schedule)


def float_model(arch: str | None, weights: str | None, overrides: dict) -> VisionTransformer:
    """The float model in eval mode: a named architecture with weights, or what the weights file shows it to be."""
    if weights is not None and _is_accelerated(weights):
        raise ValueError(f"{weights} holds an accelerated model already; pass the float weights it was made from")
    if arch == DIGITS:
        return build_model(DIGITS)
    if arch is not None:
        return load_weights(create_vit(arch, **overrides), weights).eval()
    config = read_config(weights)
    if config is None or overrides:
        config = infer_config(read_weights(weights), **overrides)
        note(
            f"{weights} names no architecture; {config.num_heads} heads, pixel mean {config.mean} and std {config.std} "
            "are assumed, --arch or --override says otherwise"
        )
    return load_weights(VisionTransformer(config), weights).eval()


def _is_accelerated(path: str) -> bool:
    try:
        read_header(path)
    except ValueError:
        return False
    return True


def _recipe(args: argparse.Namespace) -> Recipe | None:
    """None: to be searched for."""
    if args.max_mib or args.max_ms:
        return None
    recipe = named(args.recipe or RECIPE)
    if not args.learn:
        return recipe
    w_bits, x_bits = (int(digit) for digit in recipe.name[1::2])
    return integer(w_bits, x_bits, reconstruction=_reconstruction(args))


def _reconstruction(args: argparse.Namespace) -> Reconstruction | None:
    return Reconstruction(checkpoint=args.checkpoint and str(args.checkpoint)) if args.learn else None


def _calibration(
    args: argparse.Namespace, model: VisionTransformer, images: ImageFolder | None
) -> tuple[list[Tensor], ImageFolder | None]:
    """Batches to calibrate on, and the images left to measure on."""
    if args.synthesize:
        made = synthesize(model, args.calibration_images, progress=progress)
        return list(made.split(args.batch)), images
    folder, images = _split_calibration(args, images)
    read = folder.batches(model.config.image_size, model.config.in_channels, args.batch)
    batches = [pixels for pixels, _ in progress(read, "calibration images", num_batches(folder, args.batch))]
    _say_skipped(folder)
    return batches, images


def _split_calibration(args: argparse.Namespace, images: ImageFolder | None) -> tuple[ImageFolder, ImageFolder | None]:
    """Images to calibrate on, and those left to measure on: never the same ones, unless there are too few."""
    if args.calibration:
        folder = ImageFolder.open(args.calibration)
        _say_skipped(folder)
        return folder.sample(args.calibration_images)[0], images
    if images is None:
        raise ValueError(
            f"{args.recipe or RECIPE} takes its scales from images; pass --images or --calibration, or --synthesize to "
            "make some, or use W8A8_DYNAMIC"
        )
    calibration, rest = images.sample(args.calibration_images)
    if not len(rest):
        note(f"all {len(images)} images are needed for calibration; accuracy is measured on the same ones")
        return calibration, images
    return calibration, rest


def _say_skipped(folder: ImageFolder) -> None:
    for name, reason in list(folder.skipped.items())[:NAMED_SKIPS]:
        note(f"skipped {name}: {reason}")
    if folder.skipped:
        note(f"{len(folder.skipped)} files of {folder.root} skipped")
    if folder.enlarged:
        note(f"{folder.enlarged} images of {folder.root} are smaller than the model's and were enlarged")


def run_bench(args: argparse.Namespace) -> None:
    prepare_outputs(args)
    if args.breakdown:
        return run_breakdown(args)
    args.recipes = args.recipes or list(RECIPES)
    rows, groups = [], {}
    title = f"speed and memory only: random images, random weights (but for {DIGITS})"
    with tempfile.TemporaryDirectory() as folder:
        for name in args.models:
            models = recipe_variants(name, args.recipes, args.tokens)
            saved = {}
            for variant in list(models)[1:] if args.memory else ():
                saved[variant] = Path(folder, f"{name}.{variant}.safetensors")
                save(models[variant], saved[variant])
            for batch in args.batches:
                latency = latencies(models, batch, args.rounds, name)
                peaks = {}
                for variant in progress(models if args.memory else (), f"{name} batch {batch}: memory"):
                    peak = peak_memory(name, batch, saved.get(variant))
                    peaks[variant] = {"peak_mib": peak.total, "model_mib": peak.total - peak.imports}
                measured = latency_rows(latency, batch)
                rows += [{"model": name, **row, **peaks.get(row["variant"], {})} for row in measured]
                groups[f"{name}, batch {batch}"] = bars(latency, batch)
    memory = {"peak_mib": "peak MiB", "model_mib": "model MiB"} if args.memory else {}
    cells = [(row["model"], *latency_cells(row), *(f"{row[key]:.0f}" for key in memory)) for row in rows]
    print(f"{title}\n{machine_line()}\n")
    print(table(("model", *LATENCY_HEADER, *memory.values()), cells))
    if args.memory:
        print("\npeak MiB: of a fresh process; model MiB: the part of it that came after importing the libraries")
    if args.json:
        write_json(args.json, {"title": title, "machine": machine(), "rounds": args.rounds, "rows": rows})
    if args.chart:
        write_chart(args.chart, f"{title}\n{machine_line()}", groups)


def run_breakdown(args: argparse.Namespace) -> None:
    roofs, maps = measure_roofs(), []
    print(f"{machine_line()}\n{roofs}")
    for name in args.models:
        models = recipe_variants(name, args.recipes or [RECIPE])
        del models[FP32]
        for model in models.values():
            work_of(model)  # raises before anything is timed
        for batch in args.batches:
            for recipe, model in models.items():
                found = map_time(name, recipe, model, random_images(model, batch), roofs, args.rounds)
                if found.profiling_cost > TOLD_COST:
                    note(f"{found.name}: profiled rounds were {100 * found.profiling_cost:.1f} % slower")
                print(f"\n{found}")
                maps.append(found)
    if args.json:
        write_json(args.json, {
            "machine": machine(), "rounds": args.rounds, "roofs": roofs.to_dict(),
            "maps": [time_map.to_dict() for time_map in maps],
        })
    if args.chart:
        write_timemap_chart(args.chart, machine_line(), maps, roofs)


def recipe_variants(name: str, recipes: list[str], schedule: TokenSchedule | None = None) -> dict[str, nn.Module]:
    """The float model, and accelerated ones without and with the schedule; calibration, if needed, on random images."""
    models = {FP32: build_model(name)}
    check_schedule(schedule, models[FP32])
    for recipe in progress(recipes, f"{name}: accelerating"):
        variants = [named(recipe), *([] if schedule is None else [with_tokens(named(recipe), schedule)])]
        models |= {variant.name: convert(models[FP32], variant) for variant in variants}
    return models


def convert(model: nn.Module, recipe: Recipe, calibration: list | None = None) -> nn.Module:
    """The accelerated model alone; without calibration images, random ones."""
    if recipe.needs_calibration:
        return accelerate(model, recipe, calibration or [random_images(model, 4)])[0]
    return accelerate(model, recipe)[0]


def run_show_tokens(args: argparse.Namespace) -> None:
    prepare_outputs(args)
    require("matplotlib.figure")
    if args.model in (DIGITS, *ARCHITECTURES):
        model = build_model(args.model)
        if args.model != DIGITS:
            note(f"{args.model} has random weights here; pass a file of weights to see what a trained one keeps")
    else:
        model = load(args.model) if _is_accelerated(args.model) else float_model(None, args.model, {})
    check_schedule(args.tokens, model)
    if args.tokens is not None:
        reduce_tokens(model, args.tokens)
    elif "tokens" not in getattr(model, "pyvit_accel", {}):
        raise ValueError(f"{args.model} keeps all its tokens; say with --tokens which to leave out")
    pictures, config = {}, model.config
    for path in args.images:
        pictures[path.name] = token_pictures(model, read_image(path, config.image_size, config.in_channels)[0])
    schedule = TokenSchedule(**model.pyvit_accel["tokens"]["schedule"])
    draw(pictures, args.output, f"{Path(args.model).name}, {schedule.name}")
    for name, of in pictures.items():
        print(table((name, "tokens", "dropped", "merged"), [
            ("all" if p.block < 0 else f"block {p.block}", p.tokens, p.dropped, p.merged) for p in of
        ]))
    print(f"\n{args.output} shows them")


def run_info(args: argparse.Namespace) -> None:
    prepare_outputs(args)
    facts = machine()
    print(f"pyvit_accel {facts['pyvit_accel']}, torch {facts['torch']}, Python {facts['python']}")
    print(f"cpu: {facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads, kernels {facts['isa']}")
    print(f"gpu: {torch.cuda.get_device_name() if torch.cuda.is_available() else 'none that torch can use'}")
    print(f"triton: {'yes' if backends.HAS_TRITON else 'no'}\ncuda library: {cuda.status()}")
    print(f"\n{backends.show_backends()}\n")
    print(f"recipes: {', '.join(RECIPES)}\narchitectures: {', '.join((DIGITS, *ARCHITECTURES))}")
    if not backends.HAS_CPU_KERNELS:
        note("the CPU kernels were not built: every op runs its slow reference; reinstall with a C++ compiler present")


def latencies(models: dict[str, nn.Module], batch: int, rounds: int, name: str = "model") -> dict[str, Latency]:
    images = random_images(next(iter(models.values())), batch)
    calls = {variant: (lambda model=model: model(images)) for variant, model in models.items()}
    latency = compare_latency(calls, rounds, label=f"{name} batch {batch}: latency")
    if any(of.median > BUSY * of.min for of in latency.values()):
        note(f"{name} batch {batch}: the median is far above the fastest round; other work runs here, measure it alone")
    return latency


def latency_rows(latency: dict[str, Latency], batch: int) -> list[dict]:
    """ms per image and the speed-up over the first variant, by medians; losses are below 1."""
    first = next(iter(latency.values()))
    return [
        {"batch": batch, "variant": name, "ms_per_image": of.median / batch, "min_ms_per_image": of.min / batch,
         "speedup": first.median / of.median}
        for name, of in latency.items()
    ]


def latency_table(latency: dict[int, dict[str, Latency]]) -> str:
    rows = [row for batch, of in latency.items() for row in latency_rows(of, batch)]
    return table(LATENCY_HEADER, map(latency_cells, rows))


def latency_cells(row: dict) -> tuple:
    ms, fastest = (f"{row[key]:.2f}" for key in ("ms_per_image", "min_ms_per_image"))
    return row["batch"], row["variant"], ms, fastest, f"{row['speedup']:.2f}x"


def fidelity_table(fidelity: dict[str, Fidelity]) -> str:
    return table(FIDELITY_HEADER, [
        (name, f.images, percent(f.top1), percent(f.agreement), f"{f.logit_error:.4f}") for name, f in fidelity.items()
    ])


def bars(latency: dict[str, Latency], batch: int, fidelity: dict[str, Fidelity] | None = None) -> list[Bar]:
    """What the chart shows; the accuracy is top-1."""
    return [
        Bar(name, of.median / batch, fidelity[name].top1 if fidelity and name in fidelity else None)
        for name, of in latency.items()
    ]


def num_batches(images: ImageFolder, size: int) -> int:
    return math.ceil(len(images) / size)


def machine_line() -> str:
    facts = machine()
    return f"{facts['cpu']}, {facts['threads']} threads, {facts['isa']}, torch {facts['torch']}, {facts['date'][:10]}"


def float_mib(model: nn.Module) -> float:
    return sum(t.numel() * t.element_size() for t in model.parameters()) / 2**20
