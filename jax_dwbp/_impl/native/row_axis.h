// What meets what along one axis, for the ops by rows.

#ifndef JAX_DWBP_ROW_AXIS_H_
#define JAX_DWBP_ROW_AXIS_H_

#include <algorithm>
#include <cstdint>
#include <vector>

namespace jax_dwbp {

inline int64_t CeilDiv(int64_t a, int64_t b) { return a / b + (a % b > 0); }
inline int64_t RoundUp(int64_t a, int64_t b) { return CeilDiv(a, b) * b; }
inline int64_t FloorDiv(int64_t a, int64_t b) { return a / b - (a % b < 0); }

// Larger strides are not for rows, nor are multipliers of which more has to be added.
constexpr int64_t kMostPhases = 16;
constexpr int64_t kMostPieces = 64;

// So few that they need no memory of their own.
template <typename T>
class Few {
 public:
  void Add(const T& item) { items_[size_++] = item; }
  int64_t Size() const { return size_; }
  const T& operator[](int64_t i) const { return items_[i]; }
  const T* begin() const { return items_; }
  const T* end() const { return items_ + size_; }
  T* begin() { return items_; }
  T* end() { return items_ + size_; }

 private:
  T items_[kMostPhases];
  int64_t size_ = 0;
};

// Taps of the filter that meet the same phase: under a stride of 2 every second one, as dilation has
// it.
struct RowTaps {
  int64_t first, count;
  int64_t phase;   // of what is read or, transposed, of what is written
  int64_t offset;  // the first of them reads t + offset in its phase, to write t of its phase
};

// What is packed of a phase of what is read, to write t: t + first to t + first + extra.
struct RowRegion {
  int64_t phase, first, extra;
};

// Tap k reads first + stride * t + dilation * k to write t or, transposed, (first + t + dilation * k) /
// stride where that is whole. Phases of what is read or, transposed, of what is written make of it sums
// without a stride, each of some of the taps.
struct RowAxis {
  int64_t in, out, kernel;
  int64_t read_step, write_step;  // the stride and 1, or 1 and the stride
  int64_t tap_step;               // from one of some taps to the next of them
  int64_t dilation;               // by which the latter reads further on
  Few<RowTaps> taps;              // each tap is in one of these; none if there would be too many
  Few<RowRegion> regions;         // the one of taps i is the i-th or the only one
  int64_t extra;                  // of all regions

  RowAxis(int64_t in, int64_t out, int64_t kernel, int64_t dilation, int64_t first, int64_t stride,
          bool is_transposed);

  int64_t InSize(int64_t phase) const { return std::max<int64_t>(CeilDiv(in - phase, read_step), 0); }
  int64_t OutSize(int64_t phase) const { return CeilDiv(out - phase, write_step); }
  int64_t OutPhases() const { return std::min(write_step, out); }
  // Taps of one phase, at most.
  int64_t MostTaps() const { return taps[0].count; }

  // What is packed to write so many t, where of that a region starts, and what the first of taps i
  // reads.
  int64_t Packed(int64_t count) const { return regions.Size() * count + extra; }
  // The t for which so much is packed, but no fewer than are packed for their sake alone.
  int64_t Fitting(int64_t packed) const {
    return std::max<int64_t>((packed - extra) / regions.Size(), Least());
  }
  int64_t Least() const { return extra / regions.Size() + 1; }
  int64_t Start(int64_t region, int64_t count) const;
  int64_t Read(int64_t i, int64_t count) const;

  // Those of `taps` from which a phase of the result comes.
  struct Range {
    int64_t begin, end;
  };
  Range Meeting(int64_t out_phase) const;
  // All of the taps, those of each phase one after the other, and how many come before taps i.
  std::vector<int64_t> Order() const;
  int64_t Before(int64_t i) const;
};

}  // namespace jax_dwbp

#endif  // JAX_DWBP_ROW_AXIS_H_
