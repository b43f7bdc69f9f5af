// Vectors and data types, of whichever instruction set this is compiled for, in the vector types of GCC
// and Clang.
//
// The files that include this are compiled for several instruction sets and linked to one library. So
// all but their tables has internal linkage, in headers too: the linker must not take a function for a
// baseline CPU from the AVX-512 object.

#ifndef JAX_DWBP_VECTORS_H_
#define JAX_DWBP_VECTORS_H_

#include <cstdint>

// All of which is inlined, always.
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 32")
// Keeps a value that is used twice in a register; else it is loaded twice. IN_ORDER also keeps the
// order of such values.
#if defined(__aarch64__)
#define IN_REGISTER(v) asm("" : "+w"(v))
#define IN_ORDER(v) asm volatile("" : "+w"(v))
#else
#define IN_REGISTER(v) asm("" : "+v"(v))
#define IN_ORDER(v) asm volatile("" : "+v"(v))
#endif
// Keeps a pointer as it is; else one is kept for each constant that is added to it.
#define AS_POINTER(p) asm("" : "+r"(p))

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#define OF_INSTRUCTION_SET(name) Avx512##name
#elif defined(__AVX2__)
#define VECTOR_BYTES 32
#define OF_INSTRUCTION_SET(name) Avx2##name
#else
#define VECTOR_BYTES 16
#define OF_INSTRUCTION_SET(name) Baseline##name
#endif

// Whether values are moved by permutations of vectors.
#define BY_VECTORS (VECTOR_BYTES == 64)

namespace jax_dwbp {
namespace {

constexpr int kVectors = 64 / VECTOR_BYTES;
// Values of a line.
template <typename T>
constexpr int64_t kLanes = 64 / sizeof(T);

// A running sum has about kChain products: two rows of the filter at least, or one of kLongRow taps or
// more. Such sums are added pairwise, so that a rounding error grows with the logarithm of the filter's
// size. By single rows, filters of 5 to 15 columns would take 1.1 to 1.2 times as long, for a mean
// error of 0.55 instead of 0.61 half ulps; what adds up 7x7 products in one chain has 1.3.
constexpr int64_t kChain = 7;
constexpr int64_t kLongRow = 16;
// Levels of pairs, for up to 2**24 rows: more than the scratch that is allowed has lines.
constexpr int kLevels = 24;

template <typename T>
struct Vector {
  typedef T type __attribute__((vector_size(VECTOR_BYTES), may_alias));
  typedef T unaligned __attribute__((vector_size(VECTOR_BYTES), may_alias, aligned(sizeof(T))));
};

template <typename T>
INLINE typename Vector<T>::type Load(const char* from) {
  return *reinterpret_cast<const typename Vector<T>::unaligned*>(from);
}

struct Half {
  uint16_t bits;
};
struct Brain {
  uint16_t bits;
};

INLINE float AsFloat(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

INLINE uint32_t AsBits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
}

INLINE void Convert(float from, float& to) { to = from; }
INLINE void Convert(double from, double& to) { to = from; }

INLINE void Convert(Brain from, float& to) { to = AsFloat(uint32_t{from.bits} << 16); }

INLINE void Convert(float from, Brain& to) {
  const uint32_t bits = AsBits(from);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  to.bits = (bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : rounded;
}

// Half types by integer arithmetic, since XLA's threads flush subnormal floats to zero.
INLINE void Convert(Half from, float& to) {
  const uint32_t sign = (from.bits & 0x8000u) << 16, magnitude = from.bits & 0x7fffu;
  const uint32_t normal = (magnitude << 13) + ((magnitude >= 0x7c00 ? 224u : 112u) << 23);
  const uint32_t subnormal = AsBits(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  to = AsFloat(sign | (magnitude < 0x400 ? subnormal : normal));
}

INLINE void Convert(float from, Half& to) {
  const uint32_t bits = AsBits(from), sign = bits >> 31 << 15, magnitude = bits & 0x7fffffff;
  // Below 2**-14 the last bit of a half is that of a sum with 0.5.
  const uint32_t subnormal = AsBits(AsFloat(magnitude) + 0.5f) - AsBits(0.5f);
  const uint32_t normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const uint32_t finite = magnitude < (113u << 23) ? subnormal : normal;
  const uint32_t special = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
  to.bits = sign | (magnitude >= (143u << 23) ? special : finite);
}

template <typename T>
struct Compute {
  using type = float;
};
template <>
struct Compute<double> {
  using type = double;
};

// The same for whole vectors, which compilers do not see in the loops around those above.
typedef uint32_t Words __attribute__((vector_size(VECTOR_BYTES)));
typedef float Floats __attribute__((vector_size(VECTOR_BYTES)));
typedef uint16_t HalfWords __attribute__((vector_size(VECTOR_BYTES / 2)));
typedef uint16_t HalfWordsAnywhere
    __attribute__((vector_size(VECTOR_BYTES / 2), may_alias, aligned(2)));

INLINE Floats Widen(HalfWords bits, Brain) {
  return reinterpret_cast<Floats>(__builtin_convertvector(bits, Words) << 16);
}

INLINE HalfWords Narrow(Floats value, Brain) {
  const Words bits = reinterpret_cast<Words>(value);
  const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Words narrow = (bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : rounded;
  return __builtin_convertvector(narrow, HalfWords);
}

// The processor's own conversions heed no mode of subnormal values.
INLINE Floats Widen(HalfWords half, Half) {
#if defined(__AVX512F__)
  return reinterpret_cast<Floats>(_mm512_cvtph_ps(reinterpret_cast<__m256i>(half)));
#else
  typedef int32_t Integers __attribute__((vector_size(VECTOR_BYTES)));
  const Words bits = __builtin_convertvector(half, Words);
  const Words sign = (bits & 0x8000u) << 16, magnitude = bits & 0x7fffu;
  const Words exponent = magnitude >= 0x7c00 ? Words{} + (224u << 23) : Words{} + (112u << 23);
  const Words normal = (magnitude << 13) + exponent;
  const Floats subnormal =
      __builtin_convertvector(reinterpret_cast<Integers>(magnitude), Floats) * 0x1p-24f;
  return reinterpret_cast<Floats>(sign |
                                  (magnitude < 0x400 ? reinterpret_cast<Words>(subnormal) : normal));
#endif
}

INLINE HalfWords Narrow(Floats value, Half) {
#if defined(__AVX512F__)
  constexpr int kToNearest = 8;  // without exceptions
  return reinterpret_cast<HalfWords>(_mm512_cvtps_ph(reinterpret_cast<__m512>(value), kToNearest));
#else
  const Words bits = reinterpret_cast<Words>(value), sign = bits >> 31 << 15;
  const Words magnitude = bits & 0x7fffffff;
  const Words subnormal =
      reinterpret_cast<Words>(reinterpret_cast<Floats>(magnitude) + 0.5f) - AsBits(0.5f);
  const Words normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const Words finite = magnitude < (113u << 23) ? subnormal : normal;
  const Words special = magnitude > 0x7f800000 ? Words{} + 0x7e00 : Words{} + 0x7c00;
  return __builtin_convertvector(sign | (magnitude >= (143u << 23) ? special : finite), HalfWords);
#endif
}

INLINE constexpr int64_t Min(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE constexpr int64_t Max(int64_t a, int64_t b) { return a > b ? a : b; }

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
    typename Vector<T>::type values;
    if constexpr (sizeof(S) == sizeof(T)) {
      values = Load<T>(reinterpret_cast<const char*>(from + v * kStep));
    } else {
      values = Widen(*reinterpret_cast<const HalfWordsAnywhere*>(from + v * kStep), S());
    }
    *reinterpret_cast<typename Vector<T>::unaligned*>(to + v * kStep) = values;
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

// The rows of some taps that make a running sum.
INLINE constexpr int64_t ChainRows(int64_t taps) { return Max(kChain / taps, taps < kLongRow ? 2 : 1); }

template <int i>
struct Index {
  static constexpr int value = i;
};

// Calls add(first, last) with constants.
template <int kRows, int kFirst = 0, int kLast = 0, typename Add>
INLINE void WithRows(int64_t first, int64_t last, const Add& add) {
  if (first == kFirst && last == kLast) return add(Index<kFirst>(), Index<kLast>());
  if constexpr (kLast + 1 < kRows) {
    WithRows<kRows, kFirst, kLast + 1>(first, last, add);
  } else if constexpr (kFirst + 1 < kRows) {
    WithRows<kRows, kFirst + 1, kFirst + 1>(first, last, add);
  }
}

}  // namespace
}  // namespace jax_dwbp

#endif  // JAX_DWBP_VECTORS_H_
