// What this machine can do at most, for the roofline of pyvit-accel bench --breakdown.
#pragma once
#include <cstdint>

namespace pyvit_accel {

double dot_peak();                 // multiply-adds per second on all threads, registers only
double read_rate(int64_t bytes);   // bytes per second on all threads, each reading a buffer of its own again and again

}  // namespace pyvit_accel
