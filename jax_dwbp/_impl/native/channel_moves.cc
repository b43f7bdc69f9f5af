// What is packed to lines of channels and emitted from them. What vectors.h says of instruction sets
// holds here too.

#include "channel_planes.h"
#include "kernels.h"
#include "lines.h"
#include "vectors.h"

namespace jax_dwbp {
namespace {

// The lines of a phase that are not padding.
struct Span {
  int64_t begin, end;
};

// The number of p >= 0 with stride * (first + p) + phase < size.
INLINE int64_t CountBelow(int64_t size, const PackedColumns& columns, int64_t phase) {
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
INLINE void PackColumn(const ChannelCopy& copy, const S* from, Line* to) {
  const int64_t m_count = kMultiplier ? kMultiplier : copy.multiplier;
  const int64_t tail = copy.channels % kLanes<T>, plane = copy.plane * kLanes<T>;
  T* line = reinterpret_cast<T*>(to);
  for (int64_t b = 0; b < copy.channels / kLanes<T>; ++b) {
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
INLINE void PackColumns(const ChannelCopy& copy, const PackedColumns& columns, int64_t phase,
                        const Span* spans, int64_t count) {
  using T = typename Compute<S>::type;
  const int64_t bytes = copy.channels * copy.multiplier * sizeof(S);
  int64_t last = 0;
  for (int64_t i = 0; i < count; ++i) last = Max(last, spans[i].end);
  // In the order of memory, which is read ahead. The spans begin alike, as phases are below the stride.
  for (int64_t p = spans[0].begin; p < last; ++p) {
    for (int64_t i = 0; i < count; ++i) {
      if (p >= spans[i].end) continue;
      const int64_t column = columns.stride * (columns.first + p) + columns.phases[phase + i];
      const S* from = static_cast<const S*>(copy.data) + column * copy.column_step;
      Line* to = copy.lines + (phase + i) * columns.width + p;
      if (copy.ahead > 0) {
        const char* ahead = reinterpret_cast<const char*>(from + copy.ahead);
        for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(ahead + byte, 0, 2);
      }
      switch (copy.multiplier) {
        case 1:
          PackColumn<S, T, 1>(copy, from, to);
          break;
        case 2:
          PackColumn<S, T, 2>(copy, from, to);
          break;
        case 4:
          PackColumn<S, T, 4>(copy, from, to);
          break;
        case 8:
          PackColumn<S, T, 8>(copy, from, to);
          break;
        default:
          PackColumn<S, T, 0>(copy, from, to);
      }
    }
  }
}

// Where the values of a channel lie side by side.
template <typename S>
INLINE void PackPlanes(const ChannelCopy& copy, const PackedColumns& columns, int64_t phase,
                       const Span& span) {
  using T = typename Compute<S>::type;
  const int64_t planes = (copy.channels + kLanes<T> - 1) / kLanes<T> * copy.multiplier;
  const int64_t column = columns.stride * (columns.first + span.begin) + columns.phases[phase];
  const int64_t step = columns.stride * copy.column_step;
  for (int64_t plane = 0; plane < planes; ++plane) {
    const int64_t block = plane / copy.multiplier, m = plane % copy.multiplier;
    const int64_t lanes = Min(kLanes<T>, copy.channels - block * kLanes<T>);
    T* to = reinterpret_cast<T*>(copy.lines + phase * columns.width + plane * copy.plane);
    for (int64_t l = 0; l < kLanes<T>; ++l) {
      const int64_t depth = ((block * kLanes<T> + l) * copy.multiplier + m) * copy.channel_step;
      const S* values = static_cast<const S*>(copy.data) + column * copy.column_step + depth;
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
void Pack(const ChannelCopy& copy, const PackedColumns& columns) {
  using T = typename Compute<S>::type;
  constexpr int64_t kPhases = 8;
  const int64_t planes = (copy.channels + kLanes<T> - 1) / kLanes<T> * copy.multiplier;
#if defined(__AVX512F__)
  const bool by_vectors = copy.channel_step != 1 && copy.column_step == 1 &&
                          columns.stride <= kMostStride && columns.size > kFewColumns;
#else
  constexpr bool by_vectors = false;
#endif
  for (int64_t phase = 0; phase < columns.phase_count; phase += kPhases) {
    const int64_t count = Min(kPhases, columns.phase_count - phase);
    Span spans[kPhases];
    for (int64_t i = 0; i < count; ++i) {
      Span& span = spans[i];
      const int64_t start = columns.phases[phase + i];
      span.begin = Min(CountBelow(0, columns, start), columns.width);
      span.end = Max(span.begin, Min(CountBelow(columns.size, columns, start), columns.width));
      for (int64_t plane = 0; plane < planes; ++plane) {
        Line* line = copy.lines + (phase + i) * columns.width + plane * copy.plane;
        __builtin_memset(line, 0, span.begin * sizeof(Line));
        __builtin_memset(line + span.end, 0, (columns.width - span.end) * sizeof(Line));
      }
      if (copy.channel_step != 1 && !by_vectors) PackPlanes<S>(copy, columns, phase + i, span);
    }
    if (copy.channel_step == 1) PackColumns<S>(copy, columns, phase, spans, count);
  }
#if defined(__AVX512F__)
  if (by_vectors) PackPlanesByVectors<S>(copy, columns);
#endif
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
INLINE void EmitColumn(const ChannelCopy& copy, int64_t lanes, const T* from, S* to) {
  const int64_t m_count = copy.multiplier, plane = copy.plane * kLanes<T>;
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
void Emit(const ChannelCopy& copy, int64_t columns) {
  using T = typename Compute<S>::type;
  for (int64_t b = 0; b * kLanes<T> < copy.channels; ++b) {
    const int64_t lanes = Min(kLanes<T>, copy.channels - b * kLanes<T>);
    const T* from = reinterpret_cast<const T*>(copy.lines + b * copy.multiplier * copy.plane);
    S* to = static_cast<S*>(copy.data) + b * kLanes<T> * copy.multiplier * copy.channel_step;
    if (copy.channel_step == 1) {
      for (int64_t t = 0; t < columns; ++t, from += kLanes<T>, to += copy.column_step) {
        switch (copy.multiplier) {
          case 1:
            EmitColumn<S, T, 1>(copy, lanes, from, to);
            break;
          case 2:
            EmitColumn<S, T, 2>(copy, lanes, from, to);
            break;
          case 4:
            EmitColumn<S, T, 4>(copy, lanes, from, to);
            break;
          case 8:
            EmitColumn<S, T, 8>(copy, lanes, from, to);
            break;
          default:
            EmitColumn<S, T, 0>(copy, lanes, from, to);
        }
      }
      continue;
    }
#if defined(__AVX512F__)
    if (copy.column_step <= 2 && columns > kFewColumns) {
      for (int64_t m = 0; m < copy.multiplier; ++m) {
        EmitPlanesByVectors<S>(from + m * copy.plane * kLanes<T>, lanes, columns,
                               to + m * copy.channel_step, copy.multiplier * copy.channel_step,
                               copy.column_step);
      }
      continue;
    }
#endif
    for (int64_t l = 0; l < lanes; ++l) {
      for (int64_t m = 0; m < copy.multiplier; ++m) {
        S* values = to + (l * copy.multiplier + m) * copy.channel_step;
        const T* lane = from + m * copy.plane * kLanes<T> + l;
        for (int64_t t = 0; t < columns; ++t) {
          Convert(lane[t * kLanes<T>], values[t * copy.column_step]);
        }
      }
    }
  }
}

template <typename T>
void Add(Line* a, const Line* b, int64_t lines) {
  T* to = reinterpret_cast<T*>(a);
  const T* from = reinterpret_cast<const T*>(b);
  for (int64_t i = 0; i < lines * static_cast<int64_t>(64 / sizeof(T)); ++i) to[i] += from[i];
}

template <typename S>
constexpr ChannelMoves kTable = {BY_VECTORS, Pack<S>, Emit<S>, StoreLines<S>,
                                 Add<typename Compute<S>::type>};

}  // namespace

const ChannelMoves OF_INSTRUCTION_SET(ChannelMoves)[4] = {kTable<Half>, kTable<Brain>, kTable<float>,
                                                          kTable<double>};

}  // namespace jax_dwbp
