// The vector code, in the vector types of GCC and Clang.
//
// This file is compiled for several instruction sets and linked to one library. So all but the table has
// internal linkage, in the headers that it includes too: the linker must not take a function for a
// baseline CPU from the AVX-512 object.

#include "kernels.h"
#include "row_lanes.h"
#include "vectors.h"

// ROWS rows of COLUMNS columns of a result, and the sums of TAPS taps, are held in registers: a line
// each, in 16 registers or, with AVX-512 and on arm64, 32. 7 divides the sizes of ImageNet's feature
// maps.
#if defined(__AVX512F__)
#define ROWS 2
#define COLUMNS 7
#define TAPS 14
#elif defined(__AVX2__)
#define ROWS 1
#define COLUMNS 7
#define TAPS 7
#else
#define ROWS 1
#if defined(__aarch64__)
#define COLUMNS 6
#define TAPS 6
#else
#define COLUMNS 2
#define TAPS 2
#endif
#endif

namespace jax_dwbp {
namespace {

// Filters with more columns skip those that meet only padding.
constexpr int64_t kSkip = 8;
// Rows of the filter whose sums over columns are held in registers, where lines are loaded once for them.
constexpr int kLineRows = 3;
// Lines that are fetched at once: of more, processors drop some.
constexpr int kFetched = 4;
// What has more is packed, and there the border is only an optimization.
constexpr int64_t kBorderTaps = 64;
static_assert(kInPlaceTaps <= kBorderTaps && COLUMNS <= 8);

// The lines of a phase that are not padding.
struct Span {
  int64_t begin, end;
};

// The number of p >= 0 with stride * (first + p) + phase < size.
INLINE int64_t CountBelow(int64_t size, const Columns& columns, int64_t phase) {
  const int64_t room = size - phase - columns.stride * columns.first;
  return room <= 0 ? 0 : (room + columns.stride - 1) / columns.stride;
}

// Takes 1, 2, 4 or 8 multiples of the lanes of a line apart, by halves: loops that compilers vectorize.
template <typename S, typename T, int kMultiplier>
INLINE void Split(const S* from, T* to, int64_t plane) {
  constexpr int64_t kCount = kMultiplier * kLanes<T>;
  T buffers[2][kCount];
  for (int i = 0; i < kCount; ++i) Convert(from[i], buffers[0][i]);
  int source = 0;
  UNROLL for (int n = kMultiplier; n > 1; n /= 2, source ^= 1) {
    const T* a = buffers[source];
    T* b = buffers[source ^ 1];
    for (int i = 0; i < kCount / 2; ++i) b[i] = a[2 * i], b[i + kCount / 2] = a[2 * i + 1];
  }
  UNROLL for (int m = 0; m < kMultiplier; ++m) {
    __builtin_memcpy(to + m * plane, buffers[source] + m * kLanes<T>, sizeof(Line));
  }
}

// Puts them together again.
template <typename S, typename T, int kMultiplier>
INLINE void Join(const T* from, S* to, int64_t plane) {
  constexpr int64_t kCount = kMultiplier * kLanes<T>;
  T buffers[2][kCount];
  UNROLL for (int m = 0; m < kMultiplier; ++m) {
    __builtin_memcpy(buffers[0] + m * kLanes<T>, from + m * plane, sizeof(Line));
  }
  int source = 0;
  UNROLL for (int n = kMultiplier; n > 1; n /= 2, source ^= 1) {
    const T* a = buffers[source];
    T* b = buffers[source ^ 1];
    for (int i = 0; i < kCount / 2; ++i) b[2 * i] = a[i], b[2 * i + 1] = a[i + kCount / 2];
  }
  for (int i = 0; i < kCount; ++i) Convert(buffers[source][i], to[i]);
}

template <typename S, typename T, int kMultiplier>
INLINE void PackColumn(const Row& row, const S* from, Line* to) {
  const int64_t m_count = kMultiplier ? kMultiplier : row.multiplier;
  const int64_t tail = row.channels % kLanes<T>, plane = row.plane * kLanes<T>;
  T* line = reinterpret_cast<T*>(to);
  for (int64_t b = 0; b < row.channels / kLanes<T>; ++b) {
    if constexpr (kMultiplier == 1) {
      LoadLine(from, line);
    } else if constexpr (kMultiplier > 0) {
      Split<S, T, kMultiplier>(from, line, plane);
    } else {
      for (int64_t m = 0; m < m_count; ++m) {
        for (int64_t l = 0; l < kLanes<T>; ++l) Convert(from[l * m_count + m], line[m * plane + l]);
      }
    }
    from += kLanes<T> * m_count, line += m_count * plane;
  }
  if (!tail) return;
  if constexpr (kMultiplier == 1) return LoadUpTo(from, line, tail);
  for (int64_t m = 0; m < m_count; ++m, line += plane) {
    for (int64_t l = 0; l < kLanes<T>; ++l) line[l] = 0;
    for (int64_t l = 0; l < tail; ++l) Convert(from[l * m_count + m], line[l]);
  }
}

// Where the columns of an array have their values side by side.
template <typename S>
INLINE void PackColumns(const Row& row, const Columns& columns, int64_t phase, const Span* spans,
                        int64_t count) {
  using T = typename Compute<S>::type;
  const int64_t bytes = row.channels * row.multiplier * sizeof(S);
  int64_t last = 0;
  for (int64_t i = 0; i < count; ++i) last = Max(last, spans[i].end);
  // In the order of memory, which is read ahead. The spans begin alike, as phases are below the stride.
  for (int64_t p = spans[0].begin; p < last; ++p) {
    for (int64_t i = 0; i < count; ++i) {
      if (p >= spans[i].end) continue;
      const int64_t column = columns.stride * (columns.first + p) + columns.phases[phase + i];
      const S* from = static_cast<const S*>(row.data) + column * row.column_step;
      Line* to = row.lines + (phase + i) * columns.width + p;
      if (row.ahead > 0) {
        const char* ahead = reinterpret_cast<const char*>(from + row.ahead);
        for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(ahead + byte, 0, 2);
      }
      switch (row.multiplier) {
        case 1:
          PackColumn<S, T, 1>(row, from, to);
          break;
        case 2:
          PackColumn<S, T, 2>(row, from, to);
          break;
        case 4:
          PackColumn<S, T, 4>(row, from, to);
          break;
        case 8:
          PackColumn<S, T, 8>(row, from, to);
          break;
        default:
          PackColumn<S, T, 0>(row, from, to);
      }
    }
  }
}

// Where the values of a channel lie side by side.
template <typename S>
INLINE void PackPlanes(const Row& row, const Columns& columns, int64_t phase, const Span& span) {
  using T = typename Compute<S>::type;
  const int64_t planes = (row.channels + kLanes<T> - 1) / kLanes<T> * row.multiplier;
  const int64_t column = columns.stride * (columns.first + span.begin) + columns.phases[phase];
  const int64_t step = columns.stride * row.column_step;
  for (int64_t plane = 0; plane < planes; ++plane) {
    const int64_t block = plane / row.multiplier, m = plane % row.multiplier;
    const int64_t lanes = Min(kLanes<T>, row.channels - block * kLanes<T>);
    T* to = reinterpret_cast<T*>(row.lines + phase * columns.width + plane * row.plane);
    for (int64_t l = 0; l < kLanes<T>; ++l) {
      const int64_t depth = ((block * kLanes<T> + l) * row.multiplier + m) * row.depth_step;
      const S* values = static_cast<const S*>(row.data) + column * row.column_step + depth;
      for (int64_t p = span.begin; p < span.end; ++p, values += step) {
        if (l < lanes) {
          Convert(*values, to[p * kLanes<T> + l]);
        } else {
          to[p * kLanes<T> + l] = 0;
        }
      }
    }
  }
}

template <typename S>
void Pack(const Row& row, const Columns& columns) {
  using T = typename Compute<S>::type;
  constexpr int64_t kPhases = 8;
  const int64_t planes = (row.channels + kLanes<T> - 1) / kLanes<T> * row.multiplier;
  for (int64_t phase = 0; phase < columns.phase_count; phase += kPhases) {
    const int64_t count = Min(kPhases, columns.phase_count - phase);
    Span spans[kPhases];
    for (int64_t i = 0; i < count; ++i) {
      Span& span = spans[i];
      const int64_t start = columns.phases[phase + i];
      span.begin = Min(CountBelow(0, columns, start), columns.width);
      span.end = Max(span.begin, Min(CountBelow(columns.size, columns, start), columns.width));
      for (int64_t plane = 0; plane < planes; ++plane) {
        Line* line = row.lines + (phase + i) * columns.width + plane * row.plane;
        __builtin_memset(line, 0, span.begin * sizeof(Line));
        __builtin_memset(line + span.end, 0, (columns.width - span.end) * sizeof(Line));
      }
      if (row.depth_step != 1) PackPlanes<S>(row, columns, phase + i, span);
    }
    if (row.depth_step == 1) PackColumns<S>(row, columns, phase, spans, count);
  }
}

template <typename S>
void StoreLines(const Line* lines, int64_t columns, char* out, int64_t column_bytes) {
  using T = typename Compute<S>::type;
  for (int64_t t = 0; t < columns; ++t, out += column_bytes) {
    typename Vector<T>::type line[kVectors];
    __builtin_memcpy(line, lines + t, sizeof(line));
    StoreWholeLine<S, T>(line, reinterpret_cast<S*>(out));
  }
}

template <typename S, typename T, int kMultiplier>
INLINE void EmitColumn(const Row& row, int64_t lanes, const T* from, S* to) {
  const int64_t m_count = row.multiplier, plane = row.plane * kLanes<T>;
  if constexpr (kMultiplier == 1) {
    typename Vector<T>::type line[kVectors];
    __builtin_memcpy(line, from, sizeof(line));
    StoreLine<S, T>(line, lanes, to);
  } else if (kMultiplier > 0 && lanes == kLanes<T>) {
    Join<S, T, Max(kMultiplier, 1)>(from, to, plane);
  } else {
    for (int64_t l = 0; l < lanes; ++l) {
      for (int64_t m = 0; m < m_count; ++m) Convert(from[m * plane + l], to[l * m_count + m]);
    }
  }
}

template <typename S>
void Emit(const Row& row, int64_t columns) {
  using T = typename Compute<S>::type;
  for (int64_t b = 0; b * kLanes<T> < row.channels; ++b) {
    const int64_t lanes = Min(kLanes<T>, row.channels - b * kLanes<T>);
    const T* from = reinterpret_cast<const T*>(row.lines + b * row.multiplier * row.plane);
    S* to = static_cast<S*>(row.data) + b * kLanes<T> * row.multiplier * row.depth_step;
    if (row.depth_step == 1) {
      for (int64_t t = 0; t < columns; ++t, from += kLanes<T>, to += row.column_step) {
        switch (row.multiplier) {
          case 1:
            EmitColumn<S, T, 1>(row, lanes, from, to);
            break;
          case 2:
            EmitColumn<S, T, 2>(row, lanes, from, to);
            break;
          case 4:
            EmitColumn<S, T, 4>(row, lanes, from, to);
            break;
          case 8:
            EmitColumn<S, T, 8>(row, lanes, from, to);
            break;
          default:
            EmitColumn<S, T, 0>(row, lanes, from, to);
        }
      }
      continue;
    }
    for (int64_t l = 0; l < lanes; ++l) {
      for (int64_t m = 0; m < row.multiplier; ++m) {
        S* values = to + (l * row.multiplier + m) * row.depth_step;
        const T* lane = from + m * row.plane * kLanes<T> + l;
        for (int64_t t = 0; t < columns; ++t) {
          Convert(lane[t * kLanes<T>], values[t * row.column_step]);
        }
      }
    }
  }
}

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

// Some columns of a result, and the taps that they meet.
struct Run {
  int64_t t;  // the first column
  const Tap *begin, *end;
  // At a border: for each tap a bit for each column where it meets more than padding and, where taps
  // are adjacent, a bit for each line that they read and that is there.
  uint8_t meets[kBorderTaps];
  uint32_t lines;
};

// What is known of a filter when this is compiled, or 0: its taps, which read adjacent lines, how many
// lines the columns are apart, and the rows that only the first of two rows of the result reads, that
// both read and that only the second reads. A single row is the first.
template <int taps = 0, int stride = 1, int first = 0, int both = 0, int second = 0>
struct Filter {
  static constexpr int kTaps = taps, kStride = stride;
  // What computes least for what it reads.
  static constexpr bool kReads = taps == 3 && stride == 2 && COLUMNS > 4;
  static constexpr int kFirst = first, kBoth = both, kAll = first + both + second;
};

// One tap after the other, or the other way round: packed, the last of a phase and the first of the next
// may lie side by side too.
bool AreAdjacent(const Source& in, const Tap* taps, int64_t count) {
  bool adjacent = true;
  for (int64_t i = 1; i < count; ++i) {
    adjacent &= taps[i].read == taps[i - 1].read + in.line_bytes;
    adjacent &= taps[i].weight - taps[i - 1].weight == taps[1].weight - taps[0].weight;
  }
  return adjacent;
}

// Columns at a time, and where rows are long and taps few.
template <typename F>
constexpr int kMost = F::kReads ? 4 : COLUMNS;
template <typename F>
constexpr int kFewer = 0 < F::kTaps && F::kTaps <= 3 && kVectors == 1 ? (kMost<F> + 1) / 2 : kMost<F>;

// Lines that are read for some columns.
template <typename F, int kColumns>
constexpr int kLines = F::kStride * (kColumns - 1) + F::kTaps;

// Adds what a row of the filter gives to the rows `first` to `last` of the result. At a border some of
// what taps read isn't there: the products with it are left out.
template <typename T, typename F, bool kBorder, int kRows, int kColumns>
INLINE void AddRow(Sums<T, kRows, kColumns>& sums, const char* row, const T* const* weights, int first,
                   int last, const Run& run, const Source& in, Fetch& fetch) {
  using V = typename Vector<T>::type;
  constexpr int kStep = VECTOR_BYTES / sizeof(T);
  constexpr int kTaps = F::kTaps, kStride = F::kStride;
  const Tap *const begin = run.begin, *const end = run.end;
  if constexpr (kTaps > 0 && kVectors == 1) {
    // Each line is loaded once, for all taps and rows.
    V w[kRows][kTaps];
    const int64_t weight_step = kTaps > 1 ? (begin[1].weight - begin[0].weight) * kLanes<T> : 0;
    UNROLL for (int i = 0; i < kRows; ++i) {
      if (i < first || i > last) continue;
      const T* weight = weights[i] + begin->weight * kLanes<T>;
      UNROLL for (int k = 0; k < kTaps; ++k, weight += weight_step) {
        AS_POINTER(weight);
        w[i][k] = *reinterpret_cast<const V*>(weight);
        IN_REGISTER(w[i][k]);
      }
    }
    const char* read = row + begin->read;
    AS_POINTER(read);
    constexpr int kCount = kLines<F, kColumns>;
    UNROLL for (int l = 0; l < kCount; ++l, read += in.line_bytes) {
      // While lines are loaded that have few products.
      if (kTaps <= 3 * kStride && l % kFetched == kFetched - 1) fetch.Some();
      // What the next columns read.
      if (F::kReads && kColumns <= kFewer<F> && l >= kTaps - kStride) {
        __builtin_prefetch(read + kColumns * in.column_bytes);
      }
      if (kBorder && !(run.lines >> l & 1)) continue;
      V x = Load<T>(read);
      IN_REGISTER(x);
      UNROLL for (int k = 0; k < kTaps; ++k) {
        if (l < k || (l - k) % kStride || (l - k) / kStride >= kColumns) continue;
        UNROLL for (int i = 0; i < kRows; ++i) {
          if (i < first || i > last) continue;
          sums.of[i][(l - k) / kStride][0] += x * w[i][k];
        }
      }
    }
  } else {
    const auto add = [&](const Tap* tap) __attribute__((always_inline)) {
      const char* read = row + tap->read;
      AS_POINTER(read);
      const uint32_t meets = kBorder ? run.meets[tap - begin] : 0;
      UNROLL for (int v = 0; v < kVectors; ++v) {
        V w[kRows];
        UNROLL for (int i = 0; i < kRows; ++i) {
          if (i < first || i > last) continue;
          w[i] = *reinterpret_cast<const V*>(weights[i] + tap->weight * kLanes<T> + v * kStep);
        }
        UNROLL for (int j = 0; j < kColumns; ++j) {
          if (kBorder && !(meets >> j & 1)) continue;
          V x = Load<T>(read + j * in.column_bytes + v * VECTOR_BYTES);
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
      for (const Tap* tap = begin; tap < end; ++tap) add(tap);
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

// What rows r = 0, 1, ... of the filter give; add(sums, r, first, last) adds one of them. Where the rows
// are known there are few of them, and no branch.
template <typename F, typename Result, int kBegin = 0, int kEnd = F::kAll, typename Add>
INLINE Result SumKnownRows(const Add& add) {
  constexpr int kChainRows = ChainRows(F::kTaps), kChains = (kEnd - kBegin + kChainRows - 1) / kChainRows;
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
template <typename T, typename F, bool kBorder, int kRows, int kColumns>
__attribute__((noinline)) void ConvolveRun(const Convolution& convolution, const Run& run) {
  using Result = Sums<T, kRows, kColumns>;
  // A copy, which no result that is stored may change.
  const Convolution conv = convolution;
  const int64_t first_byte = run.t * conv.in.column_bytes;
  const int64_t chain_rows = ChainRows(Max(run.end - run.begin, 1));
  char* outs[kRows];
  UNROLL for (int i = 0; i < kRows; ++i) outs[i] = conv.out[i] + run.t * conv.column_bytes;
  const int64_t stride = F::kTaps ? F::kStride : conv.in.column_bytes / conv.in.line_bytes;
  const int64_t share = conv.in.ahead.rows * stride * 64;
  Fetch fetch;
  fetch.next = fetch.end = conv.in.ahead.data + share * run.t * conv.blocks;
  for (int64_t block = 0; block < conv.blocks; ++block) {
    fetch.end += share * kColumns;
    const int64_t read_bytes = block * conv.in.block_bytes + first_byte;
    const int64_t weight_lines = block * conv.weight_lines;
    const auto add = [&](Result& sums, int64_t r, int first, int last)
                         __attribute__((always_inline)) {
      const T* weights[kRows];
      UNROLL for (int i = 0; i < kRows; ++i) {
        weights[i] = reinterpret_cast<const T*>(conv.weights[i][r] + weight_lines);
      }
      AddRow<T, F, kBorder>(sums, conv.in.rows[r] + read_bytes, weights, first, last, run, conv.in,
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
      if (conv.store) {
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
        UNROLL for (int v = 0; v < kVectors; ++v) {
          *reinterpret_cast<typename Vector<T>::unaligned*>(out + v * VECTOR_BYTES) =
              sums.of[i][j][v];
        }
      }
    }
  }
}

template <typename T, typename F, int kRows, int kColumns>
INLINE void ConvolveColumns(const Convolution& conv, int64_t t) {
  Run run;
  run.t = t, run.begin = conv.taps, run.end = conv.taps + conv.tap_count;
  const bool is_wide = conv.tap_count > kSkip;
  if (is_wide && conv.in.row_count > 0) {
    const auto misses = [=](const Tap& tap) { return tap.begin >= t + kColumns || tap.end <= t; };
    while (run.begin < run.end && misses(*run.begin)) ++run.begin;
    while (run.begin < run.end && misses(run.end[-1])) --run.end;
  }
  // What is packed has lines of zeros for the padding, but a wide filter would meet too many of them.
  const int64_t taps = run.end - run.begin;
  bool border = false;
  for (int64_t i = 0; (is_wide || !conv.in.packed) && taps <= kBorderTaps && i < taps; ++i) {
    border |= run.begin[i].begin > t || run.begin[i].end < t + kColumns;
  }
  if (!border) return ConvolveRun<T, F, false, kRows, kColumns>(conv, run);
  for (int64_t i = 0; i < taps; ++i) {
    run.meets[i] = 0;
    for (int j = 0; j < kColumns; ++j) {
      const bool meets = run.begin[i].begin <= t + j && t + j < run.begin[i].end;
      run.meets[i] |= meets << j;
    }
  }
  run.lines = 0;
  if constexpr (F::kTaps > 0) {
    for (int line = 0; line < kLines<F, kColumns>; ++line) {
      // A column and a tap that meet there, as good as any.
      const int column = Min(line / F::kStride, kColumns - 1), tap = line - column * F::kStride;
      if (tap < F::kTaps) run.lines |= uint32_t{run.meets[tap] >> column & 1u} << line;
    }
  }
  ConvolveRun<T, F, true, kRows, kColumns>(conv, run);
}

// The template of a number of columns that is known when it runs.
template <typename T, typename F, int kRows, int kColumns>
void ConvolveSome(const Convolution& conv, int64_t columns, int64_t t) {
  if constexpr (kColumns > 0) {
    if (columns == kColumns) {
      // The rows are known only where that is worth the time to compile it.
      constexpr bool kKnown = 3 * kColumns > kMost<F> && sizeof(T) == 4;
      if constexpr (kKnown) {
        return ConvolveColumns<T, F, kRows, kColumns>(conv, t);
      } else {
        return ConvolveColumns<T, Filter<F::kTaps, F::kStride>, kRows, kColumns>(conv, t);
      }
    }
    ConvolveSome<T, F, kRows, kColumns - 1>(conv, columns, t);
  }
}

template <typename T, typename F, int kRows>
void ConvolveRows(const Convolution& conv) {
  // Of even size. Blocks of the same columns lie side by side in the result, so that it is written in
  // one stream. What few taps read comes faster from memory where all blocks of some columns span little
  // of it.
  const int64_t most = conv.columns > 2 * kMost<F> ? kFewer<F> : kMost<F>;
  const int64_t groups = (conv.columns + most - 1) / most;
  for (int64_t i = 0; i < groups; ++i) {
    const int64_t t = i * conv.columns / groups, next = (i + 1) * conv.columns / groups;
    ConvolveSome<T, F, kRows, kMost<F>>(conv, next - t, t);
  }
}

// By the first of some filters that fits.
template <typename T, int kRows, typename... Filters>
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
    ConvolveRows<T, F, kRows>(conv);
    return true;
  };
  (convolve(Filters()) || ...);
}

template <typename T, int kRows, typename... Known>
void ConvolveKnown(const Convolution& conv) {
  ConvolveFilter<T, kRows, Known..., Filter<3>, Filter<5>, Filter<7>, Filter<3, 2>, Filter<5, 2>,
                 Filter<>>(conv);
}

template <typename T>
void Convolve(const Convolution& conv) {
  // Known are 3x3 filters, where a row of padding is above or below or none, also under a stride of 2,
  // the phases of the input gradient of 3x3 and 5x5 under a stride of 2, and what has one dimension.
  if constexpr (ROWS == 1) {
    ConvolveKnown<T, 1, Filter<3, 1, 3>, Filter<3, 1, 2>, Filter<2, 1, 3>, Filter<2, 1, 2>,
                  Filter<2, 1, 1>, Filter<1, 1, 2>, Filter<1, 1, 1>, Filter<3, 2, 3>, Filter<3, 1, 1>,
                  Filter<4, 1, 1>>(conv);
  } else if (conv.out[1]) {
    ConvolveKnown<T, 2, Filter<3, 1, 1, 2, 1>, Filter<3, 1, 0, 2, 1>, Filter<3, 1, 1, 2, 0>,
                  Filter<3, 2, 2, 1, 2>, Filter<3, 1, 1, 1, 1>, Filter<2, 1, 1, 2, 1>,
                  Filter<2, 1, 1, 1, 1>, Filter<2, 1, 1, 0, 1>, Filter<1, 1, 1, 1, 1>,
                  Filter<1, 1, 1, 0, 1>>(conv);
  } else {
    ConvolveKnown<T, 1, Filter<3, 1, 2>, Filter<3, 1, 1>, Filter<4, 1, 1>>(conv);
  }
}

// All that a block reads next.
INLINE void Prefetch(const Source& source, int64_t columns, int64_t block) {
  const int64_t bytes = source.ahead.rows * (source.column_bytes / source.line_bytes) * columns * 64;
  const char* line = source.ahead.data + block * bytes;
  for (const char* const end = line + bytes; line < end; line += 64) __builtin_prefetch(line, 0, 2);
}

// Taps that are summed at once, of one block of channels.
template <typename T>
struct Group {
  const char* reads[TAPS];
  T* sums[TAPS];
  int64_t begin, end;          // from the first to the last column of any
  int64_t all_begin, all_end;  // the columns of all, or of what is packed
  uint32_t meet[kReductionColumns + 1];  // a bit for each tap that meets the column
};

template <typename T, int kTaps>
INLINE void CorrelateTaps(const Correlation& corr, const Group<T>& group, int64_t block) {
  using V = typename Vector<T>::type;
  constexpr int kStep = VECTOR_BYTES / sizeof(T);
  const char* const dy = *corr.dy.rows + block * corr.dy.block_bytes;
  V sums[kTaps][kVectors] = {};
  const auto add = [&](int64_t t, auto check) __attribute__((always_inline)) {
    V u[kVectors];
    UNROLL for (int v = 0; v < kVectors; ++v) {
      u[v] = Load<T>(dy + t * corr.dy.column_bytes + v * VECTOR_BYTES);
    }
    const int64_t offset = block * corr.in.block_bytes + t * corr.in.column_bytes;
    UNROLL for (int i = 0; i < kTaps; ++i) {
      if (decltype(check)::value && !(group.meet[t] >> i & 1)) continue;
      UNROLL for (int v = 0; v < kVectors; ++v) {
        sums[i][v] += Load<T>(group.reads[i] + offset + v * VECTOR_BYTES) * u[v];
      }
    }
  };
  int64_t t = group.begin;
  for (; t < Min(group.all_begin, group.end); ++t) add(t, Index<1>());
  for (; t < group.all_end; ++t) add(t, Index<0>());
  for (; t < group.end; ++t) add(t, Index<1>());
  UNROLL for (int i = 0; i < kTaps; ++i) {
    T* const sum = group.sums[i] + block * corr.sum_lines * kLanes<T>;
    UNROLL for (int v = 0; v < kVectors; ++v) *reinterpret_cast<V*>(sum + v * kStep) += sums[i][v];
  }
}

template <typename T, int kTaps>
void CorrelateSome(const Correlation& corr, const Group<T>& group, int64_t count, bool prefetch) {
  if constexpr (kTaps > 0) {
    if (count != kTaps) return CorrelateSome<T, kTaps - 1>(corr, group, count, prefetch);
    for (int64_t block = 0; block < corr.blocks; ++block) {
      if (prefetch) {
        Prefetch(corr.in, corr.columns, block);
        Prefetch(corr.dy, corr.columns, block);
      }
      CorrelateTaps<T, kTaps>(corr, group, block);
    }
  }
}

// The sums of kRows rows of the filter, over `groups` times kColumns columns. Each line is loaded once, for
// all its taps; `lines` has a bit for each that is there, for each group.
template <typename T, typename F, int kRows, int kColumns>
void CorrelateLines(const Correlation& corr, int64_t row, int64_t t, int64_t groups,
                    const uint32_t* lines) {
  using V = typename Vector<T>::type;
  constexpr int kTaps = F::kTaps, kCount = kLines<F, kColumns>;
  for (int64_t block = 0; block < corr.blocks; ++block) {
    if (row == 0 && t == 0) {
      Prefetch(corr.in, corr.columns, block);
      Prefetch(corr.dy, corr.columns, block);
    }
    const char* dy = *corr.dy.rows + block * corr.dy.block_bytes + t * corr.dy.column_bytes;
    int64_t read_bytes =
        corr.taps->read + block * corr.in.block_bytes + t * corr.in.column_bytes;
    V sums[kRows][kTaps] = {};
    for (int64_t g = 0; g < groups; ++g, read_bytes += kColumns * corr.in.column_bytes) {
      V u[kColumns];
      UNROLL for (int j = 0; j < kColumns; ++j, dy += corr.dy.column_bytes) {
        AS_POINTER(dy);
        u[j] = Load<T>(dy);
        IN_REGISTER(u[j]);
      }
      UNROLL for (int i = 0; i < kRows; ++i) {
        const char* read = corr.in.rows[row + i] + read_bytes;
        UNROLL for (int l = 0; l < kCount; ++l, read += corr.in.line_bytes) {
          AS_POINTER(read);
          if (!(lines[g] >> l & 1)) continue;
          V x = Load<T>(read);
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
        T* const sum = reinterpret_cast<T*>(corr.sums[row + i] + corr.taps[k].weight +
                                            block * corr.sum_lines);
        *reinterpret_cast<V*>(sum) += sums[i][k];
      }
    }
  }
}

// The template of numbers that are known when it runs.
template <typename T, typename F, int kRows = kLineRows, int kColumns = COLUMNS, typename... Args>
void CorrelateSomeLines(int64_t rows, int64_t columns, const Args&... args) {
  // No group has less than half of the most columns.
  if constexpr (kRows > 0 && 2 * kColumns >= COLUMNS) {
    if (rows != kRows) return CorrelateSomeLines<T, F, kRows - 1, kColumns>(rows, columns, args...);
    if (columns != kColumns) {
      return CorrelateSomeLines<T, F, kRows, kColumns - 1>(rows, columns, args...);
    }
    CorrelateLines<T, F, kRows, kColumns>(args...);
  }
}

template <typename T, typename F>
void CorrelateFilter(const Correlation& corr) {
  // Of two sizes, first the larger one.
  const int64_t groups = (corr.columns + COLUMNS - 1) / COLUMNS;
  const int64_t columns = (corr.columns + groups - 1) / groups;
  const int64_t wide = corr.columns - (columns - 1) * groups;
  // The lines that are there, counted from the first that column 0 meets.
  int64_t begin = F::kStride * corr.columns + F::kTaps, end = 0;
  for (int64_t k = 0; k < F::kTaps; ++k) {
    const Tap& tap = corr.taps[k];
    if (tap.begin >= tap.end) continue;
    begin = Min(begin, F::kStride * tap.begin + k);
    end = Max(end, F::kStride * (tap.end - 1) + k + 1);
  }
  uint32_t lines[kReductionColumns / COLUMNS + 1];
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t first = F::kStride * (g * columns - Max(g - wide, 0));
    const auto below = [](int64_t line) { return (uint64_t{1} << Max(Min(line, 32), 0)) - 1; };
    lines[g] = below(end - first) & ~below(begin - first);
  }
  const int64_t rows = corr.in.row_count, parts = (rows + kLineRows - 1) / kLineRows;
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t row = part * rows / parts, count = (part + 1) * rows / parts - row;
    CorrelateSomeLines<T, F>(count, columns, corr, row, int64_t{0}, wide, lines);
    if (wide == groups) continue;
    CorrelateSomeLines<T, F>(count, columns - 1, corr, row, wide * columns, groups - wide,
                             lines + wide);
  }
}

template <typename T>
void CorrelateGroups(const Correlation& corr) {
  const int64_t taps = corr.in.row_count * corr.tap_count;
  const int64_t groups = (taps + TAPS - 1) / TAPS;
  const Tap *tap = corr.taps, *const end = corr.taps + corr.tap_count;
  int64_t row = 0;
  for (int64_t g = 0; g < groups; ++g) {
    // Of even size.
    const int64_t count = (g + 1) * taps / groups - g * taps / groups;
    Group<T> group;
    group.begin = group.all_begin = tap->begin, group.end = group.all_end = tap->end;
    // First what changes from one column to the next, then what has come of it.
    for (int64_t t = 0; !corr.in.packed && t <= corr.columns; ++t) group.meet[t] = 0;
    for (int64_t i = 0; i < count; ++i) {
      group.reads[i] = corr.in.rows[row] + tap->read;
      group.sums[i] = reinterpret_cast<T*>(corr.sums[row] + tap->weight);
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
    CorrelateSome<T, TAPS>(corr, group, count, g == 0);
  }
}

template <typename T, typename... Filters>
bool CorrelateByLines(const Correlation& corr) {
  const auto correlate = [&](auto filter) {
    using F = decltype(filter);
    if (corr.tap_count != F::kTaps || corr.in.column_bytes != F::kStride * corr.in.line_bytes) {
      return false;
    }
    CorrelateFilter<T, F>(corr);
    return true;
  };
  return AreAdjacent(corr.in, corr.taps, corr.tap_count) && (correlate(Filters()) || ...);
}

template <typename T>
void Correlate(const Correlation& corr) {
  if constexpr (kVectors == 1 && sizeof(T) == 4) {
    if (2 * corr.columns > COLUMNS &&
        CorrelateByLines<T, Filter<3>, Filter<5>, Filter<7>, Filter<5, 2>>(corr)) {
      return;
    }
  }
  CorrelateGroups<T>(corr);
}

template <typename T>
void Add(Line* a, const Line* b, int64_t lines) {
  T* to = reinterpret_cast<T*>(a);
  const T* from = reinterpret_cast<const T*>(b);
  for (int64_t i = 0; i < lines * static_cast<int64_t>(64 / sizeof(T)); ++i) to[i] += from[i];
}

template <typename S>
constexpr Kernels Table(Type type) {
  using T = typename Compute<S>::type;
  const int index = static_cast<int>(type);
  return {kLanes<T>,
          sizeof(S),
          ROWS,
          Pack<S>,
          Emit<S>,
          StoreLines<S>,
          Convolve<T>,
          Correlate<T>,
          Add<T>,
          &OF_INSTRUCTION_SET(RowMoves)[index],
          &OF_INSTRUCTION_SET(RowKernels)[index],
          &OF_INSTRUCTION_SET(RowSums)[index]};
}

constexpr Kernels kTables[] = {Table<Half>(Type::kFloat16), Table<Brain>(Type::kBFloat16),
                               Table<float>(Type::kFloat32), Table<double>(Type::kFloat64)};

}  // namespace

const Kernels& OF_INSTRUCTION_SET(Kernels)(Type type) { return kTables[static_cast<int>(type)]; }

}  // namespace jax_dwbp
