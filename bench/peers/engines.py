"""The engines compared: how each converts a model, and how it loads and runs one.

Each is in the form its documentation recommends for a transformer on an x86 CPU; where that leaves a choice, in the
faster one. Everything heavy is imported where it is used: processes that run ONNX Runtime or OpenVINO have no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from peers.job import Job

Run = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Engine:
    """
    form      what is compared, in words
    load      a job -> a function from images to logits
    prepare   writes the converted model into the job's folder; None: load builds it, and its memory is counted
    imports   modules whose memory is not counted as the model's
    packages  what it is made with. A conversion is used again while their versions stay; that of this project, which
              has none here, never is
    pixels    the type of the images it takes; float32 ones are normalised
    """

    form: str
    load: Callable[[Job], Run]
    prepare: Callable[[Job], None] | None = None
    imports: tuple[str, ...] = ("torch", "pyvit_accel")
    packages: tuple[str, ...] = ("torch",)
    pixels: str = "float32"


def float_model(job: Job):
    """The float32 model, its weights held once."""
    import torch

    from pyvit_accel.models import ARCHITECTURES, VisionTransformer, read_weights

    torch.set_num_threads(job.threads)
    with torch.device("meta"):
        model = VisionTransformer(ARCHITECTURES[job.model])
    model.load_state_dict(read_weights(job.weights), assign=True)
    return model.eval().requires_grad_(False)


def run_torch(model: Callable) -> Run:
    import torch

    def run(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return model(torch.from_numpy(images)).numpy()

    return run


def load_eager(job: Job) -> Run:
    return run_torch(float_model(job))


def load_compiled(job: Job, quantize: Callable = lambda model: None) -> Run:
    """Frozen weights: only then does inductor pack them, and recognise int8 matmuls."""
    import torch
    from torch._inductor import config

    config.freezing = True
    model = float_model(job)
    quantize(model)
    return run_torch(torch.compile(model, dynamic=False))


def load_torch_int8(job: Job) -> Run:
    import torch
    from torch.ao.quantization import quantize_dynamic

    return run_torch(quantize_dynamic(float_model(job), {torch.nn.Linear}, torch.qint8, inplace=True))


def quantize_torchao(model) -> None:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(model, Int8DynamicActivationInt8WeightConfig())


def export_onnx(job: Job) -> str:
    """The float32 model as ONNX, its batch size free; exported once for all engines that start from it."""
    import torch

    path = Path(job.folder).with_name(f"torch-{torch.__version__}.onnx")
    if not path.exists():
        model = float_model(job)
        config, part = model.config, path.with_suffix(".part")
        torch.onnx.export(
            model, (torch.zeros(2, config.in_channels, config.image_size, config.image_size),), str(part),
            dynamo=True, external_data=False, opset_version=20, input_names=["images"], output_names=["logits"],
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
        )  # fmt: skip
        part.rename(path)
    return str(path)


def prepare_ort(job: Job) -> None:
    Path(job.file("model.onnx")).symlink_to(export_onnx(job))


def preprocess_ort(job: Job) -> str:
    """The ONNX file with its shapes inferred and its graph optimised, as the documentation asks before quantising."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    path = job.file("preprocessed.onnx")
    quant_pre_process(export_onnx(job), path)
    return path


def prepare_ort_static(job: Job) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        images = iter(np.load(job.calibration, mmap_mode="r"))

        def get_next(self):
            image = next(self.images, None)
            return None if image is None else {"images": image[None]}

    # With the outputs left float ViT-Ti takes twice as long; with every op quantized nothing is predicted right.
    quantize_static(
        preprocess_ort(job), job.file("model.onnx"), Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul", "Gemm", "Conv"],
        extra_options={"MatMulConstBOnly": True},
    )  # fmt: skip


def prepare_ort_dynamic(job: Job) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        preprocess_ort(job), job.file("model.onnx"), per_channel=True, weight_type=QuantType.QInt8,
        op_types_to_quantize=["MatMul", "Gemm"], extra_options={"MatMulConstBOnly": True},
    )  # fmt: skip


def load_ort(job: Job) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = job.threads
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.add_free_dimension_override_by_name("batch", job.batch)
    session = onnxruntime.InferenceSession(job.file("model.onnx"), options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(["logits"], {"images": images})[0]


def convert_openvino(job: Job):
    import openvino
    import torch

    model = float_model(job)
    config = model.config
    shape = (config.in_channels, config.image_size, config.image_size)
    converted = openvino.convert_model(model, example_input=torch.zeros(1, *shape))
    converted.reshape([-1, *shape])
    return converted


def prepare_openvino(job: Job) -> None:
    import openvino

    openvino.save_model(convert_openvino(job), job.file("model.xml"), compress_to_fp16=False)


def prepare_openvino_int8(job: Job) -> None:
    import nncf
    import openvino

    images = np.load(job.calibration, mmap_mode="r")
    quantized = nncf.quantize(
        convert_openvino(job), nncf.Dataset([np.array(image[None]) for image in images]),
        model_type=nncf.ModelType.TRANSFORMER, preset=nncf.QuantizationPreset.PERFORMANCE, subset_size=len(images),
    )  # fmt: skip
    openvino.save_model(quantized, job.file("model.xml"), compress_to_fp16=False)


def load_openvino(job: Job, precision: str | None = None) -> Run:
    """precision  of what is not int8; None leaves it to OpenVINO: bfloat16 where the CPU has instructions for it."""
    import openvino

    core = openvino.Core()
    model = core.read_model(job.file("model.xml"))
    shape = model.inputs[0].partial_shape
    model.reshape([job.batch, *(shape[i].get_length() for i in range(1, 4))])
    settings = {"INFERENCE_NUM_THREADS": job.threads, "PERFORMANCE_HINT": "LATENCY"}
    if precision is not None:
        settings["INFERENCE_PRECISION_HINT"] = precision
    request = core.compile_model(model, "CPU", settings).create_infer_request()
    return lambda images: request.infer([images], share_inputs=True, share_outputs=True)[0]


def prepare_pyvit_accel(job: Job, recipe: str) -> None:
    import torch

    from pyvit_accel import accelerate, recipes, save

    images = torch.from_numpy(np.load(job.calibration))
    model, _ = accelerate(float_model(job), recipes.RECIPES[recipe], [images])
    save(model, job.file("model.safetensors"))


def load_pyvit_accel(job: Job) -> Run:
    import torch

    from pyvit_accel import load

    torch.set_num_threads(job.threads)
    return run_torch(load(job.file("model.safetensors")))


def _ort(form: str, prepare: Callable[[Job], None]) -> Engine:
    packages = ("torch", "onnx", "onnxscript", "onnxruntime")
    return Engine(form, load_ort, prepare, ("onnxruntime",), packages)


def _openvino(form: str, prepare: Callable[[Job], None], precision: str | None, *more: str) -> Engine:
    load = partial(load_openvino, precision=precision)
    return Engine(form, load, prepare, ("openvino",), ("torch", "openvino", *more))


def _pyvit_accel(recipe: str) -> Engine:
    form = f"recipe {recipe}; takes uint8 pixels and normalises them itself, in the time measured"
    return Engine(form, load_pyvit_accel, partial(prepare_pyvit_accel, recipe=recipe), packages=(), pixels="uint8")


FP32, OPENVINO_INT8 = "torch_fp32", "openvino_int8"
ENGINES = {
    FP32: Engine("eager", load_eager),
    "torch_compile": Engine("inductor, weights frozen; compiled in the process measured", load_compiled),
    "torch_int8_dynamic": Engine(
        "torch.ao quantize_dynamic, Linears with int8 weights; quantized in the process measured", load_torch_int8
    ),
    "torchao_int8_dynamic": Engine(
        "Int8DynamicActivationInt8WeightConfig, then as torch_compile",
        partial(load_compiled, quantize=quantize_torchao),
        imports=("torch", "pyvit_accel", "torchao.quantization"), packages=("torch", "torchao"),
    ),
    "ort_fp32": _ort("ONNX of torch.onnx.export, all graph optimisations, batch size fixed", prepare_ort),
    "ort_int8_static": _ort(
        "QDQ around MatMul, Gemm and Conv with constant weights; uint8 activations, int8 weights per channel, MinMax",
        prepare_ort_static,
    ),
    "ort_int8_dynamic": _ort("quantize_dynamic on MatMul and Gemm, int8 weights per channel", prepare_ort_dynamic),
    "openvino_fp32": _openvino("precision f32, LATENCY hint, batch size fixed", prepare_openvino, "f32"),
    "openvino_default": _openvino("as openvino_fp32, at its default precision", prepare_openvino, None),
    OPENVINO_INT8: _openvino("NNCF, model_type TRANSFORMER, preset PERFORMANCE; what stays float at default precision",
                             prepare_openvino_int8, None, "nncf"),
    "pyvit_accel_W8A8": _pyvit_accel("W8A8"),
    "pyvit_accel_W8A8_DYNAMIC": _pyvit_accel("W8A8_DYNAMIC"),
}
