// What a block of Hopper's kernels copies into: a ring of stages in shared memory, each with two barriers.
#pragma once
#include "hopper.cuh"

namespace pyvit_accel {
namespace {

// Of this block in its cluster.
template <class Tile>
__device__ __forceinline__ uint32_t rank() {
  return blockIdx.x % Tile::CLUSTER;
}

// The stages in shared memory, and where one is in their round: `parity` is that of its barriers' phase.
template <class Tile>
struct Stages {
  uint32_t base;    // shared-memory address
  uint64_t* full;   // 1 arrival, the producer's, and the bytes of a stage
  uint64_t* empty;  // an arrival of each consumer warp of the cluster: what a block copies goes to all of its blocks
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ explicit Stages(uint8_t* shared)
      : base(hopper::shared_address(shared)),
        full(reinterpret_cast<uint64_t*>(shared + Tile::STAGES * Tile::STAGE_BYTES)),
        empty(full + Tile::STAGES) {}
  __device__ __forceinline__ uint32_t x() const { return base + stage * Tile::STAGE_BYTES; }
  __device__ __forceinline__ uint32_t w() const { return x() + Tile::X_BYTES; }
  __device__ __forceinline__ void next() {
    if (++stage == Tile::STAGES) stage = 0, parity ^= 1;
  }
};

}  // namespace
}  // namespace pyvit_accel
