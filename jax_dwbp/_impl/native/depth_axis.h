// What meets what along the depth of a volume. A result is computed slice by slice, each of the slices
// that the taps of the filter's depth read for it.

#ifndef JAX_DWBP_DEPTH_AXIS_H_
#define JAX_DWBP_DEPTH_AXIS_H_

#include <algorithm>
#include <cstdint>
#include <numeric>

#include "row_axis.h"

namespace jax_dwbp {

// A tap of the filter's depth, and the slice that it reads.
struct DepthTap {
  int64_t k, slice;
};

// Tap k reads stride * t - low + dilation * k to write t or, transposed, (t + low - dilation * k) /
// stride where that is whole. What has no depth has one slice, and a kernel of 1.
struct DepthAxis {
  int64_t in, out, kernel;
  int64_t stride, low, dilation;
  bool is_transposed;

  // The slice that a tap reads to write slice t, or -1 if there is none.
  int64_t Read(int64_t k, int64_t t) const {
    const int64_t distance = dilation * k - low;
    int64_t slice = stride * t + distance;
    if (is_transposed) {
      slice = t < distance || (t - distance) % stride > 0 ? -1 : (t - distance) / stride;
    }
    return 0 <= slice && slice < in ? slice : -1;
  }
  // Taps that meet one slice of the result, at most.
  int64_t MostMet() const {
    const int64_t period = is_transposed ? stride / std::gcd(stride, dilation) : 1;
    return std::min(CeilDiv(kernel, period), in);
  }
  // Slices that lie between what is read for one slice and for the next.
  int64_t Between() const { return is_transposed ? 0 : stride; }
  // Whether slices are as good as images.
  bool IsBatch() const { return kernel == 1 && stride == 1 && low == 0 && in == out; }
};

}  // namespace jax_dwbp

#endif  // JAX_DWBP_DEPTH_AXIS_H_
