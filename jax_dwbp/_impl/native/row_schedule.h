// The ops by rows: which of them, and what is packed and computed when.

#ifndef JAX_DWBP_ROW_SCHEDULE_H_
#define JAX_DWBP_ROW_SCHEDULE_H_

#include "runtime.h"

namespace jax_dwbp {

// Reads first + t + dilation * k to write t, for each k of the filter.
struct RowAxis {
  int64_t in, out, kernel, dilation, first;

  int64_t Span() const { return dilation * (kernel - 1); }
};

// A forward op, or an input gradient, which is one of the flipped filter. The stride and the depth
// multiplier are 1.
// For a filter gradient `in` is the input and `out` the gradient by the result.
struct RowCall {
  const Kernels& kernels;
  Sizes sizes;
  bool channels_first, flipped;
  RowAxis rows, columns;
  Tensor in, filter, out;

  // Values of a pixel that lie side by side, with weights of their own, and planes of an image.
  int64_t Period() const { return channels_first ? 1 : sizes.channels; }
  int64_t Planes() const { return channels_first ? sizes.channels : 1; }
};

// Whether rows are the better vectors for it.
bool PrefersRows(const RowCall& call, bool is_filter_grad);

void ConvolveRows(ffi::ThreadPool& pool, const RowCall& call);
void CorrelateRows(ffi::ThreadPool& pool, const RowCall& call);

// Bytes of packed rows that a task aims at: they stay in the L2 cache, and most in L1.
constexpr int64_t kBandBytes = 128 << 10;
// Bytes of a packed row, of which longer ones are tiled.
constexpr int64_t kRowBytes = 16 << 10;
// Tasks for each thread.
constexpr int64_t kTasks = 4;

// Columns of rows that there are. Those outside are zeros, which may be there already.
struct RowWindow {
  int64_t row, rows, column, columns;
  int64_t size;  // columns that there are
  bool has_zeros;
};

// Packs them, from value `first` of `to` on.
void CopyColumns(const Kernels& kernels, int64_t period, const Tensor& tensor, const char* plane,
                 const RowWindow& window, Line* to, int64_t first, int64_t to_step);

}  // namespace jax_dwbp

#endif  // JAX_DWBP_ROW_SCHEDULE_H_
