// The Python module: importing it registers the CPU kernels. Its functions choose the instruction set and measure.
#include <Python.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include "cpu/kernels.h"
#include "cpu/phases.h"
#include "cpu/probe.h"

namespace {

PyObject* isa(PyObject*, PyObject*) { return PyUnicode_FromString(pyvit_accel::kernels().name); }

PyObject* select_isa(PyObject*, PyObject* arg) {
  const char* name = PyUnicode_AsUTF8(arg);
  if (name == nullptr) return nullptr;
  const char* chosen = pyvit_accel::select_isa(name);
  if (chosen == nullptr)
    return PyErr_Format(PyExc_ValueError,
                        "select_isa: this CPU cannot run %R; use 'best', 'avx512_vnni', 'avx2' or 'portable'", arg);
  return PyUnicode_FromString(chosen);
}

// profile(True): start counting. profile(False): stop, and return {phase: seconds of thread time}.
PyObject* profile(PyObject*, PyObject* arg) {
  using namespace pyvit_accel;
  const int on = PyObject_IsTrue(arg);
  if (on < 0) return nullptr;
  profiling = false;
  PyObject* seconds = PyDict_New();
  for (int i = 0; seconds != nullptr && i < (int)Phase::count; ++i) {
    PyObject* value = PyFloat_FromDouble(1e-9 * phase_ns[i].exchange(0));
    if (value == nullptr || PyDict_SetItemString(seconds, kPhaseNames[i], value) < 0) Py_CLEAR(seconds);
    Py_XDECREF(value);
  }
  profiling = on;
  return seconds;
}

PyObject* dot_peak(PyObject*, PyObject*) { return PyFloat_FromDouble(pyvit_accel::dot_peak()); }

PyObject* read_rate(PyObject*, PyObject* arg) {
  const long long bytes = PyLong_AsLongLong(arg);
  if (bytes == -1 && PyErr_Occurred()) return nullptr;
  if (bytes < 64) return PyErr_Format(PyExc_ValueError, "read_rate: %lld bytes; at least 64 are read", bytes);
  return PyFloat_FromDouble(pyvit_accel::read_rate(bytes));
}

PyMethodDef methods[] = {
    {"isa", isa, METH_NOARGS, "The instruction set of the CPU kernels in use."},
    {"select_isa", select_isa, METH_O, "Choose 'best', 'avx512_vnni', 'avx2' or 'portable'; returns the one in use."},
    {"dot_peak", dot_peak, METH_NOARGS, "Multiply-adds per second of int8 dot products on all threads, registers only."},
    {"read_rate", read_rate, METH_O, "Bytes per second that all threads read, each from a buffer of so many bytes."},
    {"profile", profile, METH_O, "Start (True) or stop (False) timing the phases of a block; returns seconds per phase."},
    {nullptr, nullptr, 0, nullptr}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }

// No op has a gradient: integer codes have none. A backward through one raises; without one this costs nothing in Python.
TORCH_LIBRARY_IMPL(pyvit_accel, Autograd, m) {
  for (const char* op : {"quantize", "quantize_dynamic", "norm_quant", "norm_quant_dynamic", "lowbit_linear",
                         "weight_only_linear", "quant_attention", "quant_patch_embed", "quant_block", "quant_mlp", "quant_project",
                         "select_tokens", "split_tokens", "group_tokens", "match_tokens", "merge_pairs", "mean_heads", "mix_tokens",
                         "propagate", "local_assign", "class_row"})
    m.impl(op, torch::autograd::autogradNotImplementedFallback());
}
