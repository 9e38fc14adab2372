// The command: each probe between a line that it begins and a line that it ends.
#include <cstring>

#include "probe.h"

using namespace probes;

int main(int count, char** names) {
  if (count == 1) {
    for (const Probe& probe : all()) std::printf("%s\n", probe.name.c_str());
    return 0;
  }
  cudaDeviceProp properties;
  CHECK(cudaGetDeviceProperties(&properties, 0));
  const Device device{properties.multiProcessorCount, properties.major, properties.minor,
                      static_cast<size_t>(properties.l2CacheSize)};
  const int capability = 10 * device.major + device.minor;
  for (int i = 1; i < count; ++i) {
    for (const Probe& probe : all()) {
      if (probe.name != names[i]) continue;
      std::printf("{\"begin\": \"%s\"}\n", names[i]);
      std::fflush(stdout);
      if (capability < probe.least || (probe.least == 90 && capability != 90))
        std::printf("{\"absent\": \"needs sm_%d, this is sm_%d\"}\n", probe.least, capability);
      else
        probe.run(device);
      CHECK(cudaDeviceSynchronize());
      std::printf("{\"end\": \"%s\"}\n", names[i]);
      std::fflush(stdout);
    }
  }
  return 0;
}
