// What meets what along one axis, for the ops by channels.
//
// Each op reads t + offset to write t, for each tap of the filter. The forward op with a stride of s
// reads s phases of x (x[s * t + phase]). Its transpose writes s phases of dx, each from the taps that
// meet it. So a stride only decides which lines are packed and where results go: the vector code sees
// dense sums.

#ifndef JAX_DWBP_CHANNEL_AXIS_H_
#define JAX_DWBP_CHANNEL_AXIS_H_

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

#include "row_axis.h"

namespace jax_dwbp {

struct AxisTap {
  int64_t k;           // in the filter
  int64_t phase;       // the index of the phase that it reads
  int64_t offset;      // reads t + offset of the phase to write t
  int64_t begin, end;  // the t that meet more than padding, as far as there are such t
  int64_t next;        // the index of the tap that reads the same to write t + 1, or -1
  bool is_next;        // of another tap

  bool Meets(int64_t t) const { return begin <= t && t < end; }
};

struct Axis {
  int64_t read_size, write_size;
  int64_t read_step = 1, write_step = 1;  // from one element of a phase to the next
  std::vector<int64_t> phases{};          // that are read
  // For each phase that is written its taps, one phase after the other, and where they start.
  std::vector<AxisTap> taps{};
  std::vector<int64_t> starts{0};
  // In the list, from a tap to the next one of the same two phases. Their offsets rise or fall alike.
  int64_t period = 1;
  bool falls = false;
  int64_t first = 0, last = 0;  // the extreme offsets

  // The t of the phase with the most of them, and those of one phase before `end`.
  int64_t Count() const { return CeilDiv(write_size, write_step); }
  int64_t Count(int64_t phase, int64_t end) const {
    return std::min(end, CeilDiv(write_size - phase, write_step));
  }
  // The elements of a phase that are read, at most.
  int64_t ReadCount() const { return CeilDiv(read_size, read_step); }
  // The element that is the `position`-th of the phase that `tap` reads.
  int64_t Element(const AxisTap& tap, int64_t position) const {
    return position * read_step + phases[tap.phase];
  }
  int64_t Span() const { return last - first; }

  int64_t WrittenPhases() const { return starts.size() - 1; }
  int64_t TapCount(int64_t phase) const { return starts[phase + 1] - starts[phase]; }
  std::span<const AxisTap> Taps(int64_t phase) const {
    return {taps.data() + starts[phase], static_cast<size_t>(TapCount(phase))};
  }

  // Adds a tap of the phase whose list is the last, by rising k.
  void Add(int64_t k, int64_t offset, int64_t read_phase);
};

// How the filter lies along an axis of the forward op: its tap k reads
// stride * p - low + dilation * k to write p.
struct Window {
  int64_t kernel, stride, low, dilation;

  int64_t Distance(int64_t k) const;
  int64_t Offset(int64_t k) const { return FloorDiv(Distance(k), stride); }
  int64_t Phase(int64_t k) const { return Distance(k) - Offset(k) * stride; }
  // From one k to the next of the same phase.
  int64_t Period() const;
};

// y[p] = sum over k of x[stride * p - low + dilation * k] * f[k]
Axis ForwardAxis(int64_t in, int64_t out, const Window& window);

// x[h] = sum over k of y[(h + low - dilation * k) / stride] * f[k] where the division is exact
Axis TransposedAxis(int64_t in, int64_t out, const Window& window);

}  // namespace jax_dwbp

#endif  // JAX_DWBP_CHANNEL_AXIS_H_
