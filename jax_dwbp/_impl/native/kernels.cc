// The kernels of one instruction set, by data type.

#include "kernels.h"

#include "row_lanes.h"
#include "vectors.h"

namespace jax_dwbp {

const Kernels& OF_INSTRUCTION_SET(Kernels)(Type type) {
#define KERNELS(S, i)                                                                       \
  {kLanes<Compute<S>::type>,               sizeof(S),                                       \
   &OF_INSTRUCTION_SET(ChannelMoves)[i],   &OF_INSTRUCTION_SET(ChannelKernels)[i],          \
   &OF_INSTRUCTION_SET(ChannelSums)[i],    &OF_INSTRUCTION_SET(RowMoves)[i],                \
   &OF_INSTRUCTION_SET(RowKernels)[i],     &OF_INSTRUCTION_SET(RowSums)[i]}
  static constexpr Kernels kTable[] = {KERNELS(Half, 0), KERNELS(Brain, 1), KERNELS(float, 2),
                                       KERNELS(double, 3)};
  return kTable[static_cast<int>(type)];
}

}  // namespace jax_dwbp
