// The ops by rows: what is packed and computed when.

#ifndef JAX_DWBP_ROW_SCHEDULE_H_
#define JAX_DWBP_ROW_SCHEDULE_H_

#include <new>
#include <numeric>

#include "depth_axis.h"
#include "row_axis.h"
#include "row_lanes.h"
#include "runtime.h"

namespace jax_dwbp {

// A forward op, or an input gradient, which is a transposed one of the filter with flipped slices.
// For a filter gradient `in` is the input and `out` the gradient by the result.
//
// Of a depth multiplier each value of the input is repeated as often as it has results or, where these
// are planes of their own, read for each of them. An input gradient is a sum of as many sources.
struct RowCall {
  const Kernels& kernels;
  Sizes sizes;
  bool channels_first, is_transposed;
  DepthAxis depth;
  RowAxis rows, columns;
  Tensor in, filter, out;

  int64_t Sources() const { return is_transposed ? sizes.multiplier : 1; }
  int64_t Repeats() const { return is_transposed || channels_first ? 1 : sizes.multiplier; }
  // Values of a pixel that lie side by side, with weights of their own, and planes of an image, each of
  // them of all slices.
  int64_t Period() const { return channels_first ? 1 : sizes.channels * Repeats(); }
  // From one line of a row to the next that has the same weights, and how many have weights of their
  // own.
  int64_t LineStep() const;
  int64_t Variants() const { return CeilDiv(LineStep(), kernels.lanes); }
  int64_t Planes() const {
    return channels_first ? sizes.channels * (is_transposed ? 1 : sizes.multiplier) : 1;
  }
  int64_t Taps() const { return depth.kernel * sizes.SliceTaps(); }
  // Of all planes, of all problems.
  int64_t Slices() const { return sizes.problems * sizes.batch * Planes() * depth.out; }
  // Of a plane: the first elements of what it reads, of its weights and of its result.
  int64_t InPlane(int64_t plane) const {
    return (is_transposed ? plane * sizes.multiplier : plane / sizes.multiplier) * in.channel;
  }
  int64_t FilterPlane(int64_t plane) const { return plane * Sources(); }
  int64_t OutPlane(int64_t plane) const { return plane * out.channel; }
  // What is packed for a slice of the result: the sources of each tap of the depth.
  int64_t AllSources() const { return depth.kernel * Sources(); }
  // From one source of a slice to the next.
  int64_t SourceStep() const { return channels_first ? in.channel : 1; }
  // How a pixel is packed whose values are repeated so often.
  RowPixels InPixels(int64_t repeats) const {
    return {Period() / Repeats() * repeats, repeats, channels_first ? 1 : Sources(), in.column};
  }
  // That for the forward op: the vector code may repeat values as it reads them.
  int64_t PackedRepeats() const;
  // From one tap of the filter to the next, and from one value of it to the next that is of the same
  // source.
  int64_t TapStep() const { return sizes.channels * sizes.multiplier; }
  int64_t ValueStep() const { return Sources(); }
  // Whether no rows of the result are computed together, as none meet the same rows.
  bool ByRow() const { return rows.MostTaps() == 1 || rows.OutSize(0) <= rows.dilation; }
  // The taps of the filter, in the order in which they are packed: slice by slice.
  std::vector<int64_t> Order() const;
};

void ConvolveRows(ffi::ThreadPool& pool, const RowCall& call);
void CorrelateRows(ffi::ThreadPool& pool, const RowCall& call);
// The lines of scratch that a thread takes for the latter.
int64_t CorrelationLines(const RowCall& call);

// Lines that have weights of their own, at most.
constexpr int64_t kMostVariants = 16;
// Bytes of packed rows that a task aims at: they stay in the L2 cache, and most in L1.
constexpr int64_t kBandBytes = 128 << 10;
// Bytes of a packed row, of which longer ones are tiled.
constexpr int64_t kRowBytes = 16 << 10;
// Tasks for each thread.
constexpr int64_t kTasks = 4;

// A list in memory that is there: what a task lists takes none of its own.
template <typename T>
class ListIn {
 public:
  static int64_t Lines(int64_t count) {
    return CeilDiv(count * static_cast<int64_t>(sizeof(T)), sizeof(Line));
  }
  explicit ListIn(Line* memory) : items_(reinterpret_cast<T*>(memory)) {}

  void Add(const T& item) { new (items_ + size_++) T(item); }
  void Clear() { size_ = 0; }
  int64_t Size() const { return size_; }
  T* begin() { return items_; }
  T* end() { return items_ + size_; }

 private:
  T* items_;
  int64_t size_ = 0;
};

// Rows that there are, and columns of a phase, of which those outside are zeros.
struct RowWindow {
  int64_t row, row_step, rows;
  int64_t phase, column_step, column, columns;
  int64_t size;  // columns of the phase that there are

  int64_t Begin() const;                      // columns before the first that there is
  int64_t First(const Tensor& tensor) const;  // elements to that one
};

// How they are packed, from value `first` of `to` on. From where is left open.
RowCopy CopyOf(const RowWindow& window, RowPixels pixels, int64_t row_step, Line* to, int64_t first,
               int64_t to_step);

}  // namespace jax_dwbp

#endif  // JAX_DWBP_ROW_SCHEDULE_H_
