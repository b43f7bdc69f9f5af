// Planes, where the values of a channel lie side by side, that are turned to lines of channels and back
// by vectors. Where each value is moved alone, 5x5 filters under a stride of 2 take twice the time.

#ifndef JAX_DWBP_CHANNEL_PLANES_H_
#define JAX_DWBP_CHANNEL_PLANES_H_

#include "kernels.h"
#include "lines.h"
#include "vectors.h"

#if defined(__AVX512F__)
namespace jax_dwbp {
namespace {

// Strides under which planes are packed by vectors.
constexpr int64_t kMostStride = 16;
// Columns of which each value is moved alone, which takes as long for 4 as for a vector.
constexpr int64_t kFewColumns = 4;

// Turns the rows of a matrix of lines to its columns: by shuffles within 16 bytes, then of 16 bytes.
// Permutations from any place to any other would be as many, but take some processors twice the time.
INLINE void Transpose(__m512 (&rows)[16]) {
  __m512 pairs[16], quads[16];
  UNROLL for (int i = 0; i < 16; i += 2) {
    pairs[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
  }
  UNROLL for (int i = 0; i < 16; i += 4) {
    UNROLL for (int j = 0; j < 2; ++j) {
      const __m512d a = _mm512_castps_pd(pairs[i + j]), b = _mm512_castps_pd(pairs[i + j + 2]);
      quads[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      quads[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
  }
  UNROLL for (int j = 0; j < 4; ++j) {
    __m512 halves[2][2];
    UNROLL for (int i = 0; i < 2; ++i) {
      halves[i][0] = _mm512_shuffle_f32x4(quads[8 * i + j], quads[8 * i + j + 4], 0x88);
      halves[i][1] = _mm512_shuffle_f32x4(quads[8 * i + j], quads[8 * i + j + 4], 0xdd);
    }
    UNROLL for (int i = 0; i < 2; ++i) {
      rows[4 * i + j] = _mm512_shuffle_f32x4(halves[0][i], halves[1][i], 0x88);
      rows[4 * i + j + 8] = _mm512_shuffle_f32x4(halves[0][i], halves[1][i], 0xdd);
    }
  }
}
INLINE void Transpose(__m512d (&rows)[8]) {
  __m512d pairs[8];
  UNROLL for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm512_unpacklo_pd(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_pd(rows[i], rows[i + 1]);
  }
  UNROLL for (int j = 0; j < 2; ++j) {
    __m512d halves[2][2];
    UNROLL for (int i = 0; i < 2; ++i) {
      halves[i][0] = _mm512_shuffle_f64x2(pairs[4 * i + j], pairs[4 * i + j + 2], 0x88);
      halves[i][1] = _mm512_shuffle_f64x2(pairs[4 * i + j], pairs[4 * i + j + 2], 0xdd);
    }
    UNROLL for (int i = 0; i < 2; ++i) {
      rows[2 * i + j] = _mm512_shuffle_f64x2(halves[0][i], halves[1][i], 0x88);
      rows[2 * i + j + 4] = _mm512_shuffle_f64x2(halves[0][i], halves[1][i], 0xdd);
    }
  }
}

// Packs the columns of all phases, which follow one another.
template <typename S>
INLINE void PackPlanesByVectors(const ChannelCopy& copy, const PackedColumns& columns) {
  using T = typename Compute<S>::type;
  constexpr int kCount = kLanes<T>;
  const int64_t planes = (copy.channels + kCount - 1) / kCount * copy.multiplier;
  int64_t places[kMostStride];  // lines to the first of a phase, or less than none
  for (int64_t phase = 0; phase < columns.stride; ++phase) places[phase] = -1;
  for (int64_t i = 0; i < columns.phase_count; ++i) places[columns.phases[i]] = i * columns.width;
  const int64_t begin = Max(0, columns.stride * columns.first);
  const int64_t end = Min(columns.size, columns.stride * (columns.first + columns.width));
  const int64_t step = copy.multiplier * copy.channel_step;
  int64_t phase = begin % columns.stride, line = begin / columns.stride - columns.first;
  Line unused;
  for (int64_t column = begin; column < end; column += kCount) {
    int64_t to[kCount];
    for (int l = 0; l < kCount; ++l) {
      to[l] = column + l < end && places[phase] >= 0 ? places[phase] + line : -1;
      if (++phase == columns.stride) phase = 0, ++line;
    }
    for (int64_t plane = 0; plane < planes; ++plane) {
      const int64_t block = plane / copy.multiplier, m = plane % copy.multiplier;
      const int64_t lanes = Min(kCount, copy.channels - block * kCount);
      const int64_t depth = (block * kCount * copy.multiplier + m) * copy.channel_step;
      const S* const from = static_cast<const S*>(copy.data) + depth + column;
      decltype(LoadWidened(from, 0)) rows[kCount];
      UNROLL for (int l = 0; l < kCount; ++l) {
        // Lanes without a channel have what the last one has.
        const S* values = from + Min(l, lanes - 1) * step;
        rows[l] = LoadWidened(values, end - column);
        if (copy.ahead > 0) __builtin_prefetch(values + copy.ahead, 0, 2);
      }
      Transpose(rows);
      Line* const lines = copy.lines + plane * copy.plane;
      UNROLL for (int l = 0; l < kCount; ++l) {
        __builtin_memcpy(to[l] < 0 ? &unused : lines + to[l], &rows[l], sizeof(Line));
      }
    }
  }
}

// Stores values two apart, and leaves what lies between them.
template <typename S>
INLINE void StoreApart(typename Raw<S>::type values, int64_t count, S* to) {
  constexpr int64_t kCount = sizeof(values) / sizeof(S);
  constexpr uint32_t kEven = 0x5555;
  UNROLL for (int64_t half = 0; half < 2; ++half) {
    Places places;
    UNROLL for (int l = 0; l < 16; ++l) places[l] = half * kCount / 2 + l / 2;
    const int64_t left = Max(0, Min(2 * count - half * kCount, kCount));
    StoreMasked<S>(Permute(values, places, values), kEven & ((uint32_t{1} << left) - 1),
                   to + half * kCount);
  }
}

// Lines of some columns become rows of planes, whose columns are side by side or every second one.
template <typename S, typename T>
INLINE void EmitPlanesByVectors(const T* from, int64_t lanes, int64_t columns, S* to, int64_t row_step,
                                int64_t column_step) {
  constexpr int kCount = kLanes<T>;
  for (int64_t t = 0; t < columns; t += kCount) {
    const int64_t count = Min(kCount, columns - t);
    decltype(LoadWidened(from, 0)) rows[kCount];
    UNROLL for (int i = 0; i < kCount; ++i) {
      rows[i] = LoadRaw(from + Min(t + i, columns - 1) * kCount, kCount);
    }
    Transpose(rows);
    UNROLL for (int l = 0; l < kCount; ++l) {
      if (l >= lanes) break;
      const auto values = Rounded<S, T>(reinterpret_cast<typename Vector<T>::type>(rows[l]));
      S* const row = to + l * row_step + t * column_step;
      if (column_step == 1) {
        StoreRaw<S>(values, count, row);
      } else {
        StoreApart<S>(values, count, row);
      }
    }
  }
}

}  // namespace
}  // namespace jax_dwbp
#endif

#endif  // JAX_DWBP_CHANNEL_PLANES_H_
