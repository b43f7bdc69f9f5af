// The ops by channels: a vector is of adjacent channels of one pixel.

#ifndef JAX_DWBP_CHANNEL_SCHEDULE_H_
#define JAX_DWBP_CHANNEL_SCHEDULE_H_

#include "channel_axis.h"
#include "depth_axis.h"
#include "kernels.h"
#include "runtime.h"

namespace jax_dwbp {

// A forward op, or an input gradient, which is a transposed one. For a filter gradient `in` is the
// input and `out` the gradient by the result.
struct ChannelCall {
  const Kernels& kernels;
  Sizes sizes;
  bool is_transposed;
  DepthAxis depth;
  Axis rows, columns;
  Tensor in, filter, out;

  // Values for each channel, of a pixel that is read and of one that is written.
  int64_t InMultiplier() const { return is_transposed ? sizes.multiplier : 1; }
  int64_t OutMultiplier() const { return is_transposed ? 1 : sizes.multiplier; }
  int64_t Taps() const { return depth.kernel * sizes.SliceTaps(); }
  // Blocks of channels, of a line each.
  int64_t Blocks() const { return CeilDiv(sizes.channels, kernels.lanes); }
};

void ConvolveChannels(ffi::ThreadPool& pool, const ChannelCall& call);
void CorrelateChannels(ffi::ThreadPool& pool, const ChannelCall& call);

}  // namespace jax_dwbp

#endif  // JAX_DWBP_CHANNEL_SCHEDULE_H_
