// What is moved to rows and from them. What vectors.h says of instruction sets holds here too.

#include "kernels.h"
#include "lines.h"
#include "row_lanes.h"
#include "vectors.h"

namespace jax_dwbp {
namespace {

INLINE void Fetch(const void* from, int64_t ahead) {
  if (ahead) __builtin_prefetch(static_cast<const char*>(from) + ahead, 0, 2);
}

#if defined(__AVX512F__)
// Where the values of a line, of which the first is value `first` of a pixel, lie in what is read.
template <int kCount>
INLINE Places PlacesOf(const RowPixels& pixels, int64_t first) {
  Places places;
  int64_t value = first, repeat = first % pixels.repeats, pixel = 0;
  int64_t place = first / pixels.repeats * pixels.value_step;
  for (int l = 0; l < kCount; ++l) {
    places[l] = place;
    if (++value == pixels.period) {
      value = repeat = 0;
      place = pixel += pixels.column_step;
    } else if (++repeat == pixels.repeats) {
      repeat = 0;
      place += pixels.value_step;
    }
  }
  return places;
}

// Copies rows of pixels, so many at once.
template <typename S>
INLINE void CopySomePixels(const RowCopy& copy, int64_t at_once) {
  using T = typename Compute<S>::type;
  constexpr int64_t kCount = kLanes<T>;
  const RowPixels& pixels = copy.pixels;
  const int64_t step = at_once * pixels.period, read_step = at_once * pixels.column_step;
  const Places places = PlacesOf<kCount>(pixels, 0);
  // Elements from the first to the last.
  const int64_t all = (copy.count / pixels.period - 1) * pixels.column_step + pixels.Span();
  const auto move = [&](int64_t row, int64_t i, int64_t there,
                        int64_t left) __attribute__((always_inline)) {
    const S* from = static_cast<const S*>(copy.from) + row * copy.from_step + i * read_step;
    T* to = reinterpret_cast<T*>(copy.to) + copy.first + row * copy.to_step + i * step;
    const auto read = LoadWidened(from, there),
               read_behind = LoadWidened(from + kCount, there - kCount);
    // What is behind these pixels is overwritten by the next ones.
    StoreRaw<T>(Permute(read, places, read_behind), left, to);
    Fetch(from, copy.ahead), Fetch(from + kCount, copy.ahead);
  };
  int64_t whole = 0;
  while (all - whole * read_step >= 2 * kCount && copy.count - whole * step >= kCount) ++whole;
  for (int64_t row = 0; row < copy.rows && whole > 0; ++row) {
    for (int64_t i = 0; i < whole; ++i) move(row, i, 2 * kCount, kCount);
  }
  // A mask is made once for all rows.
  for (int64_t i = whole; i * step < copy.count; ++i) {
    const int64_t there = all - i * read_step, left = copy.count - i * step;
    for (int64_t row = 0; row < copy.rows; ++row) move(row, i, there, left);
  }
}

// Copies rows of pixels of more values than a line has.
template <typename S>
INLINE void CopyWidePixels(const RowCopy& copy) {
  using T = typename Compute<S>::type;
  constexpr int64_t kCount = kLanes<T>;
  const RowPixels& pixels = copy.pixels;
  const int64_t span = pixels.Span(), count = copy.count / pixels.period;
  Places places[kMostLinesOfPixel];
  for (int64_t v = 0; v < pixels.period; v += kCount) places[v / kCount] = PlacesOf<kCount>(pixels, v);
  const auto move = [&](int64_t row, int64_t i, int64_t there,
                        int64_t there_behind) __attribute__((always_inline)) {
    const S* from = static_cast<const S*>(copy.from) + row * copy.from_step + i * pixels.column_step;
    T* to = reinterpret_cast<T*>(copy.to) + copy.first + row * copy.to_step + i * pixels.period;
    const auto read = LoadWidened(from, there), read_behind = LoadWidened(from + kCount, there_behind);
    int64_t v = 0;
    // What is behind a pixel is overwritten by the next one.
    const int64_t whole = i + 1 < count ? pixels.period : pixels.period / kCount * kCount;
    for (; v < whole; v += kCount)
      StoreRaw<T>(Permute(read, places[v / kCount], read_behind), kCount, to + v);
    if (v < pixels.period) {
      StoreRaw<T>(Permute(read, places[v / kCount], read_behind), pixels.period - v, to + v);
    }
  };
  for (int64_t row = 0; row < copy.rows; ++row) {
    int64_t i = 0;
    // Of most pixels a whole line may be read, and is all that they have.
    const int64_t most = span > kCount ? 0 : count - 1 - (kCount - 1) / pixels.column_step;
    for (; i < most; ++i) move(row, i, kCount, 0);
    for (; i < count; ++i) move(row, i, span, span - kCount);
  }
}

// Two phases, of which lines may be read behind what counts.
template <typename S>
INLINE void InterleaveTwo(const RowInterleave& rows) {
  constexpr int64_t kCount = kLanes<typename Compute<S>::type>;
  const int64_t period = rows.period;
  Places places[2];
  for (int64_t l = 0, value = 0, pixel = 0; l < 2 * kCount; ++l) {
    places[l / kCount][l % kCount] = pixel % 2 * kCount + pixel / 2 * period + value;
    if (++value == period) value = 0, ++pixel;
  }
  const int64_t step = kCount / period * period;
  for (int64_t row = 0; row < rows.rows; ++row) {
    const S* from = static_cast<const S*>(rows.from) + row * rows.from_row_step;
    S* to = static_cast<S*>(rows.to) + row * rows.to_step;
    for (int64_t left = rows.count; left > 0; left -= 2 * step, from += step, to += 2 * step) {
      const auto first = LoadRaw(from, kCount), second = LoadRaw(from + rows.from_step, kCount);
      // What is behind these pixels is overwritten by the next ones.
      StoreRaw<S>(Permute(first, places[0], second), left, to);
      StoreRaw<S>(Permute(first, places[1], second), left - kCount, to + kCount);
    }
  }
}
#endif

template <typename S>
INLINE void CopyPixels(const RowCopy& copy) {
  using T = typename Compute<S>::type;
  const RowPixels& pixels = copy.pixels;
#if defined(__AVX512F__)
  if (pixels.Span() <= 2 * kLanes<T>) {
    const int64_t at_once = pixels.AtOnce(kLanes<T>);
    if (at_once > 0) return CopySomePixels<S>(copy, at_once);
    if (pixels.period <= kMostLinesOfPixel * kLanes<T>) return CopyWidePixels<S>(copy);
  }
#endif
  for (int64_t row = 0; row < copy.rows; ++row) {
    const S* from = static_cast<const S*>(copy.from) + row * copy.from_step;
    T* to = reinterpret_cast<T*>(copy.to) + copy.first + row * copy.to_step;
    for (int64_t i = 0; i < copy.count; i += pixels.period, from += pixels.column_step) {
      if (pixels.repeats == 1) {
        for (int64_t v = 0; v < pixels.period; ++v) Convert(from[v * pixels.value_step], to[i + v]);
        continue;
      }
      const S* value = from;
      for (int64_t v = 0; v < pixels.period; v += pixels.repeats, value += pixels.value_step) {
        T converted;
        Convert(*value, converted);
        for (int64_t repeat = 0; repeat < pixels.repeats; ++repeat) to[i + v + repeat] = converted;
      }
    }
  }
}

template <typename S>
INLINE void CopyDense(const RowCopy& copy) {
  using T = typename Compute<S>::type;
  const int64_t whole = copy.count / kLanes<T> * kLanes<T>, rest = copy.count - whole;
  const S* from = static_cast<const S*>(copy.from);
  T* to = reinterpret_cast<T*>(copy.to) + copy.first;
  for (int64_t row = 0; row < copy.rows; ++row, from += copy.from_step, to += copy.to_step) {
    for (int64_t i = 0; i < whole; i += kLanes<T>) {
      LoadLine(from + i, to + i);
      Fetch(from + i, copy.ahead);
    }
    if (rest == 0) continue;
    LoadSome(from + whole, to + whole, rest);
    Fetch(from + whole, copy.ahead);
  }
}

template <typename S>
void CopyRows(const RowCopy& copy) {
  using T = typename Compute<S>::type;
  if (copy.before + copy.after > 0) {
    T* to = reinterpret_cast<T*>(copy.to) + copy.first;
    for (int64_t row = 0; row < copy.rows; ++row, to += copy.to_step) {
      __builtin_memset(to - copy.before, 0, copy.before * sizeof(T));
      __builtin_memset(to + copy.count, 0, copy.after * sizeof(T));
    }
  }
  copy.pixels.AreDense() ? CopyDense<S>(copy) : CopyPixels<S>(copy);
}

template <typename S>
void PackWeights(const RowWeights& weights) {
  using T = typename Compute<S>::type;
  T* to = reinterpret_cast<T*>(weights.to);
  const auto each_tap = [&](auto pack) __attribute__((always_inline)) {
    for (int64_t i = 0; i < weights.tap_count; ++i, to += kLanes<T>) {
      pack(static_cast<const S*>(weights.from) + weights.taps[i] * weights.tap_step);
    }
  };
  if (weights.period == 1) {
    return each_tap([&](const S* from) __attribute__((always_inline)) {
      T value;
      Convert(*from, value);
      for (int64_t l = 0; l < kLanes<T>; ++l) to[l] = value;
    });
  }
#if defined(__AVX512F__)
  // As if they were a pixel that is behind itself.
  const RowPixels pixels{weights.period, 1, weights.value_step, 0};
  const int64_t span = pixels.Span();
  if (span <= 2 * kLanes<T>) {
    const Places places = PlacesOf<kLanes<T>>(pixels, weights.first);
    return each_tap([&](const S* from) __attribute__((always_inline)) {
      const auto read = LoadWidened(from, span);
      const auto read_behind =
          span <= kLanes<T> ? read : LoadWidened(from + kLanes<T>, span - kLanes<T>);
      StoreRaw<T>(Permute(read, places, read_behind), kLanes<T>, to);
    });
  }
#endif
  each_tap([&](const S* from) __attribute__((always_inline)) {
    for (int64_t l = 0, value = weights.first; l < kLanes<T>; ++l) {
      Convert(from[value * weights.value_step], to[l]);
      if (++value == weights.period) value = 0;
    }
  });
}

template <typename S>
void Interleave(const RowInterleave& rows) {
#if defined(__AVX512F__)
  if (rows.phases == 2) return InterleaveTwo<S>(rows);
#endif
  const int64_t pixels = rows.count / rows.period;
  for (int64_t row = 0; row < rows.rows; ++row) {
    const S* const from = static_cast<const S*>(rows.from) + row * rows.from_row_step;
    S* const to = static_cast<S*>(rows.to) + row * rows.to_step;
    for (int64_t phase = 0; phase < rows.phases; ++phase) {
      const S* values = from + phase * rows.from_step;
      for (int64_t pixel = phase; pixel < pixels; pixel += rows.phases, values += rows.period) {
        for (int64_t c = 0; c < rows.period; ++c) to[pixel * rows.period + c] = values[c];
      }
    }
  }
}

template <typename S>
constexpr RowMoves Table() {
  return {BY_VECTORS, CopyRows<S>, PackWeights<S>, Interleave<S>};
}

}  // namespace

const RowMoves OF_INSTRUCTION_SET(RowMoves)[4] = {Table<Half>(), Table<Brain>(), Table<float>(),
                                                  Table<double>()};

}  // namespace jax_dwbp
