// The vector code of the forward op and of the input gradient by channels. What vectors.h says of
// instruction sets holds here too.

#include "channel_filter.h"
#include "kernels.h"
#include "lines.h"
#include "vectors.h"

namespace jax_dwbp {
namespace {

// Filters with more columns skip those that meet only padding.
constexpr int64_t kSkip = 8;
// Lines that are fetched at once: of more, processors drop some.
constexpr int kFetched = 4;
// What has more is packed, and there the border is only an optimization.
constexpr int64_t kBorderTaps = 64;
static_assert(kInPlaceTaps <= kBorderTaps && COLUMNS <= 8);

// A part of what is read next, in the order of memory.
struct Fetch {
  const char *next, *end;

  INLINE void Some() {
    if (next >= end) return;
    UNROLL for (int l = 0; l < kFetched; ++l, next += 64) __builtin_prefetch(next, 0, 2);
  }
  INLINE void Rest() {
    while (next < end) Some();
  }
};

template <typename T, int kRows, int kColumns>
struct Sums {
  typename Vector<T>::type of[kRows][kColumns][kVectors];
};

// Of all taps of a row of the filter: the columns that meet each of them, and whether the taps, and the
// columns, read adjacent lines.
struct Reach {
  int64_t begin, end;
  bool is_adjacent;
};

// Some columns of a result, and the taps that they meet.
struct Segment {
  int64_t t;  // the first column
  const Tap *begin, *end;
  // Those that each column meets, if they read adjacent lines. They are added by kTapsAtOnce.
  const Tap *all_begin, *all_end;
  // At a border: for each tap a bit for each column where it meets more than padding and, where taps
  // are adjacent, a bit for each line that they read and that is there.
  uint8_t meets[kBorderTaps];
  uint32_t lines = 0;
};

// Adds what some taps of a row of the filter give, whose number is known and which read adjacent lines,
// of which `lines` has a bit for each that is there. Each is loaded once, for all taps and rows.
template <typename S, typename F, bool kBorder, typename T, int kRows, int kColumns>
INLINE void AddAdjacent(Sums<T, kRows, kColumns>& sums, const char* row, const T* const* weights,
                        int first, int last, const Tap* taps, uint32_t lines, const Source& in,
                        Fetch& fetch) {
  using V = typename Vector<T>::type;
  constexpr int kTaps = F::kTaps, kStride = F::kStride;
  V w[kRows][kTaps];
  const int64_t weight_step = kTaps > 1 ? (taps[1].weight - taps[0].weight) * kLanes<T> : 0;
  UNROLL for (int i = 0; i < kRows; ++i) {
    if (i < first || i > last) continue;
    const T* weight = weights[i] + taps->weight * kLanes<T>;
    UNROLL for (int k = 0; k < kTaps; ++k, weight += weight_step) {
      AS_POINTER(weight);
      w[i][k] = *reinterpret_cast<const V*>(weight);
      IN_REGISTER(w[i][k]);
    }
  }
  const char* read = row + taps->read;
  AS_POINTER(read);
  constexpr int kCount = kLines<F, kColumns>;
  UNROLL for (int l = 0; l < kCount; ++l, read += in.line_bytes) {
    // While lines are loaded that have few products.
    if (kTaps <= 3 * kStride && l % kFetched == kFetched - 1) fetch.Some();
    // What the next columns read.
    if (F::kReads && kColumns <= kFewer<F> && l >= kTaps - kStride) {
      __builtin_prefetch(read + kColumns * in.column_bytes);
    }
    if (kBorder && !(lines >> l & 1)) continue;
    V x = Load<S>(read);
    IN_REGISTER(x);
    UNROLL for (int k = 0; k < kTaps; ++k) {
      if (l < k || (l - k) % kStride || (l - k) / kStride >= kColumns) continue;
      UNROLL for (int i = 0; i < kRows; ++i) {
        if (i < first || i > last) continue;
        sums.of[i][(l - k) / kStride][0] += x * w[i][k];
      }
    }
  }
}

// Adds what a row of the filter gives to the rows `first` to `last` of the result. At a border some of
// what taps read isn't there: the products with it are left out.
template <typename S, typename F, bool kBorder, typename T, int kRows, int kColumns>
INLINE void AddRow(Sums<T, kRows, kColumns>& sums, const char* row, const T* const* weights, int first,
                   int last, const Segment& segment, const Source& in, Fetch& fetch) {
  using V = typename Vector<T>::type;
  constexpr int kStep = VECTOR_BYTES / sizeof(T);
  constexpr int kTaps = F::kTaps;
  const Tap *const begin = segment.begin, *const end = segment.end;
  if constexpr (kTaps > 0 && kVectors == 1) {
    AddAdjacent<S, F, kBorder>(sums, row, weights, first, last, begin, segment.lines, in, fetch);
  } else {
    const auto add = [&](const Tap* tap) __attribute__((always_inline)) {
      const char* read = row + tap->read;
      AS_POINTER(read);
      const uint32_t meets = kBorder ? segment.meets[tap - begin] : 0;
      UNROLL for (int v = 0; v < kVectors; ++v) {
        V w[kRows];
        UNROLL for (int i = 0; i < kRows; ++i) {
          if (i < first || i > last) continue;
          w[i] = *reinterpret_cast<const V*>(weights[i] + tap->weight * kLanes<T> + v * kStep);
        }
        UNROLL for (int j = 0; j < kColumns; ++j) {
          if (kBorder && !(meets >> j & 1)) continue;
          V x = Load<S>(read + j * in.column_bytes + v * VECTOR_BYTES);
          if (first < last) IN_REGISTER(x);
          UNROLL for (int i = 0; i < kRows; ++i) {
            if (i < first || i > last) continue;
            sums.of[i][j][v] += x * w[i];
          }
        }
      }
    };
    if constexpr (kTaps > 0) {
      UNROLL for (int k = 0; k < kTaps; ++k) add(begin + k);
    } else {
      const Tap* tap = begin;
      if constexpr (kAddsAtOnce<T, kColumns>) {
        if (segment.all_end - segment.all_begin >= kTapsAtOnce) {
          for (; tap < segment.all_begin; ++tap) add(tap);
          for (; segment.all_end - tap >= kTapsAtOnce; tap += kTapsAtOnce) {
            AddAdjacent<S, Filter<kTapsAtOnce>, false>(sums, row, weights, first, last, tap, 0, in,
                                                       fetch);
          }
        }
      }
      for (; tap < end; ++tap) add(tap);
    }
  }
}

template <typename T, int kRows, int kColumns>
INLINE void AddSums(Sums<T, kRows, kColumns>& sums, const Sums<T, kRows, kColumns>& others) {
  UNROLL for (int i = 0; i < kRows; ++i) {
    UNROLL for (int j = 0; j < kColumns; ++j) {
      UNROLL for (int v = 0; v < kVectors; ++v) sums.of[i][j][v] += others.of[i][j][v];
    }
  }
}

// What rows r = 0, 1, ... of the filter give; add(sums, r, first, last) adds one of them. Where the
// rows are known there are few of them, and no branch.
template <typename F, typename Result, int kBegin = 0, int kEnd = F::kAll, typename Add>
INLINE Result SumKnownRows(const Add& add) {
  constexpr int kChainRows = ChainRows(F::kTaps);
  constexpr int kChains = (kEnd - kBegin + kChainRows - 1) / kChainRows;
  if constexpr (kChains > 1) {
    constexpr int kMiddle = kBegin + (kChains + 1) / 2 * kChainRows;
    Result sums = SumKnownRows<F, Result, kBegin, kMiddle>(add);
    AddSums(sums, SumKnownRows<F, Result, kMiddle, kEnd>(add));
    return sums;
  } else {
    Result sums = {};
    UNROLL for (int r = kBegin; r < kEnd; ++r) {
      add(sums, r, r < F::kFirst + F::kBoth ? 0 : 1, r < F::kFirst ? 0 : 1);
    }
    return sums;
  }
}

template <int kRows, typename Result, typename Add>
INLINE Result SumRows(const Convolution& conv, int64_t chain_rows, const Add& add) {
  Result sums, pairs[kLevels];
  int64_t r = 0, chains = 0;
  for (;;) {
    sums = {};
    const auto rows_to = [&](int first, int last, int64_t to) __attribute__((always_inline)) {
      for (; r < to; ++r) add(sums, r, first, last);
    };
    const int64_t end = Min(conv.in.row_count, r + chain_rows);
    if constexpr (kRows == 1) {
      rows_to(0, 0, end);
    } else {
      rows_to(0, 0, Min(end, conv.both_begin));
      rows_to(0, 1, Min(end, conv.both_end));
      rows_to(1, 1, end);
    }
    // Like a binary counter: where a bit is set, a sum of as many chains waits for its pair.
    int level = 0;
    if (r == conv.in.row_count) {
      for (; chains >> level; ++level) {
        if (chains >> level & 1) AddSums(sums, pairs[level]);
      }
      return sums;
    }
    for (; chains >> level & 1; ++level) AddSums(sums, pairs[level]);
    pairs[level] = sums;
    ++chains;
  }
}

// Not inlined, for the registers.
template <typename S, typename F, bool kBorder, int kRows, int kColumns>
__attribute__((noinline)) void ConvolveSegment(const Convolution& convolution, const Segment& segment) {
  using T = typename Compute<S>::type;
  using Result = Sums<T, kRows, kColumns>;
  // A copy, which no result that is stored may change.
  const Convolution conv = convolution;
  const int64_t first_byte = conv.in.start_bytes + segment.t * conv.in.column_bytes;
  const int64_t chain_rows = ChainRows(Max(segment.end - segment.begin, 1));
  char* outs[kRows];
  UNROLL for (int i = 0; i < kRows; ++i) outs[i] = conv.out[i] + segment.t * conv.column_bytes;
  const int64_t stride = F::kTaps ? F::kStride : conv.in.column_bytes / conv.in.line_bytes;
  const int64_t share = conv.in.ahead.rows * stride * kLanes<T> * sizeof(S);
  Fetch fetch;
  fetch.next = fetch.end = conv.in.ahead.data + share * segment.t * conv.blocks;
  for (int64_t block = 0; block < conv.blocks; ++block) {
    fetch.end += share * kColumns;
    const int64_t read_bytes = block * conv.in.block_bytes + first_byte;
    const int64_t weight_lines = conv.weight_start + block * conv.weight_lines;
    const auto add = [&](Result& sums, int64_t r, int first, int last) __attribute__((always_inline)) {
      const T* weights[kRows];
      UNROLL for (int i = 0; i < kRows; ++i) {
        weights[i] = reinterpret_cast<const T*>(conv.weights[i][r] + weight_lines);
      }
      AddRow<S, F, kBorder>(sums, conv.in.rows[r] + read_bytes, weights, first, last, segment, conv.in,
                            fetch);
    };
    Result sums;
    if constexpr (F::kAll > 0) {
      sums = SumKnownRows<F, Result>(add);
    } else {
      sums = SumRows<kRows, Result>(conv, chain_rows, add);
    }
    fetch.Rest();
    UNROLL for (int i = 0; i < kRows; ++i) {
      char* out = outs[i] + block * conv.out_bytes;
      if (sizeof(S) == sizeof(T) && conv.store) {
        typename Vector<T>::type lines[kColumns][kVectors];
        UNROLL for (int j = 0; j < kColumns; ++j) {
          UNROLL for (int v = 0; v < kVectors; ++v) lines[j][v] = sums.of[i][j][v];
        }
        conv.store(reinterpret_cast<const Line*>(lines), kColumns, out, conv.column_bytes);
        continue;
      }
      UNROLL for (int j = 0; j < kColumns; ++j, out += conv.column_bytes) {
        AS_POINTER(out);
        // What is written next, else each line of it would be waited for.
        __builtin_prefetch(out + kColumns * conv.column_bytes, 1);
        if (conv.store) {
          StoreWholeLine<S, T>(sums.of[i][j], reinterpret_cast<S*>(out));
        } else {
          StoreWholeLine<T, T>(sums.of[i][j], reinterpret_cast<T*>(out));
        }
      }
    }
  }
}

template <typename S, typename F, int kRows, int kColumns>
INLINE void ConvolveColumns(const Convolution& conv, const Reach& reach, int64_t t) {
  using T = typename Compute<S>::type;
  Segment segment;
  segment.t = t, segment.begin = conv.taps, segment.end = conv.taps + conv.tap_count;
  const bool is_wide = conv.tap_count > kSkip;
  if (is_wide && conv.in.row_count > 0) {
    const auto misses = [=](const Tap& tap) { return tap.begin >= t + kColumns || tap.end <= t; };
    while (segment.begin < segment.end && misses(*segment.begin)) ++segment.begin;
    while (segment.begin < segment.end && misses(segment.end[-1])) --segment.end;
  }
  // What is packed has lines of zeros for the padding, but a wide filter would meet too many of them.
  const int64_t taps = segment.end - segment.begin;
  segment.all_begin = segment.begin;
  segment.all_end = reach.is_adjacent ? segment.end : segment.begin;
  const bool border = (is_wide || !conv.in.packed) && taps <= kBorderTaps &&
                      (reach.begin > t || reach.end < t + kColumns);
  if (!border) return ConvolveSegment<S, F, false, kRows, kColumns>(conv, segment);
  if constexpr (F::kTaps == 0 && kAddsAtOnce<T, kColumns>) {
    const auto is_met = [=](const Tap& tap) { return tap.begin <= t && t + kColumns <= tap.end; };
    while (segment.all_begin < segment.all_end && !is_met(*segment.all_begin)) ++segment.all_begin;
    while (segment.all_begin < segment.all_end && !is_met(segment.all_end[-1])) --segment.all_end;
  }
  for (int64_t i = 0; i < taps; ++i) {
    segment.meets[i] = 0;
    for (int j = 0; j < kColumns; ++j) {
      const bool meets = segment.begin[i].begin <= t + j && t + j < segment.begin[i].end;
      segment.meets[i] |= meets << j;
    }
  }
  if constexpr (F::kTaps > 0) {
    for (int line = 0; line < kLines<F, kColumns>; ++line) {
      // A column and a tap that meet there, as good as any.
      const int column = Min(line / F::kStride, kColumns - 1), tap = line - column * F::kStride;
      if (tap < F::kTaps) segment.lines |= uint32_t{segment.meets[tap] >> column & 1u} << line;
    }
  }
  ConvolveSegment<S, F, true, kRows, kColumns>(conv, segment);
}

// The template of a number of columns that is known when it runs.
template <typename S, typename F, int kRows, int kColumns>
void ConvolveSome(const Convolution& conv, const Reach& reach, int64_t columns, int64_t t) {
  if constexpr (kColumns > 0) {
    if (columns == kColumns) {
      // The rows are known only where that is worth the time to compile it.
      constexpr bool kKnown = 3 * kColumns > kMost<F> && sizeof(S) < 8;
      if constexpr (kKnown) {
        return ConvolveColumns<S, F, kRows, kColumns>(conv, reach, t);
      } else {
        return ConvolveColumns<S, Filter<F::kTaps, F::kStride>, kRows, kColumns>(conv, reach, t);
      }
    }
    ConvolveSome<S, F, kRows, kColumns - 1>(conv, reach, columns, t);
  }
}

template <typename S, typename F, int kRows>
void ConvolveSegments(const Convolution& conv, bool is_adjacent) {
  Reach reach{.begin = 0, .end = conv.columns, .is_adjacent = is_adjacent};
  for (const Tap* tap = conv.taps; tap < conv.taps + conv.tap_count; ++tap) {
    reach.begin = Max(reach.begin, tap->begin), reach.end = Min(reach.end, tap->end);
  }
  // Of even size. Blocks of the same columns lie side by side in the result, so that it is written in
  // one stream. What few taps read comes faster from memory where all blocks of some columns span
  // little of it.
  const int64_t most = conv.columns > 2 * kMost<F> ? kFewer<F> : kMost<F>;
  const int64_t segments = (conv.columns + most - 1) / most;
  for (int64_t i = 0; i < segments; ++i) {
    const int64_t t = i * conv.columns / segments, next = (i + 1) * conv.columns / segments;
    ConvolveSome<S, F, kRows, kMost<F>>(conv, reach, next - t, t);
  }
}

// By the first of some filters that fits.
template <typename S, int kRows, typename... Filters>
void ConvolveFilter(const Convolution& conv) {
  const bool adjacent = AreAdjacent(conv.in, conv.taps, conv.tap_count);
  const auto convolve = [&](auto filter) {
    using F = decltype(filter);
    if (F::kTaps > 0) {
      if (!adjacent || conv.tap_count != F::kTaps) return false;
      if (conv.in.column_bytes != F::kStride * conv.in.line_bytes) return false;
    }
    if (F::kAll > 0) {
      if (conv.both_begin != F::kFirst || conv.both_end != F::kFirst + F::kBoth) return false;
      if (conv.in.row_count != F::kAll) return false;
    }
    ConvolveSegments<S, F, kRows>(conv, adjacent && conv.in.column_bytes == conv.in.line_bytes);
    return true;
  };
  (convolve(Filters()) || ...);
}

template <typename S, int kRows, typename... Known>
void ConvolveKnown(const Convolution& conv) {
  ConvolveFilter<S, kRows, Known..., Filter<3>, Filter<5>, Filter<7>, Filter<3, 2>, Filter<5, 2>,
                 Filter<>>(conv);
}

template <typename S>
void Convolve(const Convolution& conv) {
  // Of float64 nothing is known, and less of half types: the time to compile that would be as long
  // again. Known are 3x3 filters, where a row of padding is above or below or none, also under a stride
  // of 2, the phases of the input gradient of 3x3 and 5x5 under a stride of 2, and what has one
  // dimension.
  if constexpr (sizeof(S) == 8) {
    if (ROWS > 1 && conv.out[1]) return ConvolveFilter<S, ROWS, Filter<>>(conv);
    ConvolveFilter<S, 1, Filter<>>(conv);
  } else if constexpr (sizeof(S) == 2) {
    if (!conv.out[1]) return ConvolveFilter<S, 1, Filter<3>, Filter<5>, Filter<>>(conv);
    ConvolveFilter<S, 2, Filter<3, 1, 1, 2, 1>, Filter<3, 1, 0, 2, 1>, Filter<3, 1, 1, 2, 0>,
                   Filter<3, 2, 2, 1, 2>, Filter<3>, Filter<5>, Filter<7>, Filter<>>(conv);
  } else if constexpr (ROWS == 1) {
    ConvolveKnown<S, 1, Filter<3, 1, 3>, Filter<3, 1, 2>, Filter<2, 1, 3>, Filter<2, 1, 2>,
                  Filter<2, 1, 1>, Filter<1, 1, 2>, Filter<1, 1, 1>, Filter<3, 2, 3>, Filter<3, 1, 1>,
                  Filter<4, 1, 1>>(conv);
  } else if (conv.out[1]) {
    ConvolveKnown<S, 2, Filter<3, 1, 1, 2, 1>, Filter<3, 1, 0, 2, 1>, Filter<3, 1, 1, 2, 0>,
                  Filter<3, 2, 2, 1, 2>, Filter<3, 1, 1, 1, 1>, Filter<2, 1, 1, 2, 1>,
                  Filter<2, 1, 1, 1, 1>, Filter<2, 1, 1, 0, 1>, Filter<1, 1, 1, 1, 1>,
                  Filter<1, 1, 1, 0, 1>>(conv);
  } else {
    ConvolveKnown<S, 1, Filter<3, 1, 2>, Filter<3, 1, 1>, Filter<4, 1, 1>>(conv);
  }
}

template <typename S>
constexpr ChannelKernels KernelsOf() {
  const auto lines = Convolve<typename Compute<S>::type>;
  if constexpr (kReadsInPlace<S>) return {ROWS, lines, Convolve<S>};
  return {ROWS, lines, nullptr};
}

}  // namespace

const ChannelKernels OF_INSTRUCTION_SET(ChannelKernels)[4] = {KernelsOf<Half>(), KernelsOf<Brain>(),
                                                              KernelsOf<float>(), KernelsOf<double>()};

}  // namespace jax_dwbp
