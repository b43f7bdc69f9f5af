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

#if defined(__AVX512F__)
typedef uint16_t HalfPlaces __attribute__((vector_size(64)));
#endif

INLINE Floats Widen(HalfWords bits, Brain) {
#if defined(__AVX512F__)
  // Each as the upper half of a word, by one operation.
  constexpr HalfPlaces kPlaces = {0, 0, 0, 1, 0, 2,  0, 3,  0, 4,  0, 5,  0, 6,  0, 7,
                                  0, 8, 0, 9, 0, 10, 0, 11, 0, 12, 0, 13, 0, 14, 0, 15};
  const __m512i places = reinterpret_cast<__m512i>(kPlaces);
  const __m512i all = _mm512_castsi256_si512(reinterpret_cast<__m256i>(bits));
  return reinterpret_cast<Floats>(_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, places, all));
#else
  return reinterpret_cast<Floats>(__builtin_convertvector(bits, Words) << 16);
#endif
}

#if defined(__AVX512F__)
// An instruction that some processors with AVX-512 have, in a quarter of the operations. It takes
// subnormal values for 0, which on XLA's threads no sum is.
const bool kNarrowsBrains = __builtin_cpu_supports("avx512bf16");
#endif

INLINE HalfWords Narrow(Floats value, Brain) {
#if defined(__AVX512F__)
  if (kNarrowsBrains) {
    HalfWords narrow;
    asm("vcvtneps2bf16 {%1, %0|%0, %1}" : "=v"(narrow) : "v"(value));
    return narrow;
  }
#endif
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

// Loads values of a caller's array as what is computed with.
template <typename S>
INLINE typename Vector<typename Compute<S>::type>::type Load(const char* from) {
  if constexpr (sizeof(S) == 2) {
    return Widen(*reinterpret_cast<const HalfWordsAnywhere*>(from), S());
  } else {
    return *reinterpret_cast<const typename Vector<S>::unaligned*>(from);
  }
}

INLINE constexpr int64_t Min(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE constexpr int64_t Max(int64_t a, int64_t b) { return a > b ? a : b; }

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
