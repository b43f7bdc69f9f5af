// How the vector code loads and stores values of a caller's array: whole lines, some of a line, and
// data types that are not what is computed with. What vectors.h says of instruction sets holds here
// too.

#ifndef JAX_DWBP_LINES_H_
#define JAX_DWBP_LINES_H_

#include "vectors.h"

namespace jax_dwbp {
namespace {

#if defined(__AVX512F__)
// As many values of a caller's array as a line has.
template <typename S>
struct Raw {
  using type = __m256i;
};
template <>
struct Raw<float> {
  using type = __m512;
};
template <>
struct Raw<double> {
  using type = __m512d;
};

// Values of two vectors, by where each of the result lies in them.
typedef int32_t Places __attribute__((vector_size(64)));

INLINE __m512 Permute(__m512 a, Places places, __m512 b) {
  return _mm512_permutex2var_ps(a, reinterpret_cast<__m512i>(places), b);
}
INLINE __m512d Permute(__m512d a, Places places, __m512d b) {
  const __m256i low = _mm512_castsi512_si256(reinterpret_cast<__m512i>(places));
  return _mm512_permutex2var_pd(a, _mm512_cvtepi32_epi64(low), b);
}
INLINE __m256i Permute(__m256i a, Places places, __m256i b) {
  return _mm256_permutex2var_epi16(a, _mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(places)), b);
}

// Those of them that have a bit, and zeros.
template <typename S>
INLINE typename Raw<S>::type LoadMasked(const S* from, uint32_t mask) {
  if constexpr (sizeof(S) == 8) {
    return _mm512_maskz_loadu_pd(mask, from);
  } else if constexpr (sizeof(S) == 4) {
    return _mm512_maskz_loadu_ps(mask, from);
  } else {
    return _mm256_maskz_loadu_epi16(mask, from);
  }
}

// The first `count` of them, be it none or more than there are, and zeros.
template <typename S>
INLINE typename Raw<S>::type LoadRaw(const S* from, int64_t count) {
  typename Raw<S>::type values;
  if (count >= static_cast<int64_t>(sizeof(values) / sizeof(S))) {
    __builtin_memcpy(&values, from, sizeof(values));
    return values;
  }
  return LoadMasked(from, (uint32_t{1} << Max(count, 0)) - 1);
}

// Stores those of them that have a bit.
template <typename S>
INLINE void StoreMasked(typename Raw<S>::type values, uint32_t mask, S* to) {
  if constexpr (sizeof(S) == 8) {
    _mm512_mask_storeu_pd(to, mask, values);
  } else if constexpr (sizeof(S) == 4) {
    _mm512_mask_storeu_ps(to, mask, values);
  } else {
    _mm256_mask_storeu_epi16(to, mask, values);
  }
}

template <typename S>
INLINE void StoreRaw(typename Raw<S>::type values, int64_t count, S* to) {
  // What is stored by a mask can't be loaded before it is in the cache.
  if (count >= static_cast<int64_t>(sizeof(values) / sizeof(S))) {
    __builtin_memcpy(to, &values, sizeof(values));
    return;
  }
  StoreMasked<S>(values, (uint32_t{1} << Max(count, 0)) - 1, to);
}
#endif

// Copies fewer values than a line has.
template <typename S, int kCount = 8>
INLINE void CopySome(const S* from, S* to, int64_t count) {
#if defined(__AVX512F__)
  StoreRaw<S>(LoadRaw(from, count), count, to);
#else
  if constexpr (kCount > 0) {
    if (count & kCount) {
      __builtin_memcpy(to, from, kCount * sizeof(S));
      from += kCount, to += kCount;
    }
    CopySome<S, kCount / 2>(from, to, count);
  }
#endif
}

// Loads the line that values of a caller's array make.
template <typename S, typename T>
INLINE void LoadLine(const S* from, T* to) {
  constexpr int kStep = VECTOR_BYTES / sizeof(T);
  UNROLL for (int v = 0; v < kVectors; ++v) {
    *reinterpret_cast<typename Vector<T>::unaligned*>(to + v * kStep) =
        Load<S>(reinterpret_cast<const char*>(from + v * kStep));
  }
}

// As many of them as there are: behind these the line has zeros.
template <typename S, typename T>
INLINE void LoadUpTo(const S* from, T* to, int64_t count) {
  if (count >= kLanes<T>) return LoadLine(from, to);
#if defined(__AVX512F__)
  // What goes through memory is waited for, if it was stored by parts.
  const auto some = LoadRaw(from, count);
  LoadLine(reinterpret_cast<const S*>(&some), to);
#else
  S some[kLanes<T>] = {};
  CopySome(from, some, Max(count, 0));
  LoadLine(some, to);
#endif
}

#if defined(__AVX512F__)
// The line that values of a caller's array make.
template <typename S>
INLINE auto Widened(typename Raw<S>::type values) {
  if constexpr (sizeof(S) == 2) {
    return reinterpret_cast<__m512>(Widen(reinterpret_cast<HalfWords>(values), S()));
  } else {
    return values;
  }
}

// That of the first `count` of them, and zeros.
template <typename S>
INLINE auto LoadWidened(const S* from, int64_t count) {
  return Widened<S>(LoadRaw(from, count));
}
#endif

// Loads the first `count` values that a line has, and stores no others.
template <typename S, typename T>
INLINE void LoadSome(const S* from, T* to, int64_t count) {
#if defined(__AVX512F__)
  StoreRaw<T>(LoadWidened(from, count), count, to);
#else
  if constexpr (sizeof(S) == sizeof(T)) {
    CopySome(from, to, count);
  } else {
    T values[kLanes<T>];
    LoadUpTo(from, values, count);
    CopySome(values, to, count);
  }
#endif
}

template <typename S, typename T>
INLINE void StoreWholeLine(const typename Vector<T>::type (&line)[kVectors], S* to) {
  constexpr int kStep = VECTOR_BYTES / sizeof(T);
  UNROLL for (int v = 0; v < kVectors; ++v) {
    if constexpr (sizeof(S) == sizeof(T)) {
      *reinterpret_cast<typename Vector<T>::unaligned*>(to + v * kStep) = line[v];
    } else {
      *reinterpret_cast<HalfWordsAnywhere*>(to + v * kStep) = Narrow(line[v], S());
    }
  }
}

#if defined(__AVX512F__)
// A line as values of a caller's array.
template <typename S, typename T>
INLINE typename Raw<S>::type Rounded(typename Vector<T>::type line) {
  if constexpr (sizeof(S) == sizeof(T)) {
    return reinterpret_cast<typename Raw<S>::type>(line);
  } else {
    return reinterpret_cast<__m256i>(Narrow(line, S()));
  }
}
#endif

// Stores the first `count` values of a line.
template <typename S, typename T>
INLINE void StoreLine(const typename Vector<T>::type (&line)[kVectors], int64_t count, S* to) {
  if (count >= kLanes<T>) return StoreWholeLine<S, T>(line, to);
#if defined(__AVX512F__)
  StoreRaw<S>(Rounded<S, T>(line[0]), count, to);
#else
  S values[kLanes<T>];
  StoreWholeLine<S, T>(line, values);
  CopySome(values, to, count);
#endif
}

}  // namespace
}  // namespace jax_dwbp

#endif  // JAX_DWBP_LINES_H_
