// A rank's memory as runs of blocks: their dtypes, known when compiled where they are common, and masters beside weights.

#pragma once

#include <algorithm>
#include <type_traits>

#include "codes.h"

namespace {

// A contiguous range of memory; blocks start at its first element, and the last one may be short.
struct Run {
  char *weight, *model, *grad, *exp_avg, *exp_avg_sq;  // null: no model, no second moment
  const int64_t *block_param;  // [blocks] the parameter of each block; null: `param` for all
  int64_t numel, param;
  int64_t first_block;  // number of blocks in the runs before
  int64_t weight_dtype, model_dtype, grad_dtype, state_dtype;

  int64_t owner(int64_t block) const { return block_param ? block_param[block] : param; }
};

// -- dtypes, known when compiled where they are common ------------------------------------------------

struct Dtypes {
  int64_t weight, model, grad, state;  // model: NONE without separate masters

  explicit Dtypes(const Run &run)
      : weight(run.weight_dtype), model(run.model ? run.model_dtype : NONE), grad(run.grad_dtype), state(run.state_dtype) {}
};

template <int64_t WEIGHT, int64_t MODEL, int64_t STATE, int64_t GRAD = NONE>
struct Known {  // without GRAD, gradients of any dtype
  static constexpr int64_t weight = WEIGHT, model = MODEL, state = STATE;
  const int64_t grad;

  explicit Known(const Dtypes &dtypes) : grad(GRAD == NONE ? dtypes.grad : GRAD) {}
  static bool are(const Dtypes &dtypes) {
    return dtypes.weight == WEIGHT && dtypes.model == MODEL && dtypes.state == STATE && (GRAD == NONE || dtypes.grad == GRAD);
  }
};

template <typename... Each, typename Function>
INLINE void with_first_of(const Dtypes &dtypes, Function function) {
  if (!((Each::are(dtypes) && (function(Each(dtypes)), true)) || ...)) function(dtypes);
}

// Calls function(dtypes), `Known` if they are common in such updates; LARS's are those of 2 directions.
template <typename T, int D, typename Function>
INLINE void with_known(const Dtypes &dtypes, Function function) {
  if constexpr (sizeof(T) == 8)
    with_first_of<Known<F64, NONE, F64, F64>>(dtypes, function);
  else if constexpr (D > 1)
    with_first_of<Known<F32, NONE, F32, F32>, Known<F32, BF16, F32>>(dtypes, function);
  else
    with_first_of<Known<F32, NONE, F32, F32>, Known<F32, NONE, F32>, Known<F32, BF16, F32>, Known<F32, F16, F32>,
                  Known<REMAINDER, BF16, F32>, Known<REMAINDER8, BF16, F32>, Known<BF16, NONE, F32>, Known<F32, NONE, BF16>,
                  Known<F32, NONE, CODES, F32>, Known<F32, BF16, CODES, BF16>, Known<REMAINDER, BF16, CODES, BF16>,
                  Known<REMAINDER8, BF16, CODES, BF16>,
                  Known<F32, BF16, BF16>, Known<REMAINDER, BF16, BF16>, Known<REMAINDER8, BF16, BF16>,
                  Known<BF16, NONE, BF16>>(dtypes, function);
}

// Calls function(dtype) with a gradient's dtype, known when compiled.
template <typename Function>
INLINE void with_known(int64_t dtype, Function function) {
  switch (dtype) {
    case F32:
      return function(std::integral_constant<int64_t, F32>());
    case F64:
      return function(std::integral_constant<int64_t, F64>());
    case F16:
      return function(std::integral_constant<int64_t, F16>());
    default:
      return function(std::integral_constant<int64_t, BF16>());
  }
}

// -- a block ------------------------------------------------------------------------------------------

INLINE int size_of_block(int64_t numel, int64_t block) {
  const int64_t left = numel - block * BLOCK;
  return left < BLOCK ? int(left) : BLOCK;
}

// The memory of a block: in place, or a copy of a short one, padded with zeros.
struct Place {
  char *memory, *block;
  int bytes = 0;

  INLINE Place(char *start, int64_t dtype, int64_t number, int n, char *copy) {
    if (dtype == CODES) {  // whole blocks
      memory = block = start + number * CODED_BLOCK;
      return;
    }
    memory = block = start + number * BLOCK * size_of(dtype);
    if (n == BLOCK || !start) return;
    bytes = n * size_of(dtype);
    block = copy;
    std::memcpy(block, memory, bytes);
    std::memset(block + bytes, 0, BLOCK * size_of(dtype) - bytes);
  }
  INLINE void write_back() const {
    if (block != memory) std::memcpy(memory, block, bytes);
  }
};

struct Copy {
  alignas(64) char bytes[BLOCK * 8];
};

struct Places {
  Place weight, model, grad, exp_avg, exp_avg_sq;

  template <typename AnyDtypes>
  INLINE Places(const Run &run, const AnyDtypes &dtypes, int64_t block, int n, Copy *copies)
      : weight(run.weight, dtypes.weight, block, n, copies[0].bytes),
        model(run.model, dtypes.model, block, n, copies[1].bytes),
        grad(run.grad, dtypes.grad, block, n, copies[2].bytes),
        exp_avg(run.exp_avg, dtypes.state, block, n, copies[3].bytes),
        exp_avg_sq(run.exp_avg_sq, dtypes.state, block, n, copies[4].bytes) {}
};

// A moment, `SIGNED`: the first.
template <typename T, bool SIGNED, typename AnyDtypes>
INLINE typename Wide<T>::V load_moment(const AnyDtypes &dtypes, const Place &place, int j) {
  if (dtypes.state == CODES) return decoded<T, SIGNED>(place.block, j);
  return load<T>(dtypes.state, place.block, j);
}

// A vector of both passes: the master, the gradient as it enters moments, and new moments.
template <typename T>
struct Updated {
  typename Wide<T>::V w, scaled, m, v;
};

template <typename T>
INLINE uint32_t key_of(T step) {
  const float salt = float(step);
  uint32_t key;
  std::memcpy(&key, &salt, sizeof(key));
  return key;
}

// Stores new moments, the first or both, in a floating-point dtype. Returns `x` with moments as they read back.
template <typename T, bool HAS_V, typename AnyDtypes>
INLINE Updated<T> store_moments(const AnyDtypes &dtypes, const Places &places, Updated<T> x, T step, int j) {
  if (dtypes.state == BF16) {
    const auto random = random_bits<T>(__builtin_convertvector(x.m, typename Wide<T>::Floats), key_of(step));
    x.m = store_bf16_randomly<T>(x.m, random & 0x7ffffu, places.exp_avg.block, j);
    if constexpr (HAS_V) x.v = store_bf16_randomly<T>(x.v, random >> 13, places.exp_avg_sq.block, j);
  } else {
    x.m = store<T>(dtypes.state, x.m, places.exp_avg.block, j);
    if constexpr (HAS_V) x.v = store<T>(dtypes.state, x.v, places.exp_avg_sq.block, j);
  }
  return x;
}

// A block's new moments until its largest is known: then they are encoded. D: see `terms`, 0: LARS's.
template <typename T, int D>
struct NewMoments {
  typedef Wide<T> W;
  typedef typename W::Floats Floats;
  typedef typename W::Ints Ints;
  static constexpr bool HAS_V = D > 0, KEEPS_SCALED = D != 1;

  alignas(64) T w[BLOCK], scaled[KEEPS_SCALED ? BLOCK : 1];
  alignas(64) float m[BLOCK], v[HAS_V ? BLOCK : 1];
  int32_t origin_m, origin_v;

  static INLINE Ints larger(Ints top, Floats x) {
    const Ints bits = (Ints)x & NO_SIGN;
    return bits > top ? bits : top;
  }
  // Stores the origin of one moment's block. All values of a block with a nan or an infinity become nan.
  static INLINE int32_t start(char *block, Ints top, bool is_signed, float *values) {
    const int32_t origin = origin_of<T>(top, is_signed);
    std::memcpy(block, &origin, sizeof(origin));
    if (origin == NOT_A_NUMBER) std::fill_n(values, BLOCK, float_of(NOT_A_NUMBER));
    return origin;
  }
  // Keeps `updated(j)` of every vector, and stores the blocks' origins.
  template <typename Next>
  INLINE void start_blocks(const Places &places, Next updated) {
    Ints top_m{}, top_v{};
    for (int j = 0; j < W::COUNT; j++) {
      const Updated<T> x = updated(j);
      put(x.w, w, j);
      if constexpr (KEEPS_SCALED) put(x.scaled, scaled, j);
      const Floats first = __builtin_convertvector(x.m, Floats);
      put(first, m, j);
      top_m = larger(top_m, first);
      if constexpr (HAS_V) {
        const Floats second = __builtin_convertvector(x.v, Floats);
        put(second, v, j);
        top_v = larger(top_v, second);
      }
    }
    origin_m = start(places.exp_avg.block, top_m, true, m);
    if constexpr (HAS_V) origin_v = start(places.exp_avg_sq.block, top_v, false, v);
  }
  // Encodes vector `j`. Returns it with moments as they read back.
  INLINE Updated<T> store(const Places &places, T step, int j) {
    Updated<T> x{at<T, W::LANES>(w, j)};
    if constexpr (KEEPS_SCALED) x.scaled = at<T, W::LANES>(scaled, j);
    const Floats first = at<float, W::LANES>(m, j);
    const auto random = random_bits<T>(first, key_of(step));
    x.m = encoded<T, true>(first, random & 0x7ffffu, origin_m, places.exp_avg.block, j);
    if constexpr (HAS_V) x.v = encoded<T, false>(at<float, W::LANES>(v, j), random >> 13, origin_v, places.exp_avg_sq.block, j);
    return x;
  }
  INLINE void end_blocks(const Places &places) {
    if (origin_m == NOT_A_NUMBER) std::memset(places.exp_avg.block + ORIGIN_BYTES, 0, BLOCK);
    if constexpr (HAS_V)
      if (origin_v == NOT_A_NUMBER) std::memset(places.exp_avg_sq.block + ORIGIN_BYTES, 0, BLOCK);
  }
};

// Masters: stored as such, or joined from weights and remainders.
template <typename T, typename AnyDtypes>
INLINE typename Wide<T>::V load_masters(const AnyDtypes &dtypes, const Places &places, int j) {
  if (is_remainder(dtypes.weight)) return joined<T>(places.model.block, dtypes.weight, places.weight.block, j);
  return load<T>(dtypes.weight, places.weight.block, j);
}

// Stores masters, and the model's weights if masters are separate.
template <typename T, typename AnyDtypes>
INLINE void store_masters(const AnyDtypes &dtypes, const Places &places, typename Wide<T>::V x, int j) {
  if (is_remainder(dtypes.weight)) {
    split<T>(x, places.model.block, dtypes.weight, places.weight.block, j);
    return;
  }
  if (dtypes.model != NONE) store<T>(dtypes.model, x, places.model.block, j);
  store<T>(dtypes.weight, x, places.weight.block, j);
}

template <typename AnyDtypes>
INLINE bool resyncs(const AnyDtypes &dtypes) {
  return dtypes.model != NONE && !is_remainder(dtypes.weight);
}

// Masters; a weight that its master no longer rounds to was written by the user: it replaces the master.
template <typename T, typename AnyDtypes>
INLINE typename Wide<T>::V load_resynced(const AnyDtypes &dtypes, const Places &places, int j,
                                         typename Wide<T>::Mask &written) {
  typedef typename Wide<T>::V V;
  const V w = load_masters<T>(dtypes, places, j);
  if (!resyncs(dtypes)) return w;
  const V model = load<T>(dtypes.model, places.model.block, j);
  const auto differs = rounded<T>(dtypes.model, w) != model;
  written |= differs;
  return differs ? rounded<T>(dtypes.weight, model) : w;
}

// Stores masters of weights that the user wrote.
template <typename T, typename AnyDtypes>
INLINE void store_resynced(const AnyDtypes &dtypes, const Places &places, typename Wide<T>::Mask written) {
  typedef typename Wide<T>::V V;
  if (resyncs(dtypes) && any(written))
    for (int j = 0; j < Wide<T>::COUNT; j++) {
      const V w = load_masters<T>(dtypes, places, j), model = load<T>(dtypes.model, places.model.block, j);
      store<T>(dtypes.weight, rounded<T>(dtypes.model, w) != model ? model : w, places.weight.block, j);
    }
}

}  // namespace
