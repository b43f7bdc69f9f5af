// The kernels of one instruction set, by data type.

#include "kernels.h"

#include "plane_lanes.h"
#include "row_lanes.h"
#include "vectors.h"

#if defined(__AVX512F__)
#define PLANE_KERNELS(i) &Avx512PlaneKernels[i]
#else
#define PLANE_KERNELS(i) nullptr
#endif

namespace jax_dwbp {
namespace {

template <typename S>
constexpr Kernels KernelsOf(int i) {
  return {.lanes = kLanes<typename Compute<S>::type>,
          .element_size = sizeof(S),
          .channel_moves = &OF_INSTRUCTION_SET(ChannelMoves)[i],
          .channel_lanes = &OF_INSTRUCTION_SET(ChannelKernels)[i],
          .channel_sums = &OF_INSTRUCTION_SET(ChannelSums)[i],
          .row_moves = &OF_INSTRUCTION_SET(RowMoves)[i],
          .row_lanes = &OF_INSTRUCTION_SET(RowKernels)[i],
          .row_sums = &OF_INSTRUCTION_SET(RowSums)[i],
          .plane_lanes = PLANE_KERNELS(i)};
}

}  // namespace

const Kernels& OF_INSTRUCTION_SET(Kernels)(Type type) {
  static constexpr Kernels kTable[] = {KernelsOf<Half>(0), KernelsOf<Brain>(1), KernelsOf<float>(2),
                                       KernelsOf<double>(3)};
  return kTable[static_cast<int>(type)];
}

}  // namespace jax_dwbp
