// The vector code of filter gradients by channels. What vectors.h says of instruction sets holds here
// too.

#include "channel_filter.h"
#include "kernels.h"
#include "vectors.h"

namespace jax_dwbp {
namespace {

// Rows of the filter whose sums over columns are held in registers: lines are loaded once for them.
constexpr int kLineRows = 3;

// All that a block reads next.
template <typename S>
INLINE void Prefetch(const Source& source, int64_t columns, int64_t block) {
  constexpr int64_t kLineBytes = kLanes<typename Compute<S>::type> * sizeof(S);
  const int64_t bytes =
      source.ahead.rows * (source.column_bytes / source.line_bytes) * columns * kLineBytes;
  const char* line = source.ahead.data + block * bytes;
  for (const char* const end = line + bytes; line < end; line += 64) __builtin_prefetch(line, 0, 2);
}

// Taps that are summed at once, of one block of channels.
template <typename T>
struct TapGroup {
  const char* reads[TAPS];
  T* sums[TAPS];
  int64_t begin, end;          // from the first to the last column of any
  int64_t all_begin, all_end;  // the columns of all, or of what is packed
  // For each column a bit for each tap that meets it.
  uint32_t meet[kReductionColumns + 1];
};

template <typename S, int kTaps, typename T>
INLINE void CorrelateTaps(const Correlation& corr, const TapGroup<T>& group, int64_t block) {
  using V = typename Vector<T>::type;
  constexpr int kStep = VECTOR_BYTES / sizeof(T);
  const char* const dy = *corr.dy.rows + corr.dy.start_bytes + block * corr.dy.block_bytes;
  V sums[kTaps][kVectors] = {};
  const auto add = [&](int64_t t, auto check) __attribute__((always_inline)) {
    V u[kVectors];
    UNROLL for (int v = 0; v < kVectors; ++v) {
      u[v] = Load<S>(dy + t * corr.dy.column_bytes + v * VECTOR_BYTES);
    }
    const int64_t offset = block * corr.in.block_bytes + t * corr.in.column_bytes;
    UNROLL for (int i = 0; i < kTaps; ++i) {
      if (decltype(check)::value && !(group.meet[t] >> i & 1)) continue;
      UNROLL for (int v = 0; v < kVectors; ++v) {
        sums[i][v] += Load<S>(group.reads[i] + offset + v * VECTOR_BYTES) * u[v];
      }
    }
  };
  int64_t t = group.begin;
  for (; t < Min(group.all_begin, group.end); ++t) add(t, Index<1>());
  for (; t < group.all_end; ++t) add(t, Index<0>());
  for (; t < group.end; ++t) add(t, Index<1>());
  UNROLL for (int i = 0; i < kTaps; ++i) {
    T* const sum = group.sums[i] + block * corr.sum_lines * kLanes<T>;
    UNROLL for (int v = 0; v < kVectors; ++v) { *reinterpret_cast<V*>(sum + v * kStep) += sums[i][v]; }
  }
}

template <typename S, int kTaps, typename T>
void CorrelateSome(const Correlation& corr, const TapGroup<T>& group, int64_t count, bool prefetch) {
  if constexpr (kTaps > 0) {
    if (count != kTaps) return CorrelateSome<S, kTaps - 1>(corr, group, count, prefetch);
    for (int64_t block = 0; block < corr.blocks; ++block) {
      if (prefetch) {
        Prefetch<S>(corr.in, corr.columns, block);
        Prefetch<S>(corr.dy, corr.columns, block);
      }
      CorrelateTaps<S, kTaps>(corr, group, block);
    }
  }
}

// The sums of kRows rows of the filter, over `segments` times kColumns columns. Each line is loaded
// once, for all its taps; `lines` has a bit for each that is there, for each segment.
template <typename S, typename F, int kRows, int kColumns>
void CorrelateLines(const Correlation& corr, int64_t row, int64_t t, int64_t segments,
                    const uint32_t* lines) {
  using T = typename Compute<S>::type;
  using V = typename Vector<T>::type;
  constexpr int kTaps = F::kTaps, kCount = kLines<F, kColumns>;
  for (int64_t block = 0; block < corr.blocks; ++block) {
    if (row == 0 && t == 0) {
      Prefetch<S>(corr.in, corr.columns, block);
      Prefetch<S>(corr.dy, corr.columns, block);
    }
    const char* dy =
        *corr.dy.rows + corr.dy.start_bytes + block * corr.dy.block_bytes + t * corr.dy.column_bytes;
    int64_t read_bytes =
        corr.in.start_bytes + corr.taps->read + block * corr.in.block_bytes + t * corr.in.column_bytes;
    V sums[kRows][kTaps] = {};
    for (int64_t s = 0; s < segments; ++s, read_bytes += kColumns * corr.in.column_bytes) {
      V u[kColumns];
      UNROLL for (int j = 0; j < kColumns; ++j, dy += corr.dy.column_bytes) {
        AS_POINTER(dy);
        u[j] = Load<S>(dy);
        IN_REGISTER(u[j]);
      }
      UNROLL for (int i = 0; i < kRows; ++i) {
        const char* read = corr.in.rows[row + i] + read_bytes;
        UNROLL for (int l = 0; l < kCount; ++l, read += corr.in.line_bytes) {
          AS_POINTER(read);
          if (!(lines[s] >> l & 1)) continue;
          V x = Load<S>(read);
          IN_REGISTER(x);
          UNROLL for (int k = 0; k < kTaps; ++k) {
            if (l < k || (l - k) % F::kStride || (l - k) / F::kStride >= kColumns) continue;
            sums[i][k] += x * u[(l - k) / F::kStride];
          }
        }
      }
    }
    UNROLL for (int i = 0; i < kRows; ++i) {
      UNROLL for (int k = 0; k < kTaps; ++k) {
        T* const sum = reinterpret_cast<T*>(corr.sums[row + i] + corr.sum_start + corr.taps[k].weight +
                                            block * corr.sum_lines);
        *reinterpret_cast<V*>(sum) += sums[i][k];
      }
    }
  }
}

// The template of numbers that are known when it runs.
template <typename S, typename F, int kRows = kLineRows, int kColumns = COLUMNS, typename... Args>
void CorrelateSomeLines(int64_t rows, int64_t columns, const Args&... args) {
  // No segment has less than half of the most columns.
  if constexpr (kRows > 0 && 2 * kColumns >= COLUMNS) {
    if (rows != kRows) return CorrelateSomeLines<S, F, kRows - 1, kColumns>(rows, columns, args...);
    if (columns != kColumns) {
      return CorrelateSomeLines<S, F, kRows, kColumns - 1>(rows, columns, args...);
    }
    CorrelateLines<S, F, kRows, kColumns>(args...);
  }
}

template <typename S, typename F>
void CorrelateFilter(const Correlation& corr) {
  // Of two sizes, first the larger one.
  const int64_t segments = (corr.columns + COLUMNS - 1) / COLUMNS;
  const int64_t columns = (corr.columns + segments - 1) / segments;
  const int64_t wide = corr.columns - (columns - 1) * segments;
  // The lines that are there, counted from the first that column 0 meets.
  int64_t begin = F::kStride * corr.columns + F::kTaps, end = 0;
  for (int64_t k = 0; k < F::kTaps; ++k) {
    const Tap& tap = corr.taps[k];
    if (tap.begin >= tap.end) continue;
    begin = Min(begin, F::kStride * tap.begin + k);
    end = Max(end, F::kStride * (tap.end - 1) + k + 1);
  }
  uint32_t lines[kReductionColumns / COLUMNS + 1];
  for (int64_t s = 0; s < segments; ++s) {
    const int64_t first = F::kStride * (s * columns - Max(s - wide, 0));
    const auto below = [](int64_t line) { return (uint64_t{1} << Max(Min(line, 32), 0)) - 1; };
    lines[s] = below(end - first) & ~below(begin - first);
  }
  const int64_t rows = corr.in.row_count, parts = (rows + kLineRows - 1) / kLineRows;
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t row = part * rows / parts, count = (part + 1) * rows / parts - row;
    CorrelateSomeLines<S, F>(count, columns, corr, row, int64_t{0}, wide, lines);
    if (wide == segments) continue;
    CorrelateSomeLines<S, F>(count, columns - 1, corr, row, wide * columns, segments - wide,
                             lines + wide);
  }
}

template <typename S>
void CorrelateGroups(const Correlation& corr) {
  using T = typename Compute<S>::type;
  const int64_t taps = corr.in.row_count * corr.tap_count;
  const int64_t groups = (taps + TAPS - 1) / TAPS;
  const Tap *tap = corr.taps, *const end = corr.taps + corr.tap_count;
  int64_t row = 0;
  for (int64_t g = 0; g < groups; ++g) {
    // Of even size.
    const int64_t count = (g + 1) * taps / groups - g * taps / groups;
    TapGroup<T> group;
    group.begin = group.all_begin = tap->begin, group.end = group.all_end = tap->end;
    // First what changes from one column to the next, then what has come of it.
    for (int64_t t = 0; !corr.in.packed && t <= corr.columns; ++t) group.meet[t] = 0;
    for (int64_t i = 0; i < count; ++i) {
      group.reads[i] = corr.in.rows[row] + corr.in.start_bytes + tap->read;
      group.sums[i] = reinterpret_cast<T*>(corr.sums[row] + corr.sum_start + tap->weight);
      group.begin = Min(group.begin, tap->begin);
      group.end = Max(group.end, tap->end);
      group.all_begin = Max(group.all_begin, tap->begin);
      group.all_end = Min(group.all_end, tap->end);
      if (!corr.in.packed) {
        group.meet[tap->begin] ^= uint32_t{1} << i;
        group.meet[tap->end] ^= uint32_t{1} << i;
      }
      if (++tap == end) tap = corr.taps, ++row;
    }
    for (int64_t t = 1; !corr.in.packed && t < corr.columns; ++t) group.meet[t] ^= group.meet[t - 1];
    if (corr.in.packed) group.all_begin = group.begin, group.all_end = group.end;
    CorrelateSome<S, TAPS>(corr, group, count, g == 0);
  }
}

template <typename S, typename... Filters>
bool CorrelateByLines(const Correlation& corr) {
  const auto correlate = [&](auto filter) {
    using F = decltype(filter);
    if (corr.tap_count != F::kTaps || corr.in.column_bytes != F::kStride * corr.in.line_bytes) {
      return false;
    }
    CorrelateFilter<S, F>(corr);
    return true;
  };
  return AreAdjacent(corr.in, corr.taps, corr.tap_count) && (correlate(Filters()) || ...);
}

template <typename S>
void Correlate(const Correlation& corr) {
  if constexpr (kVectors == 1 && sizeof(S) < 8) {
    if (2 * corr.columns > COLUMNS &&
        CorrelateByLines<S, Filter<3>, Filter<5>, Filter<7>, Filter<5, 2>>(corr)) {
      return;
    }
  }
  CorrelateGroups<S>(corr);
}

template <typename S>
constexpr ChannelSums SumsOf() {
  const auto lines = Correlate<typename Compute<S>::type>;
  if constexpr (kReadsInPlace<S>) return {lines, Correlate<S>};
  return {lines, nullptr};
}

}  // namespace

const ChannelSums OF_INSTRUCTION_SET(ChannelSums)[4] = {SumsOf<Half>(), SumsOf<Brain>(),
                                                        SumsOf<float>(), SumsOf<double>()};

}  // namespace jax_dwbp
