"""The command line, pyvit-accel: what can be asked, and how errors are told.

Exit codes: 0 done, 1 failed (one line on stderr; --debug shows where), 2 wrong usage. Results go to stdout, notes and
progress to stderr.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from pyvit_accel import commands, demo
from pyvit_accel.measure import DIGITS
from pyvit_accel.models import ARCHITECTURES, ViTConfig
from pyvit_accel.recipes import RECIPES, named
from pyvit_accel.tokens import METHODS, TokenSchedule

MODELS = (DIGITS, *ARCHITECTURES)
SMALLEST = "vit_tiny_patch16_224"
SCHEDULE = 'a file that find_schedule saved, or "TOME(r=13)", "EVIT(rate=0.7, fuse=True)"'


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    args.check(args)
    try:
        args.run(args)
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        print("pyvit-accel: interrupted", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of stdout has seen enough; Python would complain again when it exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if args.debug:
            raise
        kind = "" if isinstance(error, (ValueError, OSError, ImportError)) else f"{type(error).__name__}: "
        print(f"pyvit-accel: error: {kind}{' '.join(str(error).split())}", file=sys.stderr)
        return 1


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="pyvit-accel", description="Make a trained vision transformer faster: int8 matmuls and attention."
    )
    sub = top.add_subparsers(title="commands", required=True, metavar="{demo,accelerate,bench,show-tokens,info}")
    _add_demo(sub)
    _add_accelerate(sub)
    _add_bench(sub)
    _add_show_tokens(sub)
    _command(sub, "info", commands.run_info, "what this install has, and which implementation owns which op")
    return top


def _command(sub, name: str, run: Callable, text: str, check: Callable = lambda args: None) -> argparse.ArgumentParser:
    command = sub.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    command.add_argument("--threads", type=_positive, help="CPU threads (default: torch's choice)")
    command.add_argument("--debug", action="store_true", help="on an error, show the traceback")
    command.set_defaults(run=run, check=check)
    return command


def _add_demo(sub) -> None:
    add = _command(sub, "demo", demo.run_demo, "speed and accuracy, before and after").add_argument
    add("--chart", type=Path, default=Path("demo", "pyvit_accel_demo.png"), help="PNG to write (default: %(default)s)")
    add("--quick", action="store_true", help="fewer images and rounds")


def _add_accelerate(sub) -> None:
    def check(args: argparse.Namespace) -> None:
        if args.arch == DIGITS and (args.weights or args.override):
            command.error(f"--arch {DIGITS} has weights of its own; leave --weights and --override out")
        if args.arch != DIGITS and not args.weights:
            command.error("--weights is needed, a file of float weights")
        if args.weights and args.weights.resolve() == args.output.resolve():
            command.error("--output is the file of --weights; the float weights would be lost")
        if args.recipe and (args.max_mib or args.max_ms):
            command.error("--max-mib and --max-ms choose the bits of every layer; leave --recipe out")
        if args.synthesize and args.calibration:
            command.error("--synthesize calibrates on images made from the model; leave --calibration out")
        if args.checkpoint and not args.learn:
            command.error("--checkpoint keeps what --learn has learned; pass both")
        if args.learn and args.recipe and not re.fullmatch(r"W\dA\d", args.recipe):
            command.error(f"--learn is for recipes of integer weights and activations, not {args.recipe}")
        if args.labels and not args.images:
            command.error("--labels came without --images")

    text = "accelerate a model, save it, and measure it before and after"
    command = _command(sub, "accelerate", commands.run_accelerate, text, check)
    add = command.add_argument
    add("--arch", type=_model, metavar="NAME", help=f"architecture, or {DIGITS}; without it, as the weights file shows")
    add("--weights", type=Path, help="float weights: .safetensors, or a torch state dict (.pth, .pt, .bin)")
    add("--override", type=_override, action="append", default=[], metavar="FIELD=VALUE",
        help="a field of the architecture, for example num_classes=10; repeat for more")
    recipes = f"{', '.join(RECIPES)}, or a sum, SPARSE24+W8A8 (default: {commands.RECIPE})"
    add("--recipe", type=_recipe, metavar="NAME", help=recipes)
    budget = command.add_mutually_exclusive_group().add_argument
    budget("--max-mib", type=_positive_float, metavar="MIB",
           help="instead of a recipe: the bits of each layer that lose least, the blocks' packed weights within it")
    budget("--max-ms", type=_positive_float, metavar="MS", help="the same, for the time of their matmuls of one image")
    add("--tokens", type=_schedule, metavar="SCHEDULE", help=f"also leave tokens out: {SCHEDULE}")
    add("--images", type=Path, metavar="FOLDER", help="images to measure on, loose or in class folders")
    add("--labels", type=Path, metavar="FILE", help="their class indices, JSON or CSV: file and class")
    add("--calibration", type=Path, metavar="FOLDER",
        help="images to calibrate on (default: some of --images, which are then not measured on)")
    add("--calibration-images", type=_positive, default=32, metavar="N", help="how many of them (default: %(default)s)")
    add("--synthesize", action="store_true", help="calibrate on images made from the model alone")
    add("--learn", action="store_true", help="learn the rounding of the weights block by block, better with 256 images")
    add("--checkpoint", type=Path, metavar="FILE", help="keep the blocks learned so far, and go on from them")
    add("--output", type=Path, required=True, metavar="FILE", help="where the accelerated model goes, .safetensors")
    add("--batch", type=_positive, default=8, help="batch size to measure beside 1 (default: %(default)s)")
    add("--layer-chart", type=Path, metavar="FILE", help="write bits, bytes and error of every layer as a PNG chart")
    _add_results(command)


def _add_bench(sub) -> None:
    def check(args: argparse.Namespace) -> None:
        if args.breakdown and args.tokens:
            command.error("--breakdown times blocks that keep their tokens; leave --tokens out")

    text = "latency and peak memory of float32 and accelerated models"
    command = _command(sub, "bench", commands.run_bench, text, check)
    add = command.add_argument
    add("--models", type=_list(_model), default=[SMALLEST], metavar="A,B", help=f"default: {SMALLEST}")
    add("--batches", type=_list(_positive), default=[1, 8], metavar="1,8", help="batch sizes (default: 1,8)")
    recipes = f"default: {','.join(RECIPES)}; with --breakdown {commands.RECIPE}"
    add("--recipes", type=_list(_recipe), metavar="A,B", help=recipes)
    add("--tokens", type=_schedule, metavar="SCHEDULE", help=f"every recipe also with fewer tokens: {SCHEDULE}")
    add("--breakdown", action="store_true", help="instead, where the time goes, phase by phase, and a roofline")
    add("--no-memory", dest="memory", action="store_false", help="do not start processes to measure memory")
    _add_results(command)


def _add_show_tokens(sub) -> None:
    text = "which patches of an image are left after every block, as a picture"
    add = _command(sub, "show-tokens", commands.run_show_tokens, text).add_argument
    add("--model", required=True, metavar="FILE", help=f"accelerated model, float weights, or a name like {DIGITS}")
    add("--tokens", type=_schedule, metavar="SCHEDULE", help=f"{SCHEDULE} (default: the one in the file)")
    add("--images", type=Path, nargs="+", required=True, metavar="FILE", help="images to show it on")
    add("--output", type=Path, required=True, metavar="FILE", help="PNG to write")


def _add_results(command: argparse.ArgumentParser) -> None:
    command.add_argument("--rounds", type=_positive, default=20, help="timed rounds (default: %(default)s)")
    command.add_argument("--json", type=Path, metavar="FILE", help="write the results as JSON")
    command.add_argument("--chart", type=Path, metavar="FILE", help="write the results as a PNG chart")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def _positive_float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return value


def _model(text: str) -> str:
    return _one_of("model", text, MODELS)


def _recipe(text: str) -> str:
    """A recipe's name, or those of several, A + B."""
    name = " + ".join(_one_of("recipe", part.strip(), RECIPES) for part in text.split("+"))
    try:
        named(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return name


def _schedule(text: str) -> TokenSchedule:
    """A JSON file, or METHOD(name=value, ...): numbers, True, False, lists, and words, with quotes or without."""
    call = re.fullmatch(r"\s*(\w+)\s*\((.*)\)\s*", text, re.DOTALL)
    try:
        if call is None and (text.lower() not in METHODS or Path(text).is_file()):
            if not Path(text).is_file():
                raise ValueError(f"{text!r} is neither a file nor METHOD(name=value)")
            return TokenSchedule.load(text)
        name, inside = (text, "") if call is None else call.groups()
        _one_of("method", name.lower(), sorted(METHODS))
        return TokenSchedule(name.lower(), dict(map(_argument, re.findall(r"[^,\[(]+(?:[\[(][^\])]*[\])])?", inside))))
    except (ValueError, TypeError) as error:
        raise argparse.ArgumentTypeError(f"{error}; methods: {', '.join(sorted(METHODS))}") from None


def _argument(text: str) -> tuple[str, object]:
    name, equals, value = (part.strip() for part in text.partition("="))
    if not equals or not name.isidentifier() or not value:
        raise ValueError(f"{text.strip()!r} is not name=value")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _one_of(kind: str, text: str, known: Sequence[str]) -> str:
    if text not in known:
        close = difflib.get_close_matches(text, known, n=1)
        advice = f"did you mean {close[0]}?" if close else f"use one of {', '.join(known)}"
        raise argparse.ArgumentTypeError(f"unknown {kind} {text!r}; {advice}")
    return text


def _list(item: Callable[[str], object]) -> Callable[[str], list]:
    def parse(text: str) -> list:
        return list(dict.fromkeys(item(part.strip()) for part in text.split(",")))

    return parse


def _override(text: str) -> tuple[str, object]:
    name, equals, value = text.partition("=")
    known = [f.name for f in dataclasses.fields(ViTConfig)]
    if not equals or name not in known:
        raise argparse.ArgumentTypeError(f"{text!r} is not FIELD=VALUE with a field among {', '.join(known)}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


if __name__ == "__main__":
    sys.exit(main())
