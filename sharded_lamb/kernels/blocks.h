// A block as vectors of the processor's width: values of every dtype, sums by halving.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#if defined(__AVX__)
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))
#define OUTLINE __attribute__((noinline))  // compiled once for all callers

namespace {

constexpr int BLOCK = 256;  // elements; layout.BLOCK

// REMAINDER: int16, the low 16 bits of masters of bfloat16 weights; REMAINDER8: int8, 8 of them; see remainders.py.
// CODES: moments of 8 bits; see block_codes.py.
enum Dtype : int64_t { NONE = -1, F32 = 0, BF16 = 1, F16 = 2, F64 = 3, REMAINDER = 4, REMAINDER8 = 5, CODES = 6 };

INLINE constexpr bool is_remainder(int64_t dtype) { return dtype == REMAINDER || dtype == REMAINDER8; }

template <typename T>
constexpr int64_t own_dtype() {
  return sizeof(T) == 4 ? F32 : F64;
}

INLINE int64_t size_of(int64_t dtype) { return dtype == F64 ? 8 : dtype == F32 ? 4 : dtype == REMAINDER8 ? 1 : 2; }

// -- vectors ------------------------------------------------------------------------------------------

#if defined(__AVX512F__)
constexpr int WIDTH = 64;  // bytes
#elif defined(__AVX__)
constexpr int WIDTH = 32;
#else
constexpr int WIDTH = 16;
#endif

template <typename Lane, int N>
struct Lanes {
  typedef Lane V __attribute__((vector_size(N * sizeof(Lane))));
};

// Vectors of the compute dtype T, and what converts to and from them lane by lane.
template <typename T>
struct Wide {
  static constexpr int LANES = WIDTH / sizeof(T), COUNT = BLOCK / LANES;
  typedef typename Lanes<T, LANES>::V V;
  typedef decltype(V() != V()) Mask;
  typedef typename Lanes<float, LANES>::V Floats;
  typedef typename Lanes<double, LANES>::V Doubles;
  typedef typename Lanes<uint32_t, LANES>::V Bits;
  typedef typename Lanes<int32_t, LANES>::V Ints;
  typedef typename Lanes<uint16_t, LANES>::V Halves;
  typedef typename Lanes<int16_t, LANES>::V SignedHalves;
};

// Vector `j` of a block in memory, of any alignment.
template <typename Lane, int N>
INLINE typename Lanes<Lane, N>::V at(const void *memory, int j) {
  typename Lanes<Lane, N>::V x;
  std::memcpy(&x, (const char *)memory + j * sizeof(x), sizeof(x));
  return x;
}

template <typename V>
INLINE void put(V x, void *memory, int j) {
  std::memcpy((char *)memory + j * sizeof(x), &x, sizeof(x));
}

template <typename V>
INLINE V root(V x) {
  for (size_t i = 0; i < sizeof(x) / sizeof(x[0]); i++) x[i] = std::sqrt(x[i]);
  return x;
}

// `x`, and 0 instead of subnormal numbers: where the exponent's bits, those of infinity, are 0.
template <typename T>
INLINE typename Wide<T>::V flushed(typename Wide<T>::V x) {
  typedef typename Wide<T>::Mask Mask;
  const Mask exponent = (Mask)x & (Mask)(typename Wide<T>::V{} + std::numeric_limits<T>::infinity());
  return (typename Wide<T>::V)((Mask)x & (exponent != 0));
}

template <typename Mask>
INLINE bool any(Mask mask) {
  uint64_t words[sizeof(mask) / 8], set = 0;
  std::memcpy(words, &mask, sizeof(mask));
  for (uint64_t word : words) set |= word;
  return set != 0;
}

// N sums side by side: Σw², and Σu² of each direction, or those of caution.
template <typename T, int N>
struct Sums {
  typename Wide<T>::V of[N];
  INLINE Sums operator+(const Sums &other) const {
    Sums sum;
#pragma GCC unroll 4  // as a loop, g++ keeps all four in memory
    for (int i = 0; i < N; i++) sum.of[i] = of[i] + other.of[i];
    return sum;
  }
};

// The sum of `leaf(j)` over a block's vectors, visited in memory order, by halving: first half plus second half until
// one vector is left.
template <int COUNT, typename Leaf>
INLINE auto by_halving(Leaf leaf) {
  decltype(leaf(0)) half[COUNT / 2];
#pragma GCC unroll 2
  for (int j = 0; j < COUNT / 2; j++) half[j] = leaf(j);
#pragma GCC unroll 2
  for (int j = 0; j < COUNT / 2; j++) half[j] = half[j] + leaf(j + COUNT / 2);
#pragma GCC unroll 4
  for (int n = COUNT / 4; n >= 1; n /= 2)
#pragma GCC unroll 8
    for (int j = 0; j < n; j++) half[j] = half[j] + half[j + n];
  return half[0];
}

// The sum of N lanes by halving.
template <typename T, int N>
INLINE T across(const T *lanes) {
  if constexpr (N == 2) {
    return lanes[0] + lanes[1];
  } else {
    typedef typename Lanes<T, N / 2>::V Half;
    const Half sum = at<T, N / 2>(lanes, 0) + at<T, N / 2>(lanes, 1);
    return across<T, N / 2>((const T *)&sum);
  }
}

template <typename T>
INLINE T across_lanes(typename Wide<T>::V x) {
  return across<T, Wide<T>::LANES>((const T *)&x);
}

// -- dtypes -------------------------------------------------------------------------------------------

template <typename T>
INLINE typename Wide<T>::Bits unpacked(typename Wide<T>::Halves x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(x) == 32) return (typename Wide<T>::Bits)_mm512_cvtepu16_epi32((__m256i)x);
#elif defined(__AVX2__)
  if constexpr (sizeof(x) == 16) return (typename Wide<T>::Bits)_mm256_cvtepu16_epi32((__m128i)x);
#endif
  return __builtin_convertvector(x, typename Wide<T>::Bits);
}

// The lower halves of `x`, whose upper halves are 0.
template <typename T>
INLINE typename Wide<T>::Halves packed(typename Wide<T>::Bits x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(x) == 64) return (typename Wide<T>::Halves)_mm512_cvtepi32_epi16((__m512i)x);
#elif defined(__AVX2__)
  if constexpr (sizeof(x) == 32)
    return (typename Wide<T>::Halves)_mm_packus_epi32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
#endif
  return __builtin_convertvector(x, typename Wide<T>::Halves);
}

// The same of two vectors.
template <typename T>
INLINE typename Lanes<uint16_t, 2 * Wide<T>::LANES>::V packed(typename Wide<T>::Bits x, typename Wide<T>::Bits y) {
#if defined(__AVX512BW__)
  if constexpr (sizeof(x) == 64) {
    const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
    return (typename Lanes<uint16_t, 32>::V)_mm512_permutexvar_epi64(order, _mm512_packus_epi32((__m512i)x, (__m512i)y));
  }
#elif defined(__AVX2__) && !defined(__AVX512F__)
  if constexpr (sizeof(x) == 32)
    return (typename Lanes<uint16_t, 16>::V)_mm256_permute4x64_epi64(_mm256_packus_epi32((__m256i)x, (__m256i)y), 0xd8);
#endif
  const typename Wide<T>::Halves both[2] = {packed<T>(x), packed<T>(y)};
  return at<uint16_t, 2 * Wide<T>::LANES>(both, 0);
}

// Signed halves, sign-extended.
template <typename T>
INLINE typename Wide<T>::Ints sign_extended(typename Wide<T>::SignedHalves x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(x) == 32) return (typename Wide<T>::Ints)_mm512_cvtepi16_epi32((__m256i)x);
#elif defined(__AVX2__)
  if constexpr (sizeof(x) == 16) return (typename Wide<T>::Ints)_mm256_cvtepi16_epi32((__m128i)x);
#endif
  return __builtin_convertvector(x, typename Wide<T>::Ints);
}

template <typename T>
INLINE typename Wide<T>::Bits to_bf16(typename Wide<T>::Floats x) {  // to the nearest, ties to even
  typedef typename Wide<T>::Bits Bits;
  const Bits bits = (Bits)x, rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return x != x ? Bits{} + 0x7fc0u : rounded;
}

#if defined(__aarch64__)
typedef __fp16 Float16;  // in C++, g++ has _Float16 there from version 13 on
#elif !defined(__F16C__)
typedef _Float16 Float16;  // g++ 12
#endif

INLINE float from_f16(uint16_t bits) {
#if defined(__F16C__)
  return _cvtsh_ss(bits);
#else
  Float16 x;
  std::memcpy(&x, &bits, sizeof(x));
  return float(x);
#endif
}

INLINE uint16_t to_f16(float x) {
#if defined(__F16C__)
  return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#else
  const Float16 rounded = Float16(x);
  uint16_t bits;
  std::memcpy(&bits, &rounded, sizeof(bits));
  return bits;
#endif
}

template <typename T>
INLINE typename Wide<T>::Floats of_f16(const void *memory, int j) {
  typename Wide<T>::Floats x;
#if defined(__AVX512F__)
  if constexpr (sizeof(x) == 64) return (typename Wide<T>::Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)memory + j));
#elif defined(__F16C__)
  if constexpr (sizeof(x) == 32) return (typename Wide<T>::Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)memory + j));
#endif
  const auto halves = at<uint16_t, Wide<T>::LANES>(memory, j);
  for (int i = 0; i < Wide<T>::LANES; i++) x[i] = from_f16(halves[i]);
  return x;
}

template <typename T>
INLINE void to_f16(typename Wide<T>::Floats x, void *memory, int j) {
#if defined(__AVX512F__)
  if constexpr (sizeof(x) == 64) {
    _mm256_storeu_si256((__m256i *)memory + j, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
    return;
  }
#elif defined(__F16C__)
  if constexpr (sizeof(x) == 32) {
    _mm_storeu_si128((__m128i *)memory + j, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
    return;
  }
#endif
  typename Wide<T>::Halves halves;
  for (int i = 0; i < Wide<T>::LANES; i++) halves[i] = to_f16(x[i]);
  put(halves, memory, j);
}

// Vector `j` of a block of `dtype`.
template <typename T>
INLINE typename Wide<T>::V load(int64_t dtype, const void *memory, int j) {
  typedef Wide<T> W;
  switch (dtype) {
    case F32:
      return __builtin_convertvector(at<float, W::LANES>(memory, j), typename W::V);
    case F64:
      return __builtin_convertvector(at<double, W::LANES>(memory, j), typename W::V);
    case F16:
      return __builtin_convertvector(of_f16<T>(memory, j), typename W::V);
    default:
      const typename W::Bits bits = unpacked<T>(at<uint16_t, W::LANES>(memory, j)) << 16;
      return __builtin_convertvector((typename W::Floats)bits, typename W::V);
  }
}

// Stores a vector. Returns it as it reads back.
template <typename T>
INLINE typename Wide<T>::V store(int64_t dtype, typename Wide<T>::V x, void *memory, int j) {
  typedef Wide<T> W;
  const typename W::Floats single = __builtin_convertvector(x, typename W::Floats);
  switch (dtype) {
    case F32:
      put(single, memory, j);
      return __builtin_convertvector(single, typename W::V);
    case F64:
      put(__builtin_convertvector(x, typename W::Doubles), memory, j);
      return x;
    case F16:
      to_f16<T>(single, memory, j);
      return load<T>(F16, memory, j);
    default:
      const typename W::Bits rounded = to_bf16<T>(single);
      put(packed<T>(rounded), memory, j);
      return __builtin_convertvector((typename W::Floats)(rounded << 16), typename W::V);
  }
}

// `x` as it reads back from `dtype`.
template <typename T>
INLINE typename Wide<T>::V rounded(int64_t dtype, typename Wide<T>::V x) {
  typename Wide<T>::Doubles memory;
  return store<T>(dtype, x, &memory, 0);
}

// A vector of remainders, as low bits of masters; those of 8 bits shifted.
INLINE typename Lanes<int16_t, WIDTH / 2>::V load_remainders(int64_t dtype, const void *memory, int j) {
  typedef typename Lanes<int16_t, WIDTH / 2>::V Halves;
  if (dtype == REMAINDER) return at<int16_t, WIDTH / 2>(memory, j);
  const auto bytes = at<int8_t, WIDTH / 2>(memory, j);
#if defined(__AVX512BW__)
  return (Halves)_mm512_cvtepi8_epi16((__m256i)bytes) << 8;
#elif defined(__AVX2__) && !defined(__AVX512F__)
  return (Halves)_mm256_cvtepi8_epi16((__m128i)bytes) << 8;
#else
  return __builtin_convertvector(bytes, Halves) << 8;
#endif
}

// remainders.joined for a block, except for the sum: `to`, [BLOCK] int16, is what is added to weights shifted by 16 bits,
// so that each master rounds to its weight.
INLINE void clamp_remainders(const void *model, int64_t dtype, const void *remainders, void *to) {
  typedef typename Lanes<int16_t, WIDTH / 2>::V Halves;
#pragma GCC unroll 2
  for (int j = 0; j < 2 * BLOCK / WIDTH; j++) {
    const Halves upper = at<int16_t, WIDTH / 2>(model, j), magnitude = upper & 0x7fff;
    const Halves lowest = magnitude == 0 ? Halves{} : (upper & 1) | int16_t(-0x8000);
    const Halves highest = magnitude == 0x7f80 ? Halves{} : Halves{} + 0x7fff;
    Halves lower = load_remainders(dtype, remainders, j);
    lower = lower < lowest ? lowest : lower;
    put(lower > highest ? highest : lower, to, j);
  }
}

// Masters of weights and clamped remainders.
template <typename T>
INLINE typename Wide<T>::V joined(const void *model, const void *clamped, int j) {
  typedef typename Wide<T>::Ints Ints;
  const Ints upper = (Ints)unpacked<T>(at<uint16_t, Wide<T>::LANES>(model, j));
  const Ints lower = sign_extended<T>(at<int16_t, Wide<T>::LANES>(clamped, j));
  return __builtin_convertvector((typename Wide<T>::Floats)((upper << 16) + lower), typename Wide<T>::V);
}

// Numbers from -0x80 to 0x7f.
template <int N>
INLINE void store_signed_bytes(typename Lanes<int16_t, N>::V x, void *memory, int j) {
#if defined(__AVX2__)
  if constexpr (N == 16) {
    put(_mm_packs_epi16(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1)), memory, j);
    return;
  }
#endif
  put(__builtin_convertvector(x, typename Lanes<int8_t, N>::V), memory, j);
}

// remainders.split for a block, in lanes of 16 bits.
template <typename T>
INLINE void split(const T *masters, void *model, int64_t dtype, void *remainders) {
  constexpr int N = 2 * Wide<T>::LANES;
  typedef typename Lanes<int16_t, N>::V Halves;
  typedef typename Wide<T>::Bits Bits;
  auto bits = [&](int j) __attribute__((always_inline)) {
    const auto x = __builtin_convertvector(at<T, Wide<T>::LANES>(masters, j), typename Wide<T>::Floats);
    return x != x ? Bits{} + 0x7fc00000u : (Bits)x;
  };
#pragma GCC unroll 2
  for (int j = 0; j < BLOCK / N; j++) {
    const Bits first = bits(2 * j), second = bits(2 * j + 1);
    const Halves upper = (Halves)packed<T>(first >> 16, second >> 16);
    Halves lower = (Halves)packed<T>(first & 0xffffu, second & 0xffffu);
    lower ^= (lower == int16_t(-0x8000)) & ((upper & 1) - 1);  // a tie above an even weight: 0x7fff
    put(upper - (lower >> 15), model, j);
    if (dtype == REMAINDER) {
      put(lower, remainders, j);
    } else {  // to nearest, ties to even
      lower = lower > 0x7f7f ? Halves{} + 0x7f7f : lower;
      store_signed_bytes<N>((lower + 0x7f + ((lower >> 8) & 1)) >> 8, remainders, j);
    }
  }
}

// A vector of bytes, as integers.
template <typename T>
INLINE typename Wide<T>::Bits load_bytes(const void *memory, int j) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return (typename Wide<T>::Bits)_mm512_cvtepu8_epi32(at<long long, 2>(memory, j));
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) {
    int64_t packed;
    std::memcpy(&packed, (const char *)memory + j * sizeof(packed), sizeof(packed));
    return (typename Wide<T>::Bits)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(packed));
  }
#endif
  return __builtin_convertvector(at<uint8_t, Wide<T>::LANES>(memory, j), typename Wide<T>::Bits);
}

// The lowest bytes of `x`, the others of which are 0.
template <typename T>
INLINE void store_bytes(typename Wide<T>::Bits x, void *memory, int j) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    _mm_storeu_si128((__m128i *)memory + j, _mm512_cvtepi32_epi8((__m512i)x));
    return;
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) {
    const __m128i halves = _mm_packus_epi32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
    const int64_t bytes = _mm_cvtsi128_si64(_mm_packus_epi16(halves, halves));
    std::memcpy((char *)memory + j * sizeof(bytes), &bytes, sizeof(bytes));
    return;
  }
#endif
  put(__builtin_convertvector(x, typename Lanes<uint8_t, Wide<T>::LANES>::V), memory, j);
}

// Stores a vector past the cache, so that the cache does not read the memory first; it must be aligned to WIDTH.
template <typename T>
INLINE void stream(typename Wide<T>::V x, T *memory, int j) {
#if defined(__AVX512F__)
  _mm512_stream_ps((float *)memory + j * 16, (__m512)x);
#elif defined(__AVX__)
  _mm256_stream_ps((float *)memory + j * 8, (__m256)x);
#else
  put(x, memory, j);
#endif
}

// Makes what was streamed visible to other threads.
INLINE void streamed() {
#if defined(__AVX__)
  _mm_sfence();
#endif
}

}  // namespace
